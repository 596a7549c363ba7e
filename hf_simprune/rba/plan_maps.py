# SPDX-License-Identifier: Apache-2.0
"""The maps of one plan, whoever wrote it: from the analysis, fitted for it, or trained."""

import math

import torch
from torch import Tensor

from ..errors import InputError
from .analysis import Analysis
from .candidates import TRAINED_MAPS
from .frontier import advance
from .maps import FittedMap, FittedMaps, fit
from .measure import Bench
from .plan import CompressionPlan, Half, Span
from .refit import fit_behind
from .replay import check_plan
from .trained_maps import fit_trained


TRAINING_TOKENS = 131_072  # 665 images of 197 tokens; bounds memory


def plan_maps(analysis: Analysis, plan: CompressionPlan, seed: int = 0) -> FittedMaps:
    """A map for every span and half of `plan`, all fitted on the original network's activations of the fit images.

    What the analysis has is taken from it; spans that it did not measure are fitted; "mlp" and "res_mlp" are trained
    on at most 131,072 tokens, drawn with `seed`.

    Raises:
        InputError: the plan is for another depth, or asks for what this network does not have.
        ValueError: a trained map on several processes.
    """
    check_plan(analysis.adapter, plan)
    settings = analysis.report.settings

    def made(item: Span | Half) -> FittedMap:
        if item in analysis.maps:
            return analysis.maps[item]
        if item.map in TRAINED_MAPS:
            assert isinstance(item, Span)  # no half has a trained map
            x, y = span_tokens(analysis.bench, item, seed)
            return fit_trained(item.map, x, y, seed=seed)
        try:
            return fit(item, analysis.moments, settings["ridge"], settings["bias"])
        except InputError:
            # no moments of this item: a fold over more than max_span blocks, or a half in a block analysis
            original = CompressionPlan(plan.depth)
            return fit_behind(analysis.bench, original, {}, item, settings["ridge"], settings["bias"])

    return {item: made(item) for item in plan.items}


@torch.no_grad()
def span_tokens(bench: Bench, span: Span, seed: int = 0, limit: int = TRAINING_TOKENS) -> tuple[Tensor, Tensor]:
    """Tokens before and after `span` in the original network, of all fit images: two of (N, D), fp32, on the CPU.

    N is at most about `limit`: of each image the same number of tokens is drawn.
    """
    adapter = bench.adapter
    if bench.ranks[1] > 1:
        raise ValueError(f"{span}: maps are trained by one process")
    generator = torch.Generator().manual_seed(seed)
    original = CompressionPlan(adapter.depth)
    per_image = max(1, math.ceil(limit / len(bench.images.fit)))
    before, after = [], []
    for chunk in bench.images.chunks(
        bench.images.fit, bench.chunk_size, progress=None if bench.quiet else f"tokens of {span}"
    ):
        h, context = adapter.embed(chunk.pixel_values.to(adapter.model.device))
        x = advance(adapter, original, {}, h, context, 0, span.start)
        y = advance(adapter, original, {}, x, context, span.start, span.end)
        tokens = x.shape[1]
        rows = torch.stack([torch.randperm(tokens, generator=generator)[:per_image] for _ in range(len(x))])
        rows = rows.to(x.device)[..., None].expand(-1, -1, x.shape[2])
        before.append(x.gather(1, rows).flatten(0, 1).float().cpu())
        after.append(y.gather(1, rows).flatten(0, 1).float().cpu())
    return torch.cat(before), torch.cat(after)
