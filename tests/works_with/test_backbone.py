"""Dense features of compressed models: one vector a patch, in the place of the patch."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

from hf_simprune.models import SimPruneDinov2Model
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from ..rba.tiny_compression import DEPTH, dinov2
from .conftest import REDUCTION, WIDTH, Page, compress, reduced


ROWS = COLUMNS = PATCH = 4


def most_changed(dense: Callable[[Tensor], Tensor], pixels: Tensor, row: int, column: int) -> tuple[int, int]:
    """The cell of the feature map (B, D, rows, columns) that changes most when one patch of the first image does."""
    changed = pixels.clone()
    changed[0, :, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] += 5.0
    change = (dense(changed) - dense(pixels)).norm(dim=1)
    assert not change[1:].any()
    return divmod(change[0].argmax().item(), COLUMNS)


@torch.no_grad()
def test_the_feature_map_has_every_patch_in_its_place(page: Page):
    def dense(pixels: Tensor) -> Tensor:
        page.names["pixels"] = pixels
        return page.run("Dense features")["feature_map"]

    assert dense(page.pixels).shape == (2, WIDTH, ROWS, COLUMNS)
    for place in ((0, 0), (1, 2), (2, 1), (3, 3)):
        assert most_changed(dense, page.pixels, *place) == place


@torch.no_grad()
def test_a_dinov2_with_maps_gives_a_feature_map_and_a_reduced_one_as_many_cells(others: Tensor):
    plan = CompressionPlan(DEPTH, (Span(2, 4, "linear"),), (Half(4, "attention", "const"),))
    model = compress(plan, dinov2())
    assert type(model) is SimPruneDinov2Model

    def dense(pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (ROWS, COLUMNS))

    for place in ((0, 3), (2, 1)):
        assert most_changed(dense, others, *place) == place
    fewer = reduced(model, **{**REDUCTION, "restore_tokens": False})(others).last_hidden_state
    model = reduced(model, **REDUCTION)
    assert fewer.shape[1] == 1 + 12  # ceil(0.7 * 16)
    distances = torch.cdist(dense(others).flatten(2).transpose(1, 2), fewer[:, 1:])
    assert (distances.amin(2) < 1e-4).all() and (distances.amin(1) < 1e-4).all()  # the same vectors, some repeated


@torch.no_grad()
def test_a_folded_dinov2_is_a_backbone_of_feature_maps(open_page: Callable[[str], Page]):
    page = open_page("stock")
    folder = Path("outputs/smaller-dinov2")
    compress(CompressionPlan(DEPTH, (Span(3, 5, "fold"),)), dinov2()).save_pretrained(folder)
    maps = page.run("Backbone")["maps"]
    model = AutoModel.from_pretrained(folder).eval()
    states = model(page.pixels, output_hidden_states=True).hidden_states
    assert len(states) == 5 and len(maps) == 2
    for found, state in zip(maps, (states[1], states[3]), strict=True):
        normed = nn.functional.layer_norm(state, (WIDTH,), model.layernorm.weight, model.layernorm.bias, 1e-6)
        expected = torch.stack([normed[:, 1 + COLUMNS * row : 1 + COLUMNS * (row + 1)] for row in range(ROWS)], 1)
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2))
