"""Per-block compilation and export."""

import copy

import pytest
import torch
from torch import Tensor

from .conftest import Family


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]):
        self.graphs += 1
        return graph.forward


def walk(model, images: Tensor, split: int) -> Tensor:
    """As the training does it: one block opened, two tokens dropped between its halves."""
    tokens = model.embed(images)
    for index, layer in enumerate(model.layers):
        tokens = layer(layer(tokens, half="attention")[:, :-2], half="mlp") if index == split else layer(tokens)
    return model.layernorm(tokens)


def test_compiled_blocks_give_the_same_features_and_gradients(family: Family, images: Tensor):
    plain = family.own(drop_path_rate=0.5).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks(backend="aot_eager", fullgraph=True)
    results = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        output = walk(model, images, split=1)
        output.square().mean().backward()
        results.append(output)
    torch.testing.assert_close(results[1], results[0])
    for (name, got), expected in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_blocks_share_their_graphs(family: Family, images: Tensor):
    """Twelve blocks of different stochastic depth cost as many graphs as three."""
    counts = []
    for depth in (3, 12):
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = family.config(
            hidden_size=24, num_attention_heads=3, intermediate_size=40, image_size=32, patch_size=8,
            num_hidden_layers=depth, drop_path_rate=0.3,
        )  # fmt: skip
        model = family.model(config, add_pooling_layer=False).train()
        backend = CountingBackend()
        model.compile_blocks(backend=backend, fullgraph=True)
        for _ in range(2):
            walk(model, images, split=1)
        counts.append(backend.graphs)
    assert 0 < counts[0] == counts[1]


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(family: Family, images: Tensor):
    model = family.own()
    model.compile_blocks(backend="eager")
    before = model(images).last_hidden_state
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(teacher(images).last_hidden_state, before)


def test_hidden_states_and_attentions_are_recorded_after_compilation(family: Family, images: Tensor):
    model = family.own()
    model.set_attn_implementation("eager")
    expected = model(images, output_hidden_states=True, output_attentions=True)
    model.compile_blocks(backend="eager", fullgraph=True)
    got = model(images, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == 4 and len(got.attentions) == 3
    torch.testing.assert_close(got.hidden_states, expected.hidden_states)
    torch.testing.assert_close(got.attentions, expected.attentions)
    # The recording hooks stay installed; the compiled blocks go on without a graph break.
    again = model(images, output_hidden_states=True)
    torch.testing.assert_close(again.hidden_states, expected.hidden_states)


def test_gradient_checkpointing_and_compilation_go_together(family: Family, images: Tensor):
    plain = family.own(drop_path_rate=0.5).train()
    both = copy.deepcopy(plain)
    both.activation_checkpointing_enable({"use_reentrant": False})
    both.compile_blocks(backend="aot_eager", fullgraph=True)
    for model in (plain, both):
        torch.manual_seed(0)
        walk(model, images, split=1).square().mean().backward()
    for (name, got), expected in zip(both.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_the_forward_can_be_exported(family: Family, images: Tensor):
    model = family.own()
    exported = torch.export.export(model, (images,)).module()
    other = torch.randn_like(images)
    torch.testing.assert_close(exported(other).last_hidden_state, model(other).last_hidden_state)


def test_the_whole_model_compiles_as_one_graph(family: Family, images: Tensor):
    model = family.own()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).last_hidden_state, model(images).last_hidden_state)
