# SPDX-License-Identifier: Apache-2.0
"""What travels from the loader to the device: uint8 crops and the parameters of their photometric part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ViewParameters:
    """Photometric parameters, arrays (V, B, ...) or flat (V·B, ...), as `augmentation.sample_parameters` names them.

    They stay in host memory: they decide which crops an operation is run on, and asking a GPU would mean waiting.
    """

    flip: np.ndarray
    jitter: np.ndarray
    factors: np.ndarray
    order: np.ndarray
    grayscale: np.ndarray
    blur_sigma: np.ndarray
    solarize: np.ndarray

    def views(self, selection: slice) -> "ViewParameters":
        """The selected views of (V, B, ...) parameters, flattened to (views·B, ...)."""
        return ViewParameters(*(value[selection].reshape(-1, *value.shape[2:]) for value in vars(self).values()))

    def rows(self, index: np.ndarray) -> "ViewParameters":
        """The parameters of some of the examples, (len(index), ...) of flat ones."""
        return ViewParameters(*(value[index] for value in vars(self).values()))


PARAMETER_NAMES = tuple(field.name for field in fields(ViewParameters))


@dataclass(frozen=True)
class Batch:
    """B examples of V = 2 + L views.

    `global_crops` uint8 (2, B, 3, H, W); `local_crops` uint8 (L, B, 3, h, w) or None; `parameters` with rows (V, B);
    `indices` (B,) int64: the examples' keys; `bad_indices`: keys of unreadable images in it that were replaced;
    `masks` bool (2, B, N): patches of the global crops that the student does not see, or None; `draws` (B,) int64: a
    random number of each example, a function of seed, epoch and key like its crops, or None.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    parameters: ViewParameters
    indices: Tensor
    bad_indices: tuple[int | str, ...]
    masks: Tensor | None = None
    draws: Tensor | None = None

    def __len__(self) -> int:
        return self.global_crops.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its crops, masks and draws on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, so that its copy to a GPU can overlap with computing."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("global_crops", "local_crops", "masks", "draws")
        tensors = {name: tensor for name in names if (tensor := vars(self)[name]) is not None}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)


def collate(examples: Sequence[dict[str, Any]]) -> Batch:
    """Stack examples, each as `crops.make_views` and the datasets of `data` give them, into a Batch."""
    views = {name: np.stack([example[name] for example in examples], axis=1) for name in PARAMETER_NAMES}
    local = None
    if examples[0]["local_crops"] is not None:
        local = torch.stack([example["local_crops"] for example in examples], dim=1)
    masks = None
    if examples[0].get("masks") is not None:
        masks = torch.stack([example["masks"] for example in examples], dim=1)
    draws = None
    if examples[0].get("draw") is not None:
        draws = torch.tensor([example["draw"] for example in examples], dtype=torch.int64)
    return Batch(
        global_crops=torch.stack([example["global_crops"] for example in examples], dim=1),
        local_crops=local,
        parameters=ViewParameters(**views),
        indices=torch.tensor([example["index"] for example in examples], dtype=torch.int64),
        bad_indices=tuple(index for example in examples for index in example["bad_indices"]),
        masks=masks,
        draws=draws,
    )
