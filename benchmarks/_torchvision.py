# SPDX-License-Identifier: Apache-2.0
"""Importing this imports torchvision, also a CUDA build next to a CPU-only torch.

The compiled operators of such a build cannot load. Its import still registers fake kernels for two of them, so their
schemas have to exist; nothing here calls them. transformers imports torchvision where it finds it: import this first.
"""

import sys

import torch


OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # definitions live as long as this object

try:
    import torchvision
except RuntimeError:
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
