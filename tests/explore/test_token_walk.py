"""Which patches are shown as dropped: those that the training module itself drops."""

import numpy as np
import pytest
import torch

from hf_simprune.dino.dual_branch import Branch, DualBranch
from hf_simprune.dino.snapshots import follow_tokens, stage_dropped
from hf_simprune.errors import InputError
from hf_simprune.explore.token_walk import TokenWalk, draw_views, grid_of, reduction_layers
from hf_simprune.models import SimPruneDeiTConfig, SimPruneDeiTModel, SimPruneViTModel
from hf_simprune.rba.adapters import adapter_for
from hf_simprune.reduction import ReductionSetting, SimPruneReducer

from ..rba.conftest import make_model
from ..rba.tiny_compression import SIZES
from .conftest import picture


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@pytest.fixture(scope="module")
def views() -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(picture(3)).copy())
    return draw_views(pixels, 16, MEAN, STD, seed=5)[0]


def trained_drops(backbone, views, layers, progress, matching) -> torch.Tensor:
    """(2, stages, patches) of `DualBranch`: student on view 1, teacher on view 2, after every stage."""
    setting = ReductionSetting(layers=layers, depth=len(backbone.layers), hidden_size=16, num_heads=2)
    reducer = SimPruneReducer(0.7, setting, matching=matching)
    dual = DualBranch(*(Branch(backbone, torch.nn.Identity()) for _ in range(2)), reducer).eval()
    with torch.no_grad():
        maps = dual(views, None, torch.tensor(progress)).maps
    student, teacher = (follow_tokens([stage[branch].groups() for stage in maps]) for branch in (0, 1))
    followed = torch.stack([student[0], teacher[1]])
    return torch.stack([stage_dropped(followed[:, : stage + 1]) for stage in range(len(layers))], dim=1)


@pytest.mark.parametrize("matching", ["one_way", "symmetric"])
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_the_patches_shown_as_dropped_are_those_that_training_drops(family, matching, checkpoint, views):
    if family == "vit":
        model = checkpoint.model
        backbone = SimPruneViTModel.from_pretrained(checkpoint.model.name_or_path, add_pooling_layer=False)
    else:
        torch.manual_seed(1)
        model = backbone = SimPruneDeiTModel(SimPruneDeiTConfig(**SIZES, initializer_range=0.3)).eval()
    walk = TokenWalk(adapter_for(model.eval()), views)
    seen = set()
    for progress in (0.0, 0.5, 1.0):
        found = walk.dropped(progress, 0.7, matching)
        expected = trained_drops(backbone.eval(), views, walk.layers, progress, matching)
        assert torch.equal(torch.from_numpy(found.grids).flatten(2), expected)
        seen.add(found.grids.tobytes())
    assert len(seen) > 1, "the curriculum changes nothing, so this compares nothing"


def test_each_stage_keeps_the_share_that_is_left_and_no_patch_comes_back(checkpoint, views):
    found = TokenWalk(adapter_for(checkpoint.model), views).dropped(0.3, 0.7)
    assert found.layers == (1, 3, 4)
    assert [[found.kept(view, stage) for stage in range(3)] for view in (0, 1)] == [[12, 9, 7]] * 2
    for earlier, later in zip(found.grids[0], found.grids[0, 1:]):
        assert (later[earlier > 0] == earlier[earlier > 0]).all()
    assert (TokenWalk(adapter_for(checkpoint.model), views).dropped(0.3, 1.0).grids == 0).all()


def test_views_depend_on_the_seed_alone_and_are_shown_without_the_normalisation():
    pixels = torch.from_numpy(np.asarray(picture(3)).copy())
    crops, shown = draw_views(pixels, 16, MEAN, STD, seed=1)
    again, _ = draw_views(pixels, 16, MEAN, STD, seed=1)
    other, _ = draw_views(pixels, 16, MEAN, STD, seed=2)
    assert torch.equal(crops, again) and not torch.equal(crops, other)
    assert crops.shape == (2, 3, 16, 16) and not torch.equal(crops[0], crops[1])
    red = torch.from_numpy(shown[0, ..., 0])
    torch.testing.assert_close((red - MEAN[0]) / STD[0], crops[0, 0])


def test_families_that_need_the_place_of_every_token_are_refused_in_one_line():
    with pytest.raises(InputError, match="dinov3_vit") as error:
        TokenWalk(adapter_for(make_model("dinov3_vit")), torch.zeros(2, 3, 32, 32))
    assert "\n" not in str(error.value)


def test_no_token_leaves_in_a_block_that_is_a_map(checkpoint):
    adapter = adapter_for(checkpoint.model)
    adapter.is_block = lambda block: block != 3
    assert reduction_layers(adapter) == (1, 4)
    adapter.is_block = lambda block: False
    with pytest.raises(InputError, match="a map stands"):
        reduction_layers(adapter)


@pytest.mark.parametrize(("patches", "size", "grid"), [(196, (224, 224), (14, 14)), (18, (48, 96), (3, 6))])
def test_patches_are_laid_out_as_the_image_is(patches, size, grid):
    assert grid_of(patches, size) == grid
