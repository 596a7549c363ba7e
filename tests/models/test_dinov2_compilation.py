"""Per-block compilation and export of DINOv2. What is imported are the promises of all families, asked of this one."""

import pytest
import torch
from torch import Tensor

from .dinov2_family import DINOV2, SIZES, Dinov2Family
from .test_compilation import (  # noqa: F401
    CountingBackend,
    fresh_compiler,
    test_a_copy_of_a_compiled_model_computes_with_its_own_weights,
    test_compiled_blocks_give_the_same_features_and_gradients,
    test_gradient_checkpointing_and_compilation_go_together,
    test_hidden_states_and_attentions_are_recorded_after_compilation,
    test_the_forward_can_be_exported,
    test_the_whole_model_compiles_as_one_graph,
    walk,
)


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def test_blocks_share_their_graphs(images: Tensor):
    """Eight blocks of different stochastic depth cost as many graphs as three."""
    counts = []
    for depth in (3, 8):
        torch._dynamo.reset()
        model = DINOV2.model(DINOV2.config(**{**SIZES, "num_hidden_layers": depth}, drop_path_rate=0.3)).train()
        backend = CountingBackend()
        model.compile_blocks(backend=backend, fullgraph=True)
        for _ in range(2):
            walk(model, images, split=1)
        counts.append(backend.graphs)
    assert 0 < counts[0] == counts[1]


def test_a_network_with_swiglu_and_masks_compiles_and_exports(images: Tensor):
    model = DINOV2.own("classifier", use_swiglu_ffn=True)
    other = torch.randn_like(images)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(other).logits, model(other).logits)
    masks = torch.arange(64).view(4, 16) % 3 == 0
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    expected = model.base_model(images, bool_masked_pos=masks).last_hidden_state
    torch.testing.assert_close(compiled(images, bool_masked_pos=masks).last_hidden_state, expected)
