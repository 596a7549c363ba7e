# SPDX-License-Identifier: Apache-2.0
"""Passes of a frozen network under every reduction that needs no training, and two controls that look at nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from hf_simprune import models as _registered  # noqa: F401
from hf_simprune.errors import InputError
from hf_simprune.reduction import (
    METHODS,
    BranchReducer,
    BranchWalk,
    Kept,
    PairReducer,
    ReductionSetting,
    Seen,
    TokenMap,
    TokenReducer,
    build_reducer,
    default_reduction_layers,
    gather_tokens,
    keep_count,
    parse_options,
)
from hf_simprune.reduction.methods import INFERENCE_METHODS


WINDOW_METHODS = ("simprune",)


class RandomBranch(BranchReducer):
    """Control: a uniformly random subset in every row, whatever the tokens are."""

    name = "random"

    def decide(self, seen: Seen) -> TokenMap:
        rows, count, _ = seen.patches.shape
        shuffled = torch.rand(rows, count, device=seen.patches.device).argsort(dim=-1)
        return Kept(shuffled[:, : keep_count(count, self.keep_rate)].sort(dim=-1).values, count)


class CentreBranch(BranchReducer):
    """Control: the patches nearest to the middle of the crop, the same ones in every image; needs the grid."""

    name = "position"

    def decide(self, seen: Seen) -> TokenMap:
        rows, count, _ = seen.patches.shape
        places = nested_centres(self.setting.grids[0], self.counts(self.setting.grids[0]))[seen.stage]
        return Kept(torch.tensor(places, device=seen.patches.device).expand(rows, -1), count)


def nested_centres(grid: tuple[int, int], counts: Sequence[int]) -> list[list[int]]:
    """For every stage the kept ones among the tokens that enter it, ascending: those nearest to the grid's middle.

    counts: tokens before the first stage and after each. Equally near ones go by the lower index.
    """
    rows, columns = grid

    def distance(patch: int) -> float:
        row, column = divmod(patch, columns)
        return ((row + 0.5) / rows - 0.5) ** 2 + ((column + 0.5) / columns - 0.5) ** 2

    alive, stages = list(range(rows * columns)), []
    for count in counts[1:]:
        chosen = set(sorted(alive, key=lambda patch: (round(distance(patch), 9), patch))[:count])
        stages.append([place for place, patch in enumerate(alive) if patch in chosen])
        alive = [patch for patch in alive if patch in chosen]
    return stages


@dataclass(frozen=True)
class Method:
    """A reduction as a benchmark names it: `evit`, `tome:proportional=false`, `simprune@0.5`.

    window: where the curriculum's window stands, 0 to 1, of methods that have one.
    """

    label: str
    name: str
    window: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def reduces_alone(self) -> bool:
        """Whether it makes the tokens of a single image fewer, without another view and without training."""
        return self.name in ("random", "position") or self.name in INFERENCE_METHODS

    def build(self, keep_rate: float, setting: ReductionSetting) -> TokenReducer | None:
        """The reducer, a control for `random` and `position`, None for `none`."""
        if self.name in ("random", "position"):
            return (RandomBranch if self.name == "random" else CentreBranch)(keep_rate, setting)
        return build_reducer(self.name, keep_rate, setting, self.options)


def parse_method(text: str) -> Method:
    """Raises InputError for an unknown name, an option that the method lacks, or a window outside [0, 1]."""
    head, _, options = text.partition(":")
    name, at, place = head.partition("@")
    known = ("none", "random", "position", *(m for m in METHODS if m != "random"))
    if name not in known:
        raise InputError(f"method {text}: {name} is unknown; choose from {', '.join(known)}")
    if bool(at) != (name in WINDOW_METHODS):
        raise InputError(
            f"method {text}: give {' and '.join(WINDOW_METHODS)}, and no other, a window, as simprune@0.5"
        )
    try:
        window = float(place) if at else None
    except ValueError:
        raise InputError(f"method {text}: the window must be a number from 0 to 1, got {place}") from None
    if window is not None and not 0 <= window <= 1:
        raise InputError(f"method {text}: the window must be a number from 0 to 1, got {place}")
    if options and name not in METHODS:
        raise InputError(f"method {text}: {name} has no options")
    return Method(text, name, window, parse_options(name, options or None))


def registered(*names: str) -> list[str]:
    """Of these methods those that this version of the package has, controls and `none` included."""
    return [name for name in names if name.partition(":")[0].partition("@")[0] in ("none", "position", *METHODS)]


def load_backbone(folder: str) -> PreTrainedModel:
    """A backbone of this package's classes, in eval mode, without pooler.

    `folder`: Hub name or folder of a stock or own checkpoint, a classifier's too; or a `checkpoint-<step>` folder of
    a training run, of which the teacher is read.

    Raises:
        InputError: a model type that this package does not have.
    """
    logging.set_verbosity_error()  # that a classifier's head is left out is what is wanted
    logging.disable_progress_bar()
    step = Path(folder) / "teacher.safetensors"
    source = Path(folder).parent / "training" / "initial" if step.is_file() else folder
    kind = AutoConfig.from_pretrained(source).model_type
    own = kind if kind.startswith("simprune_") else f"simprune_{kind}"
    try:
        config_class = type(AutoConfig.for_model(own))
    except ValueError:
        raise InputError(f"model {folder}: of type {kind}, for which this package has no class") from None
    model = AutoModel._model_mapping[config_class].from_pretrained(source, add_pooling_layer=False)
    if step.is_file():
        from safetensors.torch import load_file

        prefix = "backbone."
        weights = {key.removeprefix(prefix): v for key, v in load_file(step).items() if key.startswith(prefix)}
        model.load_state_dict(weights)
    return model.eval()


def reduction_setting(model: PreTrainedModel, grid: tuple[int, int]) -> ReductionSetting:
    """For crops of `grid` patches, with the package's own choice of layers."""
    config = model.config
    return ReductionSetting(
        layers=default_reduction_layers(config.num_hidden_layers),
        depth=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_prefix=model.num_prefix_tokens,
        grids=(grid,),
    )


