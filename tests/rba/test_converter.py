"""The class of the result: stock wherever no map is left in it."""

import pytest
import torch
from transformers import ViTForImageClassification

from hf_simprune.models import SimPruneViTForImageClassification
from hf_simprune.rba.converter import can_hold_maps, convert
from hf_simprune.rba.maps import AffineMap, ConstMap, FittedMaps
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from .conftest import DEPTH, IMAGE_SIZE, WIDTH, make_model


def some_map() -> AffineMap:
    return AffineMap(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH), torch.randn(WIDTH))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (CompressionPlan(DEPTH, (Span(3, 4, "linear"),)), CompressionPlan(DEPTH, (Span(3, 4, "identity"),))),
        (
            CompressionPlan(DEPTH, (), (Half(3, "attention", "const"),)),
            CompressionPlan(DEPTH, (Span(3, 5, "fold"),)),
        ),
    ],
    ids=["linear map", "constant half"],
)
def test_a_network_whose_maps_are_all_removed_is_a_stock_network_again(first, second):
    torch.manual_seed(0)
    fitted: FittedMaps = {
        item: ConstMap(torch.randn(WIDTH)) if item.map == "const" else some_map() for item in first.items
    }
    own = convert(make_model("vit-classifier"), first, fitted)
    assert type(own) is SimPruneViTForImageClassification
    # with a map still in place it stays what it is
    maps = {item: some_map() for item in second.items if item.map == "fold"}
    assert type(convert(own, CompressionPlan(DEPTH), {})) is SimPruneViTForImageClassification
    stock = convert(own, second, maps)
    assert type(stock) is ViTForImageClassification and stock.config.model_type == "vit"
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    direct = convert(make_model("vit-classifier"), second, maps)
    with torch.no_grad():
        torch.testing.assert_close(stock(images).logits, direct(images).logits)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vit", True),
        ("deit-own-classifier", True),
        ("deit-teacher", False),
        ("dinov2", True),
        ("dinov2-own-classifier", True),
        ("dinov2_with_registers", False),
        ("clip", False),
    ],
)
def test_which_networks_can_hold_maps(kind, expected):
    assert can_hold_maps(make_model(kind)) is expected
