"""Plans that need maps: the converted network computes what its blocks and the fitted maps say, one by one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DeiTForImageClassificationWithTeacher,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)

from hf_simprune.errors import InputError
from hf_simprune.models.vit.maps_simprune_vit import MLPMap, ResMLPMap
from hf_simprune.rba.maps import AffineMap, ConstMap, FittedMaps, LowRankMap, ModuleMap
from hf_simprune.rba.own_conversion import convert_to_own
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from ..models.conftest import DEIT, TINY, VIT, Family, randomise
from ..models.dinov2_family import DINOV2
from ..models.dinov2_family import randomise as randomise_dinov2


WIDTH, DEPTH = TINY["hidden_size"], 9
SETTINGS = {**TINY, "num_hidden_layers": DEPTH}
_SIZES = {key: value for key, value in SETTINGS.items() if key not in ("intermediate_size", "pooler_output_size")}
DINOV2_SETTINGS = {**_SIZES, "mlp_ratio": 2, "drop_path_rate": 0.1}


@pytest.fixture(params=[VIT, DEIT, DINOV2], ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(params=[VIT, DEIT], ids=lambda family: family.name)
def pooled_family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def stock(family: Family, kind: str = "classifier", **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    network = family.stock_classifier if kind == "classifier" else family.stock_model
    if family is DINOV2:
        return randomise_dinov2(network(family.stock_config(**{**DINOV2_SETTINGS, **settings})))
    return randomise(network(family.stock_config(**{**SETTINGS, **settings})))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    backbone = model.base_model
    return backbone.encoder.layer if hasattr(backbone, "encoder") else backbone.layers


def normed(layer: nn.Module, half: str, x: Tensor) -> Tensor:
    names = ("norm1", "norm2") if hasattr(layer, "norm1") else ("layernorm_before", "layernorm_after")
    return getattr(layer, names[half == "mlp"])(x)


def write(layer: nn.Module, half: str, x: Tensor) -> Tensor:
    """What a half that is there adds to the stream, LayerScale included."""
    found = layer.attention(normed(layer, half, x))[0] if half == "attention" else layer.mlp(normed(layer, half, x))
    scale = getattr(layer, "layer_scale2" if half == "mlp" else "layer_scale1", None)
    return found if scale is None else found * scale.lambda1


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    features = model.base_model.layernorm(tokens)
    if hasattr(model.base_model, "encoder"):
        return model.classifier(torch.cat([features[:, 0], features[:, 1:].mean(1)], 1))
    return model.classifier(features[:, 0])


def plan_of(*items: Span | Half, depth: int = DEPTH) -> CompressionPlan:
    spans = tuple(item for item in items if isinstance(item, Span))
    return CompressionPlan(depth, spans, tuple(item for item in items if isinstance(item, Half)))


def random_maps(plan: CompressionPlan) -> FittedMaps:
    torch.manual_seed(5)

    def some(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape)

    maps: FittedMaps = {}
    for item in plan.items:
        match item.map:
            case "linear" | "fold":
                maps[item] = AffineMap(some(WIDTH, WIDTH), some(WIDTH))
            case "low_rank":
                maps[item] = LowRankMap(some(WIDTH, item.rank), some(item.rank, WIDTH), some(WIDTH))
            case "const":
                maps[item] = ConstMap(some(WIDTH))
            case "mlp" | "res_mlp":
                module = (MLPMap if item.map == "mlp" else ResMLPMap)(WIDTH)
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.3)
                maps[item] = ModuleMap(module.eval())
    return maps


def naive_output(model: PreTrainedModel, plan: CompressionPlan, maps: FittedMaps, images: Tensor) -> Tensor:
    """Final tokens, before the last norm: a loop over the untouched model's blocks and the maps as formulas."""
    x = model.base_model.embeddings(images)
    starts = {span.start: span for span in plan.spans}
    folds = {span.start - 1: maps[span] for span in plan.spans if span.map == "fold"}
    block = 0
    while block < plan.depth:
        span, layer = starts.get(block), blocks(model)[block]
        if span is not None:
            if span.map == "linear":
                x = x @ maps[span].weight + maps[span].bias
            elif span.map == "low_rank":
                x = x + (x @ maps[span].down) @ maps[span].up + maps[span].bias
            elif span.map in ("mlp", "res_mlp"):
                x = maps[span].module(x)
            block = span.end
            continue
        for half in ("attention", "mlp"):
            item = next((entry for entry in plan.halves if (entry.block, entry.half) == (block, half)), None)
            if item is not None and item.map == "const":
                x = x + maps[item].bias
            elif item is not None:
                x = x + normed(layer, half, x) @ maps[item].weight + maps[item].bias
            else:
                update = write(layer, half, x)
                folded = half == "mlp" and block in folds
                x = x + (update @ folds[block].weight + folds[block].bias if folded else update)
        block += 1
    return x


