"""Scaled logits against torch's own weight normalisation."""

import pytest
import torch
from torch.nn import functional as F

from hf_simprune.dino.head import DinoHead
from hf_simprune.dino.prototypes import scaled_linear


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (9, 6), (9, 1))
    inputs, directions, lengths = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return inputs, directions, lengths.abs() + 0.5


def test_values_and_all_gradients_are_those_of_weight_norm(tensors):
    results = []
    for function in (scaled_linear, lambda x, v, g: F.linear(x, g * v / v.norm(dim=1, keepdim=True))):
        leaves = [t.clone().requires_grad_() for t in tensors]
        logits = function(*leaves)
        (logits.sin() * torch.arange(9)).sum().backward()
        results.append([logits.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradient_survives_a_numerical_check(tensors):
    assert torch.autograd.gradcheck(scaled_linear, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_equals_its_layers_called_one_by_one(norm_last_layer):
    torch.manual_seed(0)
    head = DinoHead(8, 11, hidden_dim=16, bottleneck_dim=6, norm_last_layer=norm_last_layer).double()
    lengths = head.last_layer.parametrizations.weight.original0
    lengths.data += torch.rand_like(lengths)
    features = torch.randn(4, 8, dtype=torch.float64)
    expected = head.last_layer(F.normalize(head.mlp(features), dim=-1))
    gradients = torch.autograd.grad(expected.square().sum(), [p for p in head.parameters() if p.requires_grad])
    logits = head(features)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert (lengths.grad is None) == norm_last_layer
    trained = [p.grad for p in head.parameters() if p.requires_grad]
    for ours, theirs in zip(trained, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copies", [1, 60])
def test_autocast_multiplies_many_rows_in_bf16_and_few_as_they_are(tensors, copies):
    inputs, *others = (t.float() for t in tensors)
    leaves = [t.requires_grad_() for t in (inputs.repeat(copies, 1), *others)]
    exact = scaled_linear(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        logits = scaled_linear(*leaves)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, exact) == (copies == 1)
    assert (logits - exact).abs().max() < 0.05
    weight = torch.linspace(-1, 1, exact.numel()).view_as(exact)
    expected = torch.autograd.grad((exact * weight).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad((logits * weight).sum(), leaves), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_few_rows_in_bf16_get_bf16_gradients(tensors):
    inputs, *others = (t.float() for t in tensors)
    leaves = [inputs.bfloat16().requires_grad_(), *(t.requires_grad_() for t in others)]
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(scaled_linear(*leaves).sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
