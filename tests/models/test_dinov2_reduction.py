"""Token reduction in DINOv2, by configuration and block by block. What is imported are promises of all families."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from .dinov2_family import DINOV2, Dinov2Family
from .test_inference_reduction import (  # noqa: F401
    COUNTS,
    method,
    reduced,
    test_a_network_without_reduction_says_nothing_about_it,
    test_a_reduced_network_is_no_stock_network,
    test_a_saved_folder_comes_back_to_the_bit,
    test_all_tokens_can_be_had_back_in_their_places,
    test_an_attention_mask_is_refused,
    test_an_own_checkpoint_takes_a_method_and_gives_it_up,
    test_attention_weights_are_recorded_for_every_block,
    test_every_layer_merging_is_followed,
    test_expedits_own_schedule_restores_inside_the_network,
    test_hidden_states_shrink_as_the_method_says,
    test_maps_elsewhere_and_replaced_mlps_are_no_hindrance,
    test_settings_are_refused_before_weights_are_read,
    test_what_cannot_be_done_is_refused_in_one_line_when_the_network_is_built,
)
from .test_reduction_in_blocks import (  # noqa: F401
    reducer,
    test_gradient_checkpointing_decides_once_and_gives_the_same_gradients,
    test_reduction_takes_a_whole_block_with_attention,
    test_samples_that_stochastic_depth_skips_give_the_same_gradients,
    test_stochastic_depth_scales_both_halves_of_a_reduced_block,
    walk_through,
)
from .tiny_reducers import naive_pass


@pytest.fixture
def family() -> Dinov2Family:
    return DINOV2


def unscaled(layer: nn.Module) -> SimpleNamespace:
    """A block as a ViT's, in which LayerScale is part of what the halves write."""
    attention = SimpleNamespace(
        q_proj=layer.attention.q_proj,
        k_proj=layer.attention.k_proj,
        v_proj=layer.attention.v_proj,
        o_proj=lambda mixed: layer.layer_scale1.lambda1 * layer.attention.o_proj(mixed),
    )
    return SimpleNamespace(
        layernorm_before=layer.norm1,
        layernorm_after=layer.norm2,
        attention=attention,
        mlp=lambda tokens: layer.layer_scale2.lambda1 * layer.mlp(tokens),
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_equals_plain_loops(images: Tensor, reducer, implementation: str):  # noqa: F811
    model = DINOV2.own().double()
    model.set_attn_implementation(implementation)
    states, walk = walk_through(model, images.double(), reducer)
    restored = walk.restore(states[-1])
    assert [state.shape[1] for state in states] == [11, 7, 7] and restored.shape == (4, 17, 24)
    layers = [unscaled(layer) for layer in model.layers]
    for row, image in enumerate(model.embed(images.double())):
        expected, expected_restored, _ = naive_pass(layers, image, reducer, 1, heads=3)
        for state, expected_state in zip(states, expected, strict=True):
            # Evidence and eager softmax are float32.
            torch.testing.assert_close(state[row], expected_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(restored[row], expected_restored, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_keep_rate_one_computes_what_the_stock_network_computes(method: str, kind: str, tmp_path, images: Tensor):  # noqa: F811
    stock = DINOV2.stock(kind)
    stock.save_pretrained(tmp_path)
    own_class = DINOV2.model if kind == "model" else DINOV2.classifier
    loaded = own_class.from_pretrained(tmp_path, token_reduction=method, keep_rate=1.0, restore_tokens=True)
    for got, expected in zip(loaded(images).to_tuple(), stock(images).to_tuple(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_classifier_needs_all_tokens_back(method: str, tmp_path, images: Tensor):  # noqa: F811
    stock = DINOV2.stock("classifier")
    stock.save_pretrained(tmp_path)
    settings = {"token_reduction": method, "keep_rate": 0.5, "reduction_layers": [0, 1]}
    message = f"token_reduction {method}: the classifier of DINOv2 averages the patch tokens.*restore_tokens=True"
    with pytest.raises(ValueError, match=message) as caught:
        DINOV2.classifier.from_pretrained(tmp_path, **settings)
    assert "\n" not in str(caught.value)
    loaded = DINOV2.classifier.from_pretrained(tmp_path, restore_tokens=True, **settings)
    features = loaded.dinov2(images).last_hidden_state
    assert features.shape == (4, 17, 24)
    pooled = torch.cat([features[:, 0], features[:, 1:].mean(1)], 1)
    torch.testing.assert_close(loaded(images).logits, loaded.classifier(pooled))
    assert not torch.allclose(loaded(images).logits, stock(images).logits, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 40), (16, 16)])
def test_other_sizes_keep_their_own_grid(method: str, size: tuple[int, int]):  # noqa: F811
    model = reduced(DINOV2, method, restore_tokens=True)
    output = model(torch.randn(2, 3, *size), output_hidden_states=True)
    rows, columns = size[0] // 8, size[1] // 8
    assert output.last_hidden_state.shape[1] == rows * columns + 1
    assert [state.shape[1] - 1 for state in output.hidden_states][:3] == model.reducer.counts((rows, columns))


def test_masks_reach_a_reduced_network(method: str, images: Tensor):  # noqa: F811
    model = reduced(DINOV2, method)
    masks = torch.arange(64).view(4, 16) % 3 == 0
    output = model(images, bool_masked_pos=masks, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], model.embed(images, masks))
    assert output.last_hidden_state.shape[1] == COUNTS[method][-1] + 1
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


@pytest.mark.parametrize("name", ["evit", "mctf"])
def test_the_network_can_be_exported_and_compiled(name: str, images: Tensor):
    torch._dynamo.reset()
    model = reduced(DINOV2, name, "classifier", restore_tokens=True)
    other = torch.randn(7, 3, 32, 32)
    any_batch = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(model, (images,), dynamic_shapes=any_batch).module()
    torch.testing.assert_close(exported(other).logits, model(other).logits)
    torch.testing.assert_close(torch.compile(model, backend="eager")(images).logits, model(images).logits)
    torch._dynamo.reset()


def test_fine_tuning_with_gradient_checkpointing(method: str, images: Tensor):  # noqa: F811
    plain = reduced(DINOV2, method, "classifier", drop_path_rate=0.3, restore_tokens=True).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        torch.manual_seed(8)
        model(images, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    for (name, got), expected in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        if "mask_token" in name:  # nothing is masked
            assert expected.grad is None and got.grad is None
            continue
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
        assert expected.grad.isfinite().all()


def test_half_precision(method: str, tmp_path, images: Tensor):  # noqa: F811
    DINOV2.stock("classifier").save_pretrained(tmp_path)
    settings = {"token_reduction": method, "keep_rate": 0.75, "dtype": torch.bfloat16, "restore_tokens": True}
    logits = DINOV2.classifier.from_pretrained(tmp_path, **settings)(images).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
