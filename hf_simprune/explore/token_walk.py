# SPDX-License-Identifier: Apache-2.0
"""Two augmented views of an image, and the patches that SimPrune keeps of both at each reduction layer.

Student and teacher are the same network here, as they are when training begins: the student sees the first view, the
teacher the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..dino.augmentation import AugmentationConfig
from ..dino.batch import collate
from ..dino.crops import make_views
from ..dino.photometric import apply_photometric
from ..dino.snapshots import follow_tokens, stage_dropped
from ..errors import InputError
from ..rba.adapters import Adapter
from ..reduction.base import default_reduction_layers, keep_count
from ..reduction.curriculum import window_offset
from ..reduction.simprune import cosine_similarity, select_one_way, select_symmetric, validate_matching
from ..reduction.token_maps import Kept, gather_tokens


@dataclass(frozen=True)
class DroppedTokens:
    """What became of the patches of both views.

    Attributes:
        layers: the blocks after whose attention patches left, ascending.
        grids: (views, stages, rows, columns) integers, after each stage: 0 for a patch that is still there, s for one
            that stage s, counted from 1, dropped.
    """

    layers: tuple[int, ...]
    grids: np.ndarray

    def kept(self, view: int, stage: int) -> int:
        """Patches of a view that are left after a stage, counted from 0."""
        return int((self.grids[view, stage] == 0).sum())


def draw_views(
    pixels: Tensor, size: int, mean: Sequence[float], std: Sequence[float], seed: int
) -> tuple[Tensor, np.ndarray]:
    """The two global crops of DINO's augmentation.

    Args:
        pixels: uint8 (H, W, 3).
        size: side of a crop in pixels.
        mean, std: of the network's image processor.
        seed: another one gives other crops and colours.

    Returns:
        Normalised crops (2, 3, size, size) for the network, and (2, size, size, 3) floats in 0..1 to look at.
    """
    red, green, blue = mean
    red_std, green_std, blue_std = std
    config = AugmentationConfig(
        global_crop_size=size,
        local_crops_number=0,
        image_mean=(red, green, blue),
        image_std=(red_std, green_std, blue_std),
    )
    example = make_views(pixels, config, seed, 0, 0)
    batch = collate([{**example, "index": 0, "bad_indices": ()}])
    crops, _ = apply_photometric(batch, config, "cpu")
    scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (tuple(std), tuple(mean)))
    return crops, (crops * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy()


class TokenWalk:
    """Both views on their way through the network; what does not depend on the curriculum is computed once.

    Args:
        adapter: of a family whose blocks know nothing of positions.
        views: (2, 3, H, W), normalised.

    Raises:
        InputError: a family whose blocks use positions, or no block with both halves to drop tokens in.
    """

    def __init__(self, adapter: Adapter, views: Tensor) -> None:
        self.adapter = adapter
        self.layers = reduction_layers(adapter)
        tokens, self._context = self._embed(views)
        self.grid = grid_of(tokens.shape[1] - adapter.num_prefix_tokens, views.shape[-2:])
        for block in range(self.layers[0]):
            tokens = self._block(block, tokens)
        self._attended = self._attend(self.layers[0], tokens)

    @torch.inference_mode()
    def dropped(self, progress: float, keep_rate: float, matching: str = "one_way") -> DroppedTokens:
        """What becomes of the patches at a place of the curriculum.

        Args:
            progress: in [0, 1]; at 0 the most dissimilar patches leave, at 1 the most similar ones.
            keep_rate: share of the patches that stays at each layer, in (0, 1].
            matching: "one_way" (the paper) or "symmetric", see `SimPruneReducer`.

        Raises:
            InputError: a keep rate or matching that is not accepted.
        """
        validate_matching(matching)
        select = select_one_way if matching == "one_way" else select_symmetric
        prefix, groups, tokens = self.adapter.num_prefix_tokens, [], self._attended
        for stage, layer in enumerate(self.layers):
            patches = tokens[:, prefix:]
            count = patches.shape[1]
            keep = keep_count(count, keep_rate)
            offset = window_offset(torch.tensor(progress), count, keep)
            indices = torch.cat(select(cosine_similarity(patches[:1], patches[1:]), keep, offset))
            groups.append(Kept(indices, count).groups())
            if stage + 1 == len(self.layers):
                break
            tokens = gather_tokens(tokens, indices, prefix)
            tokens = tokens + self.adapter.mlp_write(layer, self.adapter.mlp_input(layer, tokens))
            for block in range(layer + 1, self.layers[stage + 1]):
                tokens = self._block(block, tokens)
            tokens = self._attend(self.layers[stage + 1], tokens)
        followed = follow_tokens(groups)
        grids = [stage_dropped(followed[:, : stage + 1]).view(2, *self.grid) for stage in range(len(self.layers))]
        return DroppedTokens(self.layers, torch.stack(grids, dim=1).numpy())

    @torch.inference_mode()
    def _embed(self, views: Tensor) -> tuple[Tensor, object]:
        tokens, context = self.adapter.embed(views.to(self.adapter.model.device))
        if context is not None:
            raise InputError(
                f"MODEL: the blocks of a {self.adapter.family} model need the place of every token, so that none can "
                "be dropped; its blocks can be explored, its tokens cannot"
            )
        return tokens, context

    @torch.inference_mode()
    def _block(self, block: int, tokens: Tensor) -> Tensor:
        return self.adapter.block(block, tokens, self._context)

    @torch.inference_mode()
    def _attend(self, block: int, tokens: Tensor) -> Tensor:
        """The stream between attention and MLP."""
        write = self.adapter.attention_write(block, self.adapter.attention_input(block, tokens), self._context)
        return tokens + write


def reduction_layers(adapter: Adapter) -> tuple[int, ...]:
    """The default reduction layers of the network, without those that are no block with two halves.

    Raises:
        InputError: there is none.
    """
    layers = tuple(layer for layer in default_reduction_layers(adapter.depth) if adapter.is_block(layer))
    if not layers:
        raise InputError(f"MODEL: a map stands at every reduction layer of its {adapter.depth} blocks")
    return layers


def grid_of(patches: int, size: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of so many patches of an image of (H, W) pixels, patches being square."""
    height, width = size
    rows = round((patches * height / width) ** 0.5)
    return rows, patches // rows
