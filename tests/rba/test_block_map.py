"""The picture of a plan in plain text."""

from hf_simprune.rba.block_map import block_map
from hf_simprune.rba.plan import CompressionPlan, Half, Span


def rows(plan):
    """Numbers and signs of the blocks, and the legend's signs."""
    blocks, _, legend = block_map(plan).rpartition("\n\n")
    lines = [line for line in blocks.splitlines() if line]
    numbers = [int(word) for line in lines[::2] for word in line.split()[1:]]
    signs = [word for line in lines[1::2] for word in line.split()]
    return numbers, "".join(signs), {line[0]: line[2:] for line in legend.splitlines()}


def test_folds_maps_and_plain_removals_look_different():
    plan = CompressionPlan(12, (Span(2, 3), Span(5, 7, "linear"), Span(9, 11, "identity")))
    numbers, signs, legend = rows(plan)
    assert numbers == list(range(12))
    assert signs == "■◧□■■▣□■■□□■"
    assert set(legend) == set("■◧□▣") and legend["■"] == "kept" and "fold" in legend["◧"]


def test_signs_stand_under_their_numbers():
    lines = block_map(CompressionPlan(12, (Span(10, 11),))).splitlines()
    assert lines[0].index("10") + 1 == lines[1].index("□")


def test_halves_are_named_and_a_block_may_hold_a_fold_too():
    halves = (Half(1, "attention", "linear"), Half(2, "mlp", "const"), Half(3, "mlp", "const"))
    halves += (Half(3, "attention", "const"), Half(4, "attention", "const"))
    _, signs, legend = rows(CompressionPlan(7, (Span(5, 6),), halves))
    assert signs == "■AMBa□■"
    assert "attention replaced" in legend["a"] and "fold" not in legend["A"]


def test_every_removed_block_is_shown_in_deep_networks():
    plan = CompressionPlan(50, (Span(20, 26, "identity"), Span(40, 41, "identity")))
    numbers, signs, _ = rows(plan)
    assert numbers == list(range(50))
    assert [i for i, sign in enumerate(signs) if sign == "□"] == list(plan.removed_blocks)
    assert max(map(len, block_map(plan).splitlines())) < 90
