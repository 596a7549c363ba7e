# SPDX-License-Identifier: Apache-2.0
"""The DINOv2 objective: masked views, the patch loss of iBOT, KoLeo, Sinkhorn-Knopp."""
