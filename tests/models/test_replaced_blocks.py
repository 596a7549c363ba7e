"""Maps in the place of blocks and halves: what they compute, and that a folder of them loads or raises."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageClassification

from hf_simprune.errors import InputError
from hf_simprune.models.stock import to_stock

from ..dino.make_arguments import make_arguments
from .conftest import TINY, Family, randomise


WIDTH = TINY["hidden_size"]
EVERY_MAP = {
    "0": {"kind": "block", "attention": "linear", "mlp": "full"},
    "1": {"kind": "linear"},
    "2": {"kind": "low_rank", "rank": 5},
    "3": {"kind": "block", "attention": "const", "mlp": "linear"},
    "4": {"kind": "mlp"},
    "5": {"kind": "block", "attention": "full", "mlp": "const"},
    "6": {"kind": "res_mlp"},
}


def build(family: Family, block_maps: dict | None = None, kind: str = "model", **settings):
    """A random network of 8 blocks, the last of which is whole."""
    torch.manual_seed(0)
    values = {**TINY, "num_hidden_layers": 8, "block_maps": EVERY_MAP if block_maps is None else block_maps}
    config = family.config(**{**values, **settings})
    return randomise(
        family.classifier(config) if kind == "classifier" else family.model(config, add_pooling_layer=False)
    )


def naive_block(w: dict[str, Tensor], x: Tensor, spec: dict | None) -> Tensor:
    """A block from its weights by name, written out with products only."""

    def affine(name: str, tokens: Tensor) -> Tensor:
        return tokens @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.tensor(0.0))

    def norm(name: str, tokens: Tensor, eps: float) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def attention(tokens: Tensor) -> Tensor:
        heads = [affine(f"attention.{part}_proj", tokens).chunk(3, -1) for part in "qkv"]
        mixed = [torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v for q, k, v in zip(*heads, strict=True)]
        return affine("attention.o_proj", torch.cat(mixed, -1))

    def half(name: str, norm_name: str, full, tokens: Tensor) -> Tensor:
        kind = "full" if spec is None else spec[name]
        if kind == "const":
            return tokens + w[f"{name}.bias"]
        normed = norm(norm_name, tokens, 1e-6)
        return tokens + (full(normed) if kind == "full" else affine(f"{name}.dense", normed))

    gelu, silu = nn.functional.gelu, nn.functional.silu
    match "block" if spec is None else spec["kind"]:
        case "linear":
            return affine("map.dense", x)
        case "low_rank":
            return x + affine("map.up", affine("map.down", x))
        case "mlp":
            return affine("map.fc2", gelu(affine("map.fc1", x)))
        case "res_mlp":
            update = affine("map.fc2", silu(affine("map.fc1", norm("map.norm_before", x, 1e-5))))
            return norm("map.norm_after", x + update, 1e-5)
    x = half("attention", "layernorm_before", attention, x)
    return half("mlp", "layernorm_after", lambda tokens: affine("mlp.fc2", gelu(affine("mlp.fc1", tokens))), x)


def test_every_map_computes_what_it_says(family: Family, images: Tensor):
    model = build(family).double()
    tokens = model.embed(images)
    recorded = model(images, output_hidden_states=True).hidden_states
    assert len(recorded) == model.config.num_hidden_layers + 1 == 9
    torch.testing.assert_close(recorded[0], tokens)
    for index, layer in enumerate(model.layers):
        tokens = naive_block(dict(layer.state_dict()), tokens, EVERY_MAP.get(str(index)))
        torch.testing.assert_close(recorded[index + 1], tokens, msg=f"block {index}")
    torch.testing.assert_close(model(images).last_hidden_state, model.layernorm(tokens))


def test_a_replaced_half_costs_no_more_than_its_map(family: Family):
    """Width x width multiplications a token for a linear half, and weights for nothing that is not computed."""
    block = {"kind": "block", "attention": "full", "mlp": "full"}
    tokens = torch.randn(1, 17, WIDTH)
    expected_parameters = {"linear": WIDTH**2 + WIDTH, "const": WIDTH}
    for half, norm in (("attention", "layernorm_before"), ("mlp", "layernorm_after")):
        for kind, flops in (("linear", 2 * 17 * WIDTH**2), ("const", 0)):
            layer = build(family, {"0": {**block, half: kind}}).layers[0]
            with FlopCounterMode(display=False) as counter:
                layer(tokens, half=half)
            assert counter.get_total_flops() == flops, (half, kind)
            found = sum(p.numel() for name, p in layer.named_parameters() if name.startswith(f"{half}."))
            assert found == expected_parameters[kind], (half, kind)
            assert isinstance(getattr(layer, norm), nn.Identity) == (kind == "const")


@pytest.mark.parametrize("training", [False, True])
def test_halves_of_a_block_with_maps_compose_to_it(family: Family, training: bool):
    model = build(family, drop_path_rate=0.5).train(training)
    tokens = torch.randn(6, 17, WIDTH)
    for index in (0, 3, 5):
        layer = model.layers[index]
        torch.manual_seed(3)
        whole = layer(tokens)
        torch.manual_seed(3)
        assert torch.equal(layer(layer(tokens, half="attention"), half="mlp"), whole)
        torch.manual_seed(3)
        all_tokens = layer(tokens, half="attention")
        torch.manual_seed(3)
        torch.testing.assert_close(layer(tokens, half="attention", num_queries=2), all_tokens[:, :2])


def test_stochastic_depth_skips_a_replaced_half_for_whole_samples(family: Family):
    layer = build(family, drop_path_rate=0.5).train().layers[3]
    tokens = torch.randn(8, 5, WIDTH)
    torch.manual_seed(4)
    change = layer(tokens, half="mlp") - tokens
    torch.manual_seed(4)
    scale = torch.floor(1 - layer.drop_path_rate + torch.rand(8, 1, 1)) / (1 - layer.drop_path_rate)
    assert 0 < scale.count_nonzero() < 8
    torch.testing.assert_close(change, scale * (layer.eval()(tokens, half="mlp") - tokens))


def test_a_map_has_no_halves(family: Family):
    layer = build(family).layers[1]
    for arguments in ({"half": "attention"}, {"half": "mlp"}, {"num_queries": 1}):
        with pytest.raises(ValueError, match="a replaced block has no halves"):
            layer(torch.randn(1, 2, WIDTH), **arguments)


def test_attention_weights_are_recorded_where_attention_is_left(family: Family, images: Tensor):
    model = build(family)
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2  # of blocks 5 and 7
    whole = model.layers[7]
    expected = whole.attention(whole.layernorm_before(output.hidden_states[7]))[1]
    assert torch.equal(output.attentions[1], expected)


def test_new_maps_start_as_dinos_layers_do(family: Family):
    torch.manual_seed(0)
    model = family.model(family.config(**{**TINY, "num_hidden_layers": 8}, block_maps=EVERY_MAP))
    for name, parameter in model.layers.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family: Family, images: Tensor, use_reentrant: bool):
    plain = build(family, kind="classifier", drop_path_rate=0.3).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    checkpointed.base_model.layers[6].map.fc1.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(8)
        model(images).logits.square().sum().backward()
    assert len(runs) == 2  # run again in the backward pass
    for (name, got), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert expected.grad is not None and expected.grad.isfinite().all()
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_the_network_compiles_as_one_graph_and_block_by_block(family: Family, images: Tensor):
    torch._dynamo.reset()
    model = build(family)
    expected = model(images).last_hidden_state
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(images).last_hidden_state, expected)
    torch._dynamo.reset()
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    teacher = copy.deepcopy(model)
    torch.testing.assert_close(model(images).last_hidden_state, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(teacher(images).last_hidden_state, expected)
    torch._dynamo.reset()


def test_the_forward_can_be_exported(family: Family, images: Tensor):
    model = build(family, kind="classifier")
    exported = torch.export.export(model, (images,)).module()
    other = torch.randn_like(images)
    torch.testing.assert_close(exported(other).logits, model(other).logits)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_a_saved_folder_comes_back_to_the_bit(
    family: Family, tmp_path, images: Tensor, kind: str, precision: torch.dtype
):
    model = build(family, kind=kind, num_labels=5).to(precision)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_maps"] == EVERY_MAP
    auto, arguments = (
        (AutoModel, {"add_pooling_layer": False}) if kind == "model" else (AutoModelForImageClassification, {})
    )
    for load in (auto.from_pretrained, type(model).from_pretrained):
        again, info = load(tmp_path, output_loading_info=True, **arguments)
        assert type(again) is type(model) and not any(info.values()) and again.dtype == precision
        assert again.config.block_maps == EVERY_MAP
        for got, expected in zip(again(images).to_tuple(), model(images).to_tuple(), strict=True):
            assert torch.equal(got, expected)
        assert again.state_dict().keys() == model.state_dict().keys()


def test_blocks_go_to_the_devices_whole(family: Family, tmp_path, images: Tensor):
    model = build(family)
    model.save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "layernorm": "cpu", **{f"layers.{index}": "cpu" for index in range(8)}}
    places["layers.1"] = places["layers.3"] = "disk"
    again = family.model.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off", add_pooling_layer=False
    )
    assert torch.equal(again(images).last_hidden_state, model(images).last_hidden_state)
    kinds = {type(layer).__name__ for layer in model.layers}
    assert len(kinds) == 2 and kinds <= set(model._no_split_modules)


def rewrite(folder: Path, change) -> None:
    """The weights of a saved folder after `change` of the dictionary of them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.dense.weight",
        "layers.1.map.dense.bias",
        "layers.2.map.down.weight",
        "layers.3.attention.bias",
        "layers.4.map.fc1.weight",
        "layers.5.mlp.bias",
        "layers.6.map.norm_after.weight",
    ],
)
def test_a_missing_renamed_or_reshaped_weight_is_an_error(family: Family, tmp_path, name: str):
    build(family).save_pretrained(tmp_path)
    original = (tmp_path / "model.safetensors").read_bytes()

    def load(**arguments) -> None:
        AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, **arguments)

    rewrite(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=rf"weights missing in .*: {name}$"):
        load()
    (tmp_path / "model.safetensors").write_bytes(original)
    rewrite(tmp_path, lambda weights: weights.update({f"{name}_2": weights[name].clone()}))
    with pytest.raises(ValueError, match=rf"weights left out in .*: {name}_2$"):
        load()
    (tmp_path / "model.safetensors").write_bytes(original)
    rewrite(tmp_path, lambda weights: weights.update({name: torch.cat([weights[name], weights[name]])}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load()
    with pytest.raises(ValueError, match=rf"weights of another size in .*: {name}$"):
        load(ignore_mismatched_sizes=True)


@pytest.mark.parametrize("left", [0, 7, 500, -1])
def test_a_truncated_file_is_an_error(family: Family, tmp_path, left: int):
    build(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(Exception, match="(?i)header|buffer|file|deserializ"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("1", None),  # a whole block where the file holds a map
        ("7", {"kind": "linear"}),  # and the other way round
        ("1", {"kind": "mlp"}),
        ("4", {"kind": "res_mlp"}),
        ("2", {"kind": "low_rank", "rank": 6}),
        ("3", {"kind": "block", "attention": "const", "mlp": "full"}),
        ("3", {"kind": "block", "attention": "const", "mlp": "const"}),
        ("0", {"kind": "block", "attention": "linear", "mlp": "linear"}),
        ("5", {"kind": "block", "attention": "linear", "mlp": "const"}),
    ],
)
def test_a_configuration_that_does_not_match_the_weights_is_an_error(family: Family, tmp_path, key: str, spec):
    build(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["block_maps"][key] = spec
    if spec is None:
        del config["block_maps"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"layers\.{key}\."):
        AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, ignore_mismatched_sizes=True)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)


def test_a_stock_checkpoint_cannot_be_given_maps_on_the_way(family: Family, tmp_path):
    family.stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"block_maps: maps replace blocks 1, '{family.name}' has none"):
        family.model.from_pretrained(tmp_path, block_maps={"1": {"kind": "linear"}})


