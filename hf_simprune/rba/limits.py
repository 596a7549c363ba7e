# SPDX-License-Identifier: Apache-2.0
"""The budget options, which say what may remain, as a planner's budget, which says what has to go."""

import numpy as np
import torch

from ..errors import InputError
from ..evaluation.model_cost import Cost, PieceCosts, gains, piece_costs
from .adapters import Adapter
from .arguments import CompressArguments, parse_limit
from .budget import Budget, Candidate, blocks_as_macs
from .calibration import ImageReader
from .candidates import candidate_items, closed_form_kinds
from .planner import check_budget


def blank_pieces(adapter: Adapter, reader: ImageReader) -> PieceCosts:
    """Parameters, MACs and time of every piece of the network, on one black image of the size it is used at."""
    blank = np.zeros((*adapter.image_size, 3), dtype=np.uint8)
    pixels = reader.prepare([blank]).to(adapter.model.device, adapter.model.dtype)
    with torch.no_grad():
        return piece_costs(adapter, pixels)


def budget_of(args: CompressArguments, total: Cost) -> Budget:
    """What has to go of a network that has `total` (parameters, MACs and seconds of one image).

    Raises:
        InputError: the network already keeps to the limit.
    """
    if args.remove_blocks is not None:
        return Budget("blocks", args.remove_blocks)
    if args.max_cost is not None:
        return Budget("cost", args.max_cost)
    # per option: kind of budget, what the network has, and how many of the option's units that is each
    limits = {
        "max_params": ("params", total.params, 1.0, "parameters"),
        "max_flops": ("macs", total.macs, 2.0, "FLOPs an image"),
        "max_latency": ("seconds", total.seconds, 1e3, "ms an image"),
    }
    name = next(name for name in limits if vars(args)[name] is not None)
    kind, has, units, words = limits[name]
    saved = has - parse_limit(name, vars(args)[name]).remaining(has * units) / units
    if saved <= 0:
        raise InputError(
            f"--{name} {vars(args)[name]}: the network has {_readable(has * units)} {words} as it is, so nothing has "
            "to go; give less"
        )
    return Budget(kind, saved if kind == "seconds" else int(-(-saved // 1)))


def check_reachable(args: CompressArguments, adapter: Adapter, budget: Budget, pieces: PieceCosts) -> None:
    """Make sure, before anything is measured, that some plan meets the budget.

    Raises:
        InputError: none does; the message names what was asked for and the most that is possible.
    """
    assert args.map is not None  # `run_compress` has chosen
    kinds = closed_form_kinds(args.map)
    items = candidate_items(adapter, kinds, args.granularity, args.max_span, args.rank, args.first_block)
    candidates = []
    for item in items:
        saved = gains(item, pieces)
        candidates.append(Candidate(item, 0.0, saved.blocks, saved.params, saved.macs, saved.seconds))
    protected = () if args.first_block else (0,)
    try:
        check_budget(adapter.depth, candidates, budget, protected)  # of blocks: by spans alone
        if budget.kind == "blocks" and args.granularity == "half":
            # blocks then stand for their MACs, of which those of a map in the place of a block are few
            macs = blocks_as_macs(adapter.depth, candidates, budget)
            check_budget(adapter.depth, candidates, macs, protected)
    except InputError as error:
        # in the words of the command line
        reason = str(error).partition(": ")[2]
        raise InputError(f"--{budget.option} {vars(args)[budget.option]}: {reason}") from None


def _readable(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
