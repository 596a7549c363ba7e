# SPDX-License-Identifier: Apache-2.0
"""Publishing a run: its model card and its upload to the Hugging Face Hub."""
