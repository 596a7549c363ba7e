# SPDX-License-Identifier: Apache-2.0
"""Options of recipes and of the command line: dataclasses they share, and how these are read."""