EVERYTHING = plan_of(
    Span(1, 2, "fold"),
    Span(3, 5, "linear"),
    Span(6, 7, "identity"),
    Span(8, 9, "low_rank", 4),
    Half(0, "attention", "const"),
    Half(2, "attention", "linear"),
    Half(2, "mlp", "const"),
    Half(7, "mlp", "linear"),
)
PLANS = {
    "everything": EVERYTHING,
    "trained": plan_of(Span(0, 2, "mlp"), Span(3, 4, "res_mlp"), Span(6, 8, "fold")),
    "one half": plan_of(Half(4, "mlp", "linear")),
    "both halves": plan_of(Half(4, "mlp", "const"), Half(4, "attention", "const"), Half(5, "attention", "linear")),
    "fold into a block without attention": plan_of(Span(4, 6, "fold"), Half(3, "attention", "linear")),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_result_computes_what_the_plan_says(family: Family, images: Tensor, name: str):
    model, plan = stock(family), PLANS[name]
    maps = random_maps(plan)
    result = convert_to_own(model, plan, maps)
    assert type(result) is family.classifier and not result.training
    expected = naive_output(model, plan, maps, images)
    hidden = result(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[-1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result(images).logits, logits_of(model, expected), atol=1e-5, rtol=1e-5)


def test_the_configuration_says_what_is_where(family: Family):
    config = convert_to_own(stock(family), EVERYTHING, random_maps(EVERYTHING)).config
    assert config.num_hidden_layers == 6
    assert config.block_maps == {
        "0": {"kind": "block", "attention": "const", "mlp": "full"},
        "1": {"kind": "block", "attention": "linear", "mlp": "const"},
        "2": {"kind": "linear"},
        "4": {"kind": "block", "attention": "full", "mlp": "linear"},
        "5": {"kind": "low_rank", "rank": 4},
    }


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_the_saved_result_comes_back_to_the_bit(family: Family, tmp_path, images: Tensor, kind: str):
    result = convert_to_own(stock(family, kind), EVERYTHING, random_maps(EVERYTHING))
    result.save_pretrained(tmp_path)
    again, info = type(result).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for got, expected in zip(again(images).to_tuple(), result(images).to_tuple(), strict=True):
        assert torch.equal(got, expected)


def test_a_model_with_maps_is_compressed_again(family: Family, images: Tensor):
    first_plan = plan_of(Span(1, 2, "linear"), Span(4, 6, "res_mlp"), Half(7, "attention", "linear"))
    once = convert_to_own(stock(family), first_plan, random_maps(first_plan))
    before = once.base_model(images, output_hidden_states=True).hidden_states
    # What is there now: 0, map, 2, 3, map, 6, 7 without attention, 8.
    again_plan = plan_of(
        Span(3, 4, "fold"), Half(0, "mlp", "const"), Half(6, "mlp", "linear"), Half(7, "attention", "const"), depth=8
    )
    maps = random_maps(again_plan)
    twice = convert_to_own(once, again_plan, maps)
    assert twice.config.block_maps == {
        "0": {"kind": "block", "attention": "full", "mlp": "const"},
        "1": {"kind": "linear"},
        "3": {"kind": "res_mlp"},
        "5": {"kind": "block", "attention": "linear", "mlp": "linear"},
        "6": {"kind": "block", "attention": "const", "mlp": "full"},
    }
    layers = once.base_model.layers
    x = layers[0](before[0], half="attention") + maps[Half(0, "mlp", "const")].bias
    x = layers[2](layers[1](x), half="attention")
    fold = maps[Span(3, 4, "fold")]
    x = x + write(layers[2], "mlp", x) @ fold.weight + fold.bias
    x = layers[6](layers[5](layers[4](x)), half="attention")
    x = x + maps[Half(6, "mlp", "linear")](normed(layers[6], "mlp", x))
    x = layers[7](x + maps[Half(7, "attention", "const")].bias, half="mlp")
    got = twice.base_model(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_a_removed_map_goes_with_its_entry(family: Family, images: Tensor):
    first_plan = plan_of(Span(2, 3, "linear"), Half(6, "mlp", "const"))
    once = convert_to_own(stock(family), first_plan, random_maps(first_plan))
    twice = convert_to_own(once, plan_of(Span(2, 3, "identity"), depth=DEPTH), {})
    assert twice.config.block_maps == {"5": {"kind": "block", "attention": "full", "mlp": "const"}}
    x = once.base_model.embeddings(images)
    for index, layer in enumerate(once.base_model.layers):
        x = x if index == 2 else layer(x)
    assert torch.equal(twice(images, output_hidden_states=True).hidden_states[-1], x)
    assert convert_to_own(twice, plan_of(Span(5, 6, "identity"), depth=8), {}).config.block_maps is None


def test_the_input_stays_as_it_is_and_nothing_is_shared_or_drawn(family: Family, images: Tensor):
    half, plan = PLANS["one half"], plan_of(Span(1, 2, "fold"), Span(6, 8, "linear"), Half(0, "attention", "const"))
    for model in (stock(family), convert_to_own(stock(family), half, random_maps(half))):
        weights, config, output = copy.deepcopy(model.state_dict()), model.config.to_dict(), model(images).logits
        maps = random_maps(plan)
        maps_before = copy.deepcopy(maps)
        state = torch.get_rng_state()
        result = convert_to_own(model, plan, maps)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            for parameter in result.parameters():
                parameter.zero_()
        result.config.id2label[0] = "changed"
        assert model.config.to_dict() == config and torch.equal(model(images).logits, output)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        for item, fitted in maps.items():
            for name, value in vars(fitted).items():
                assert torch.equal(value, vars(maps_before[item])[name]), item


def test_head_labels_pooler_and_precision_survive(family: Family, images: Tensor):
    labels = {0: "cat", 1: "dog", 2: "owl"}
    numbers = {name: key for key, name in labels.items()}
    model = stock(family, id2label=labels, label2id=numbers, layer_norm_eps=1e-3, qkv_bias=False)
    model = model.to(torch.bfloat16)
    model.set_attn_implementation("eager")
    result = convert_to_own(model, EVERYTHING, random_maps(EVERYTHING))
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in result.parameters())
    assert result.config.id2label == labels and result.config.label2id == numbers
    assert result.config.layer_norm_eps == result.base_model.layernorm.eps == 1e-3
    assert result.config._attn_implementation == "eager"
    assert torch.equal(result.classifier.weight, model.classifier.weight)
    assert result(images).logits.dtype == torch.bfloat16


def test_a_pooler_survives(pooled_family: Family, images: Tensor):
    pooled = stock(pooled_family, "model", pooler_act="relu")
    result = convert_to_own(pooled, EVERYTHING, random_maps(EVERYTHING))
    output = result(images)
    assert type(result) is pooled_family.model
    assert torch.equal(output.pooler_output, pooled.pooler(output.last_hidden_state))


def test_a_backbone_without_pooler_gets_one_that_passes_cls_on(pooled_family: Family, tmp_path, images: Tensor):
    bare = stock(pooled_family, "model")
    bare.pooler = None
    convert_to_own(bare, EVERYTHING, random_maps(EVERYTHING)).save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    output = again(images)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_a_bfloat16_fold_is_computed_before_it_is_rounded(family: Family):
    plan = plan_of(Span(3, 4, "fold"), Half(6, "mlp", "linear"))
    model, maps = stock(family).to(torch.bfloat16), random_maps(plan)
    fold = maps[Span(3, 4, "fold")]
    layer = blocks(model)[2]
    result = convert_to_own(model, plan, maps).base_model.layers
    written = layer.mlp.fc2.weight.double()
    if family is DINOV2:
        written = layer.layer_scale2.lambda1.double()[:, None] * written
        assert (result[2].layer_scale2.lambda1 == 1).all()
        assert torch.equal(result[1].layer_scale2.lambda1, blocks(model)[1].layer_scale2.lambda1)
    assert torch.equal(result[2].mlp.fc2.weight, (fold.weight.double().T @ written).bfloat16())
    half = maps[Half(6, "mlp", "linear")]
    assert torch.equal(result[5].mlp.dense.weight, half.weight.T.bfloat16())


def test_results_take_a_copy_of_the_mask_token(family: Family):
    torch.manual_seed(0)
    if family is DINOV2:
        model = stock(family, "model")
    else:
        model = randomise(family.stock_model(family.stock_config(**SETTINGS), use_mask_token=True))
    assert model.embeddings.mask_token.any()
    result = convert_to_own(model, PLANS["one half"], random_maps(PLANS["one half"]))
    assert torch.equal(result.embeddings.mask_token, model.embeddings.mask_token)


def test_without_maps_the_other_families_are_told_what_is_possible():
    plan = plan_of(Span(1, 2, "linear"), depth=3)
    torch.manual_seed(0)
    registers = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=28)
    ).eval()
    teacher = DeiTForImageClassificationWithTeacher(DEIT.stock_config(**TINY)).eval()
    for model in (registers, teacher):
        message = rf"{type(model).__name__} can have the maps fold and identity only; .* SimPruneDeiTForImageClass"
        with pytest.raises(InputError, match=message):
            convert_to_own(model, plan, random_maps(plan))