class Passed(NamedTuple):
    """Of R rows.

    cls: (R, D), after the last layer norm. tokens: (R, m, D), the patch tokens that left the block of the last stage;
    without reduction, that of the last default stage. groups: (R, N) int64, which of these m each patch of the image
    went into, -1 where it was dropped.
    """

    cls: Tensor
    tokens: Tensor
    groups: Tensor


@torch.no_grad()
def walk_pairs(
    model: PreTrainedModel, pixels: Tensor, reducer: TokenReducer | None, window: float | None = None
) -> Passed:
    """Both crops of B images, (2B, C, H, W) view-major, through the network.

    A method that looks across views sees the first view as the student's and the second as the teacher's, and the
    result holds these two; both branches have the same weights. Other methods reduce each view by itself.
    """
    if isinstance(reducer, PairReducer):
        return _walk_both(model, pixels, reducer, torch.tensor(window, device=pixels.device))
    prefix, grid = model.num_prefix_tokens, grid_of(model, pixels)
    last = (default_reduction_layers(len(model.layers)) if reducer is None else reducer.layers)[-1]
    walk = None if reducer is None else BranchWalk(reducer, prefix, grid)
    hidden = model.embed(pixels)
    for index, layer in enumerate(model.layers):
        hidden = layer(hidden) if walk is None else walk.block(index, layer, hidden)
        if index == last:
            tokens = hidden[:, prefix:]
    groups = compose([] if walk is None else [found.groups() for found in walk.maps], tokens)
    return Passed(model.layernorm(hidden[:, 0]), tokens, groups)


def _walk_both(model: PreTrainedModel, pixels: Tensor, reducer: PairReducer, progress: Tensor) -> Passed:
    prefix, images = model.num_prefix_tokens, len(pixels) // 2
    student, teacher = model.embed(pixels), model.embed(pixels)
    groups: list[list[Tensor]] = [[], []]
    for index, layer in enumerate(model.layers):
        if index not in reducer.layers:
            student, teacher = layer(student), layer(teacher)
            continue
        student, teacher = layer(student, half="attention"), layer(teacher, half="attention")
        stage = reducer.layers.index(index)
        chosen = reducer.pair(student[:, prefix:], teacher[:, prefix:], progress, stage)
        for kept, tokens, record in ((chosen.student, student, groups[0]), (chosen.teacher, teacher, groups[1])):
            record.append(Kept(kept, tokens.shape[1] - prefix).groups())
        student = layer(gather_tokens(student, chosen.student, prefix), half="mlp")
        teacher = layer(gather_tokens(teacher, chosen.teacher, prefix), half="mlp")
        left = student[:images, prefix:], teacher[images:, prefix:]
    rows = slice(None, images), slice(images, None)
    found = [compose([stage[row] for stage in record], left[0]) for record, row in zip(groups, rows, strict=True)]
    cls = torch.cat([student[:images, 0], teacher[images:, 0]])
    return Passed(model.layernorm(cls), torch.cat(left), torch.cat(found))


def compose(stages: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Groups after all stages, (R, N), from those of each stage; without a stage every token of (R, N, D) is one."""
    if not stages:
        return torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
    groups = stages[0]
    for following in stages[1:]:
        groups = torch.where(groups < 0, groups, following.gather(1, groups.clamp_min(0)))
    return groups


def grid_of(model: PreTrainedModel, pixels: Tensor) -> tuple[int, int]:
    """(rows, columns) of patches of pixels (…, H, W)."""
    side = model.config.patch_size
    height, width = (side, side) if isinstance(side, int) else side
    return pixels.shape[-2] // height, pixels.shape[-1] // width


@torch.no_grad()
def dense_tokens(model: nn.Module, pixels: Tensor, reducer: BranchReducer | None) -> Tensor:
    """All patch tokens again at the end of the network, (B, N, D), after the last layer norm."""
    prefix = model.num_prefix_tokens
    walk = None
    if reducer is not None:
        walk = BranchWalk(reducer, prefix, grid_of(model, pixels), records_before=True)
    hidden = model.embed(pixels)
    for index, layer in enumerate(model.layers):
        hidden = layer(hidden) if walk is None else walk.block(index, layer, hidden)
    return model.layernorm(hidden if walk is None else walk.restore(hidden))[:, prefix:]
