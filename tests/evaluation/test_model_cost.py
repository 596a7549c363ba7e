"""Parameters, MACs and seconds of networks and of their pieces."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from hf_simprune.errors import InputError
from hf_simprune.evaluation.model_cost import file_size, gains, macs, parameters, piece_costs
from hf_simprune.evaluation.profile import BackboneSpec, backbone_macs
from hf_simprune.models import SimPruneViTConfig, SimPruneViTModel
from hf_simprune.models.vit.maps_simprune_vit import LowRankMap, MLPMap, ResMLPMap
from hf_simprune.rba.adapters import adapter_for, module_forward
from hf_simprune.rba.plan import Half, Span

from ..elsewhere import run


WIDTH, DEPTH, HIDDEN, TOKENS = 24, 4, 40, 17
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
NORM = 2 * WIDTH
ATTENTION = NORM + 4 * WIDTH * (WIDTH + 1)
MLP = NORM + WIDTH * HIDDEN + HIDDEN + HIDDEN * WIDTH + WIDTH
ATTENTION_MACS = 4 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH
MLP_MACS = 2 * TOKENS * WIDTH * HIDDEN


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=HIDDEN, num_labels=7)).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pieces(classifier, pixels):
    return piece_costs(adapter_for(classifier), pixels, rounds=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_counted_macs_are_those_of_the_formula(pixels, attention):
    model = ViTModel(ViTConfig(**SIZES, intermediate_size=HIDDEN), add_pooling_layer=False)
    model.set_attn_implementation(attention)
    spec = BackboneSpec.from_config(model.config)
    assert macs(model, pixels) == backbone_macs(spec, spec.num_patches(32))


def test_total_counts_the_whole_network(classifier, pixels, pieces):
    assert parameters(classifier) == sum(tensor.numel() for tensor in classifier.state_dict().values())
    assert pieces.total.params == parameters(classifier)
    assert pieces.total.macs == macs(classifier, pixels)
    assert pieces.total.seconds > 0


def test_shared_parameters_count_once():
    layer = torch.nn.Linear(3, 5)
    assert parameters(torch.nn.Sequential(layer, torch.nn.ReLU(), layer)) == 20


def test_blocks_and_halves_hold_what_the_layout_says(classifier, pieces):
    assert [block.params for block in pieces.blocks] == [ATTENTION + MLP] * DEPTH
    assert [block.macs for block in pieces.blocks] == [ATTENTION_MACS + MLP_MACS] * DEPTH
    for block in range(DEPTH):
        attention, mlp = pieces.halves[block, "attention"], pieces.halves[block, "mlp"]
        assert (attention.norm.params, attention.whole.params) == (NORM, ATTENTION)
        assert (mlp.norm.params, mlp.whole.params) == (NORM, MLP)
        assert (attention.whole.macs, mlp.whole.macs) == (ATTENTION_MACS, MLP_MACS)
    rest = pieces.total.params - sum(block.params for block in pieces.blocks)
    outside = [p for name, p in classifier.named_parameters() if ".layers." not in name]
    assert rest == sum(p.numel() for p in outside)


def test_equal_pieces_share_one_time(pieces):
    assert len({block.seconds for block in pieces.blocks}) == 1
    assert len({pieces.halves[block, "mlp"].whole.seconds for block in range(DEPTH)}) == 1
    assert 0 < pieces.blocks[0].seconds < pieces.total.seconds


def test_gains_of_spans(pieces):
    block_params, block_macs = ATTENTION + MLP, ATTENTION_MACS + MLP_MACS
    fold = gains(Span(1, 3), pieces)
    assert (fold.blocks, fold.params, fold.macs) == (2, 2 * block_params, 2 * block_macs)
    assert fold.seconds == pytest.approx(2 * pieces.blocks[0].seconds)
    assert gains(Span(1, 3, "identity"), pieces) == fold
    linear = gains(Span(1, 2, "linear"), pieces)
    assert linear.params == block_params - WIDTH * (WIDTH + 1)
    assert linear.macs == block_macs - TOKENS * WIDTH**2
    low_rank = gains(Span(1, 2, "low_rank", 5), pieces)
    assert low_rank.params == block_params - sum(p.numel() for p in LowRankMap(WIDTH, 5).parameters())
    assert low_rank.macs == block_macs - 2 * TOKENS * WIDTH * 5


@pytest.mark.parametrize(("kind", "module"), [("mlp", MLPMap), ("res_mlp", ResMLPMap)])
def test_gains_of_trained_maps(pieces, kind, module):
    saved = gains(Span(1, 2, kind), pieces)
    assert saved.params == ATTENTION + MLP - parameters(module(WIDTH))
    assert saved.macs == ATTENTION_MACS + MLP_MACS - macs(module(WIDTH), torch.randn(1, TOKENS, WIDTH))


def test_gains_of_halves(pieces):
    linear, const = gains(Half(1, "mlp", "linear"), pieces), gains(Half(1, "attention", "const"), pieces)
    assert (linear.blocks, const.blocks) == (0, 0)
    assert linear.params == MLP - NORM - WIDTH * (WIDTH + 1)
    assert linear.macs == MLP_MACS - TOKENS * WIDTH**2
    assert (const.params, const.macs) == (ATTENTION - WIDTH, ATTENTION_MACS)
    # both halves of a block go for no less than the block
    both = gains(Half(1, "mlp", "const"), pieces).macs + const.macs
    assert both == gains(Span(1, 2), pieces).macs


def test_gains_of_what_is_not_there_are_refused(pieces):
    with pytest.raises(InputError, match="span 3-5: the network has 4 blocks"):
        gains(Span(3, 5), pieces)
    with pytest.raises(InputError, match="half 4 mlp"):
        gains(Half(4, "mlp", "const"), pieces)


def test_layer_scale_belongs_to_the_half_it_scales(pixels):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)).eval()
    pieces = piece_costs(adapter_for(model), pixels, rounds=1)
    block = sum(p.numel() for p in model.encoder.layer[0].parameters())
    assert pieces.blocks[0].params == block
    halves = pieces.halves[0, "attention"].whole.params + pieces.halves[0, "mlp"].whole.params
    assert halves == block


def test_half_precision_networks_can_be_measured(classifier, pixels):
    model = ViTForImageClassification(classifier.config).eval().to(torch.bfloat16)
    assert piece_costs(adapter_for(model), pixels.bfloat16(), rounds=1).total.params == parameters(classifier)


def test_file_size_is_that_of_the_weights(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"0" * 10_000_000)
    assert file_size(tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    assert 4 * parameters(classifier) <= file_size(tmp_path) < 4 * parameters(classifier) + 20_000


def test_evaluation_does_not_import_what_builds_on_it(tmp_path):
    modules = ["latency", "model_cost", "classification", "linear_probe", "segmentation"]
    imports = "".join(f"import hf_simprune.evaluation.{name}\n" for name in modules)
    code = f"import sys\n{imports}print([name for name in sys.modules if name.startswith('hf_simprune.rba')])"
    found = run(["-c", code], tmp_path, package=True)
    assert found.stdout.strip() == "[]", found.stderr


def test_constant_halves_can_be_counted(pixels):
    maps = {"1": {"kind": "block", "attention": "const", "mlp": "full"}}
    torch.manual_seed(0)
    replaced = SimPruneViTModel(SimPruneViTConfig(**SIZES, intermediate_size=HIDDEN, block_maps=maps)).eval()
    plain = ViTModel(ViTConfig(**SIZES, intermediate_size=HIDDEN)).eval()
    adapter = adapter_for(replaced)
    counted = macs(lambda x: module_forward(adapter, x), pixels)
    assert counted == macs(lambda x: module_forward(adapter_for(plain), x), pixels) - ATTENTION_MACS
    assert piece_costs(adapter, pixels, rounds=1).total.macs == counted
    assert all(parameter.requires_grad for parameter in replaced.parameters())
