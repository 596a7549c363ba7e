# SPDX-License-Identifier: Apache-2.0
"""A local page to play with a model: which tokens are dropped, which blocks can go. The page itself needs gradio."""
