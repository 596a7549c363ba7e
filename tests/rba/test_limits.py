"""Options that say what may remain become budgets that say what has to go; what cannot be met is refused at once."""

import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.evaluation.model_cost import Cost, PieceCosts
from hf_simprune.rba.adapters import adapter_for
from hf_simprune.rba.arguments import COMPRESS_OPTIONS, CompressArguments
from hf_simprune.rba.budget import Budget
from hf_simprune.rba.calibration import ImageReader
from hf_simprune.rba.converter import convert
from hf_simprune.rba.limits import blank_pieces, budget_of, check_reachable
from hf_simprune.rba.maps import AffineMap
from hf_simprune.rba.plan import CompressionPlan, Span

from .conftest import DEPTH, WIDTH, make_model
from .image_sets import PROCESSOR, pictures


TOTAL = Cost(params=1001, macs=500, seconds=0.02)


def compress(*words: str) -> CompressArguments:
    args = COMPRESS_OPTIONS.parse(["model", "--dataset", "data", "--output", "out", *words])
    args.map = args.map or ["fold"]
    return args


@pytest.fixture(scope="module")
def adapter():
    return adapter_for(make_model("vit-classifier"))


@pytest.fixture(scope="module")
def pieces(adapter) -> PieceCosts:
    return blank_pieces(adapter, ImageReader(pictures(1), PROCESSOR))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--remove_blocks", "2"], Budget("blocks", 2)),
        (["--max_cost", "0.5"], Budget("cost", 0.5)),
        (["--max_params", "0.8x"], Budget("params", 201)),  # 200.2 have to go: rounded up
        (["--max_params", "901"], Budget("params", 100)),
        (["--max_flops", "0.5x"], Budget("macs", 250)),
        (["--max_flops", "800"], Budget("macs", 100)),  # a multiply-accumulate is two operations
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_may_remain_becomes_what_has_to_go(option, expected):
    assert budget_of(compress(*option), TOTAL) == expected


@pytest.mark.parametrize(("text", "seconds"), [("0.75x", 0.005), ("12", 0.008)])
def test_latency_is_given_in_milliseconds_or_as_a_share(text, seconds):
    budget = budget_of(compress("--max_latency", text), TOTAL)
    assert budget.kind == "seconds" and budget.value == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--max_params", "2e3"], "1,001 parameters as it is"),
        (["--max_flops", "1000"], "1,000 FLOPs an image as it is"),
        (["--max_latency", "20"], "20 ms an image as it is"),
    ],
)
def test_a_limit_that_the_network_keeps_already_is_refused(option, words):
    with pytest.raises(InputError, match=f"{option[0]} {option[1]}: the network has {words}"):
        budget_of(compress(*option), TOTAL)


def test_pieces_are_those_of_one_image_of_the_models_size(adapter, pieces):
    assert pieces.total.params == sum(parameter.numel() for parameter in adapter.model.parameters())
    assert len(pieces.blocks) == DEPTH and pieces.total.seconds > 0
    half = adapter_for(make_model("vit-classifier").to(torch.bfloat16))
    assert blank_pieces(half, ImageReader(pictures(1), PROCESSOR)).total.macs == pieces.total.macs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--remove_blocks", str(DEPTH)], f"--remove_blocks {DEPTH}: at most {DEPTH - 1} of {DEPTH} blocks"),
        (["--remove_blocks", "5", "--max_span", "2"], "--remove_blocks 5: at most 4 of 6 blocks"),
        (["--remove_blocks", "6", "--granularity", "half"], "--remove_blocks 6: at most 5 of 6 blocks"),
        (["--max_params", "0.01x"], r"--max_params 0.01x: [\d,]+ parameters would have to be saved, but at most"),
        (["--max_flops", "0.01x"], "--max_flops 0.01x: .* multiply-accumulates per image would have to be saved"),
        (["--max_latency", "0.001x"], "--max_latency 0.001x: .* seconds would have to be saved"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_plan_can_meet_is_refused_in_the_words_of_the_command(words, message, adapter, pieces):
    args = compress(*words)
    with pytest.raises(InputError, match=message):
        check_reachable(args, adapter, budget_of(args, pieces.total), pieces)


@pytest.mark.parametrize(
    "words",
    [
        ["--remove_blocks", str(DEPTH - 1)],
        ["--remove_blocks", "2", "--granularity", "half", "--map", "linear"],
        ["--max_params", "0.9x"],
        ["--max_flops", "0.9x", "--granularity", "half"],
        ["--max_cost", "1e-9"],  # what a plan costs, only measuring tells
    ],
    ids=" ".join,
)
def test_what_a_plan_can_meet_passes(words, adapter, pieces):
    args = compress(*words)
    check_reachable(args, adapter, budget_of(args, pieces.total), pieces)


def test_blocks_that_are_maps_already_stand_for_few_macs():
    plan = CompressionPlan(DEPTH, (Span(3, 4, "linear"),))
    linear = AffineMap(torch.eye(WIDTH), torch.zeros(WIDTH))
    adapter = adapter_for(convert(make_model("vit-classifier"), plan, {plan.spans[0]: linear}))
    pieces = blank_pieces(adapter, ImageReader(pictures(1), PROCESSOR))
    args = compress("--remove_blocks", "5", "--granularity", "half")
    with pytest.raises(InputError, match=r"--remove_blocks 5: [\d,]+ multiply-accumulates .* but at most"):
        check_reachable(args, adapter, budget_of(args, pieces.total), pieces)
    args.granularity = "block"
    check_reachable(args, adapter, budget_of(args, pieces.total), pieces)
