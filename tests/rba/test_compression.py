"""One call that compresses: the same as its steps, in the words of the command line."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_simprune import CompressionPlan, analyze, compress, convert, plan
from hf_simprune.errors import InputError
from hf_simprune.rba.budget import Budget
from hf_simprune.rba.calibration import calibration_set
from hf_simprune.rba.limits import blank_pieces
from hf_simprune.rba.search import choose

from .image_sets import PROCESSOR, pictures
from .tiny_compression import DEPTH, save_checkpoint


IMAGES = pictures(18)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("vit") / "vit")
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def analysis(network):
    images = calibration_set(IMAGES, PROCESSOR)
    return analyze(network, images, kinds=("fold",), max_span=2, progress=False)


def test_it_does_what_its_steps_do(network, analysis, tmp_path):
    found = compress(network, IMAGES, remove_blocks=1, max_span=2, processor=PROCESSOR, progress=False)
    choice = choose(analysis, Budget("blocks", 1), kinds=("fold",))
    assert found.plan == choice.plan and isinstance(found.plan, CompressionPlan) and len(found.plan.spans) == 1
    expected = convert(network, choice.plan, choice.maps)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found.model(pixels).logits, expected(pixels).logits)
    assert network.config.num_hidden_layers == DEPTH  # as it was
    found.save(tmp_path / "small")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, found.model(pixels).logits)


def test_a_name_brings_its_processor_and_own_maps_their_code(network, tmp_path):
    folder = network.name_or_path
    options = {"max_span": 1, "kinds": ["linear"], "progress": False, "refit": True, "heal_steps": 1}
    found = compress(folder, IMAGES, max_params="0.95x", **options)
    assert found.processor.image_std == PROCESSOR.image_std and len(found.heal_losses) == 1
    assert {span.map for span in found.plan.spans} == {"linear"}
    found.save(tmp_path)
    assert (tmp_path / "modeling_simprune_vit.py").is_file() and (tmp_path / "preprocessor_config.json").is_file()


def test_plan_takes_budgets_in_plain_words(network, analysis):
    pieces = blank_pieces(analysis.adapter, analysis.images.reader)
    by_blocks = plan(analysis, remove_blocks=2)
    assert by_blocks.plan == choose(analysis, Budget("blocks", 2), pieces=pieces).plan
    for limit in ("0.8x", 0.8 * 2 * pieces.total.macs, f"{0.8 * 2 * pieces.total.macs}"):
        assert plan(analysis, max_flops=limit, pieces=pieces).measured.macs >= 0.2 * pieces.total.macs
    assert plan(analysis, max_cost=1e9, pieces=pieces).measured.blocks >= by_blocks.measured.blocks
    contiguous = plan(analysis, remove_blocks=2, strategy="br-contiguous", pieces=pieces).plan
    assert len(contiguous.spans) == 1 and contiguous.spans[0].length == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget: give exactly one of --remove_blocks"),
        ({"remove_blocks": 1, "max_cost": 1.0}, "--remove_blocks and --max_cost exclude each other"),
        ({"remove_blocks": DEPTH}, f"--remove_blocks {DEPTH}: at most"),
        ({"max_flops": "2x"}, "--max_flops 2x: a share must be below 1x"),
        ({"remove_blocks": 1, "kinds": ["spline"]}, "--map spline is unknown"),
        ({"remove_blocks": 1, "granularity": "quarter"}, "--granularity quarter is unknown"),
    ],
)
def test_mistakes_are_found_before_images_are_read(network, monkeypatch, options, message):
    monkeypatch.setattr("hf_simprune.rba.compression.analyze", lambda *_, **__: pytest.fail("it was analysed"))
    with pytest.raises(InputError) as caught:
        compress(network, IMAGES, processor=PROCESSOR, progress=False, **options)
    assert message in str(caught.value) and "--plan" not in str(caught.value)