def test_bad_plans_and_maps_are_one_clear_line(family: Family):
    model = stock(family)
    first = plan_of(Span(2, 3, "linear"), Half(5, "mlp", "linear"))
    once = convert_to_own(model, first, random_maps(first))
    linear = plan_of(Span(2, 3, "linear"))
    cases = [
        (model, plan_of(Span(2, 3, "linear"), depth=8), None, "plan: depth=8, but the model has 9 blocks"),
        (once, plan_of(Half(5, "mlp", "const")), None, "mlp of block 5"),
        (once, plan_of(Half(2, "attention", "const")), None, "attention of block 2"),
        (once, plan_of(Span(3, 4, "fold")), None, "block 2"),
        (once, plan_of(Span(6, 7, "fold")), None, "block 5"),
        (model, linear, {}, r"maps\[linear 2→3\] = NoneType: AffineMap is needed"),
        (model, linear, {linear.spans[0]: ConstMap(torch.zeros(WIDTH))}, "= ConstMap: AffineMap is needed"),
    ]
    for network, plan, maps, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            convert_to_own(network, plan, random_maps(plan) if maps is None else maps)
        assert "\n" not in str(caught.value)


def test_the_result_loads_by_its_auto_class(family: Family, tmp_path):
    plan = PLANS["trained"]
    convert_to_own(stock(family, "model"), plan, random_maps(plan)).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is family.model


def test_a_replaced_half_has_no_layer_scale_and_a_swiglu_takes_a_fold_in(tmp_path, images: Tensor):
    plan = plan_of(Span(3, 5, "fold"), Half(1, "attention", "linear"), Half(6, "mlp", "const"))
    model, maps = stock(DINOV2, use_swiglu_ffn=True, use_mask_token=False), random_maps(plan)
    result = convert_to_own(model, plan, maps)
    torch.testing.assert_close(
        result(images).logits, logits_of(model, naive_output(model, plan, maps, images)), atol=1e-5, rtol=1e-5
    )
    weights = result.dinov2.encoder.layer.state_dict()
    for block, half, stays in ((1, 1, False), (1, 2, True), (4, 1, True), (4, 2, False)):
        assert (f"{block}.layer_scale{half}.lambda1" in weights) == stays
    assert result.config.drop_path_rate == 0.1 and "out_features" not in result.config.to_dict()
    result.save_pretrained(tmp_path)
    again = DINOV2.classifier.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, result(images).logits)
