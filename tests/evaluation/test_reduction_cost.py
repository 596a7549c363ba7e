"""What each token-reduction method costs, against published shares and PyTorch's operator-level counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_simprune.dino.dual_branch import Branch, DualBranch
from hf_simprune.dino.head import DinoHead
from hf_simprune.evaluation.profile import (
    BackboneSpec,
    HeadSpec,
    backbone_macs,
    head_macs,
    overhead_macs,
    training_step_macs,
)
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import METHODS, BranchReducer, SimPruneReducer, build_reducer


LAYERS = (3, 6, 9)
DEIT_SMALL = BackboneSpec(hidden_size=384, depth=12, intermediate_size=1536, patch_size=16)
TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 80}
KNOWN = [
    ("evit", {"fuse": False}, 0.8, 74.9), ("evit", {"fuse": False}, 0.7, 65.2),
    ("evit", {}, 0.8, 75.6), ("evit", {}, 0.7, 65.9),
    ("tome", {"schedule": "every_layer", "r": 8}, 0.8, 74.3), ("tome", {"schedule": "every_layer", "r": 7}, 0.8, 77.4),
    ("tome", {"schedule": "every_layer", "r": 11}, 0.7, 64.9),
    ("expedit", {"schedule": "published"}, 0.8, 77.0), ("expedit", {"schedule": "published"}, 0.7, 66.0),
    ("simprune", {}, 0.8, 74.9), ("simprune", {}, 0.7, 65.2), ("random", {}, 0.8, 74.9),
    ("patch_slimming", {}, 0.8, 74.9), ("patch_slimming", {}, 0.7, 65.2),
    ("self_slimmed", {}, 0.8, 77.3), ("self_slimmed", {}, 0.7, 68.4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "keep_rate", "percent"), KNOWN)
def test_deit_small_costs_what_is_known_of_every_method(name, options, keep_rate, percent):
    reducer = build_reducer(name, keep_rate, DEIT_SMALL.setting(LAYERS, 6, 224, 96), options)
    share = backbone_macs(DEIT_SMALL, 196, reducer) / backbone_macs(DEIT_SMALL, 196)
    assert 100 * share == pytest.approx(percent, abs=0.1)


def test_a_keep_rate_costs_what_its_reducer_costs():
    for keep_rate in (0.8, 0.7):
        reducer = SimPruneReducer(keep_rate, DEIT_SMALL.setting(LAYERS, 6, 224, 96))
        for cls_only in (False, True):
            expected = backbone_macs(DEIT_SMALL, 196, keep_rate, LAYERS, cls_only)
            assert backbone_macs(DEIT_SMALL, (14, 14), reducer, cls_only=cls_only) == expected
        simple = training_step_macs(DEIT_SMALL, 196, keep_rate, LAYERS, 36, 8)
        assert training_step_macs(DEIT_SMALL, (14, 14), reducer, (), (6, 6), 8) == simple


def test_matching_adds_its_known_share():
    reducer = SimPruneReducer(0.8, DEIT_SMALL.setting(LAYERS, 6, 224))
    step = training_step_macs(DEIT_SMALL, 196, reducer)
    passes = 2 * (3 + 1) * backbone_macs(DEIT_SMALL, 196, reducer)
    assert 100 * step.matching / passes == pytest.approx(0.22, abs=0.01)


def by_hand(spec, patches, blocks):
    """MACs of a forward from four numbers of tokens a block: those with q, k, v and scores; those that meet the
    values; those of the output projection; those of the MLP."""
    width, total = spec.hidden_size, patches * spec.hidden_size * spec.num_channels * spec.patch_size**2
    for seen, mixed, projected, mlp in blocks:
        total += 3 * seen * width**2 + seen**2 * width + mixed**2 * width + projected * width**2
        total += 2 * mlp * width * spec.intermediate_size
    return total


def test_where_in_the_block_tokens_change_decides_what_it_costs():
    spec = BackboneSpec(hidden_size=8, depth=4, intermediate_size=24, patch_size=4)
    setting = spec.setting((1, 2), 2, 16)
    # 16, 8, 4 patches and [CLS]
    site = {
        "middle": [(17,) * 4, (17, 17, 17, 9), (9, 9, 9, 5), (5,) * 4],
        "after": [(17,) * 4, (17,) * 4, (9,) * 4, (5,) * 4],
        "attention": [(17,) * 4, (17, 9, 9, 9), (9, 5, 5, 5), (5,) * 4],
    }
    for name, place in (("tome", "middle"), ("self_slimmed", "after"), ("mctf", "attention")):
        assert METHODS[name].site == place
        assert backbone_macs(spec, 16, build_reducer(name, 0.5, setting)) == by_hand(spec, 16, site[place])
    # 3 x 3 clusters behind block 0 until block 2
    options = {"schedule": "published", "grid": 3, "cluster_after": 0, "restore_after": 2}
    expedit = build_reducer("expedit", 0.5, setting, options)
    assert backbone_macs(spec, 16, expedit) == by_hand(spec, 16, [(17,) * 4, (10,) * 4, (10,) * 4, (17,) * 4])


def counted_macs(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def counting(reducer):
    """Lets a reducer and its maps note the MACs of their own operators, in the list that is returned."""
    counts = []

    def counted(function):
        def run(*args):
            with FlopCounterMode(display=False) as counter:
                found = function(*args)
            counts.append(counter.get_total_flops() // 2)
            if hasattr(found, "groups"):
                for name in ("apply", "restore"):
                    setattr(found, name, counted(getattr(found, name)))
            return found

        return run

    for name in ("decide",) if isinstance(reducer, BranchReducer) else ("pair", "local"):
        setattr(reducer, name, counted(getattr(reducer, name)))
    return counts


CASES = [(name, {}, layers) for name in METHODS for layers in ((1, 2), (1, 3))]
CASES += [
    ("evit", {"fuse": False}, (1, 2)),
    ("tome", {"schedule": "every_layer", "r": 2}, ()),
    ("expedit", {"schedule": "published", "cluster_after": 0, "restore_after": 2}, ()),
]


@pytest.mark.parametrize(("name", "options", "layers"), [case for case in CASES if case[0] != "simprune_dynamic"])
def test_the_networks_share_of_a_training_step_equals_its_operators(name, options, layers):
    """Both branches as they are trained, with local crops, but for what the method itself computes."""
    head, images, crops = HeadSpec(hidden_dim=20, bottleneck_dim=12, out_dim=40), 2, 3
    branches = [
        Branch(build_backbone("vit_micro", image_size=32, patch_size=8, **TINY), DinoHead(32, 40, 20, 12))
        for _ in range(2)
    ]
    for branch in branches:
        branch.backbone.set_attn_implementation("eager")
    spec = BackboneSpec.from_config(branches[0].backbone.config)
    reducer = build_reducer(name, 0.5, spec.setting(layers, 2, 32, 24), options)
    own = counting(reducer)
    dual = DualBranch(*branches, reducer)
    views, local = torch.randn(2 * images, 3, 32, 32), torch.randn(crops * images, 3, 24, 24)
    counted = counted_macs(lambda: dual(views, local, torch.tensor(0.5)))
    step = training_step_macs(spec, 16, reducer, (), 9, crops, head)
    forward = step.student // 3 + step.teacher + (2 + crops + 2) * head_macs(32, head)
    evidence = 0
    if isinstance(reducer, BranchReducer) and reducer.needs == "cls_attention":  # the row of [CLS], once more
        for grid, rows in (((4, 4), 4), ((3, 3), crops)):
            stages = [n for n, layer in zip(reducer.counts(grid), layers, strict=False) if layer < 3]
            evidence += rows * sum((n + 1) * 32 for n in stages)
    assert counted - sum(own) == images * (forward + evidence)


def test_a_methods_own_work_is_counted_in_every_pass_and_thrice_where_it_is_learned():
    spec = BackboneSpec(hidden_size=32, depth=4, intermediate_size=80, patch_size=8)
    setting = spec.setting((1, 3), 2, 32, 24)
    # of MCTF the stage in the last block counts too: CLS depends on it
    for name, passes, stages in (("tome", 1, 1), ("self_slimmed", 3, 1), ("mctf", 1, 2)):
        reducer = build_reducer(name, 0.5, setting)
        view, crop = (
            sum(reducer.overhead_macs(stage, reducer.counts(grid)[stage]) for stage in range(stages))
            for grid in ((4, 4), (3, 3))
        )
        assert view > 0 and overhead_macs(spec, 16, reducer, cls_only=True) == view
        whole = sum(reducer.overhead_macs(stage, reducer.counts((4, 4))[stage]) for stage in range(2))
        assert overhead_macs(spec, 16, reducer) == whole
        step = training_step_macs(spec, 16, reducer, (), 9, 5)
        assert step.matching == passes * (2 * view + 5 * crop) + 2 * view
        assert step.total == step.student + step.teacher + step.heads + step.loss + step.matching


def test_the_gates_of_the_dynamic_variant_are_added_to_its_matching():
    spec = BackboneSpec(hidden_size=32, depth=4, intermediate_size=80, patch_size=8)
    setting = spec.setting((1, 2), 2, 32)
    gates, matching = (
        training_step_macs(spec, 16, build_reducer(name, 0.5, setting)) for name in ("simprune_dynamic", "simprune")
    )
    assert gates.matching - matching.matching == 3 * 2 * (16 + 8) * 32 // 4
    assert gates.student == matching.student and gates.teacher == matching.teacher
