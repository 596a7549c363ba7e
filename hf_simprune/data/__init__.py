# SPDX-License-Identifier: Apache-2.0
"""Opening data sets and decoding their images."""