def test_fewer_blocks_can_be_asked_for_only_where_no_map_is_lost(family: Family, tmp_path, images: Tensor):
    model = build(family, {"1": {"kind": "linear"}})
    model.save_pretrained(tmp_path)
    short = family.model.from_pretrained(tmp_path, num_hidden_layers=3, add_pooling_layer=False)
    tokens = model(images, output_hidden_states=True).hidden_states[3]
    assert torch.equal(short(images).last_hidden_state, model.layernorm(tokens))
    with pytest.raises(ValueError, match=r"block_maps\['1'\] = .*: the network has blocks 0 to 0"):
        family.model.from_pretrained(tmp_path, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("block_maps", "message"),
    [
        ({"8": {"kind": "linear"}}, r"block_maps\['8'\] = .*: the network has blocks 0 to 7"),
        ({"-1": {"kind": "linear"}}, "the network has blocks 0 to 7"),
        ({"01": {"kind": "linear"}}, "the network has blocks 0 to 7"),
        ({"²": {"kind": "linear"}}, "the network has blocks 0 to 7"),
        ({"one": {"kind": "linear"}}, "the network has blocks 0 to 7"),
        ({1: {"kind": "linear"}}, "block_maps"),
        ({"1": "linear"}, "block_maps"),
        ([{"kind": "linear"}], "block_maps"),
        ({"1": {}}, "kind None is unknown, choose one of linear, low_rank, mlp, res_mlp, block"),
        ({"1": {"kind": "fold"}}, "kind 'fold' is unknown"),
        ({"1": {"kind": ["linear"]}}, "is unknown"),
        ({"1": {"kind": "linear", "rank": 3}}, "kind 'linear' takes nothing else"),
        ({"1": {"kind": "low_rank"}}, "kind 'low_rank' takes rank"),
        ({"1": {"kind": "low_rank", "rank": 0}}, "rank must be a whole number from 1 to 24"),
        ({"1": {"kind": "low_rank", "rank": 25}}, "rank must be a whole number from 1 to 24"),
        ({"1": {"kind": "low_rank", "rank": 2.0}}, "rank must be a whole number from 1 to 24"),
        ({"1": {"kind": "low_rank", "rank": True}}, "rank must be a whole number from 1 to 24"),
        ({"1": {"kind": "block", "attention": "linear"}}, "kind 'block' takes attention and mlp"),
        ({"1": {"kind": "block", "attention": "mlp", "mlp": "full"}}, "attention must be one of full, linear, const"),
        ({"1": {"kind": "block", "attention": "full", "mlp": ["const"]}}, "mlp must be one of full, linear, const"),
        ({"1": {"kind": "block", "attention": "full", "mlp": "full"}}, "nothing is replaced, leave the entry out"),
    ],
)
def test_a_wrong_entry_is_an_error_that_names_it(family: Family, block_maps, message: str):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        family.config(**{**TINY, "num_hidden_layers": 8}, block_maps=block_maps)


def test_a_network_without_maps_says_nothing_about_them(family: Family, tmp_path):
    for block_maps in (None, {}):
        config = family.config(**TINY, block_maps=block_maps)
        assert "block_maps" not in config.to_stock().to_dict()
    family.own().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("block_maps") is None


def test_no_stock_copy_is_made_of_a_model_with_maps(family: Family):
    with pytest.raises(InputError, match=r"to_stock: maps replace blocks 0, 1, .*save_with_code"):
        to_stock(build(family))


def test_dino_does_not_start_from_a_model_with_maps(family: Family, tmp_path):
    from hf_simprune.dino.geometry import geometry

    build(family).save_pretrained(tmp_path)
    arguments = make_arguments(model_name_or_path=str(tmp_path), architecture=None)
    with pytest.raises(
        InputError, match=r"--model_name_or_path .*: maps replace its blocks 0, 1, 2, 3, 4, 5, 6; DINO"
    ):
        geometry(arguments)
