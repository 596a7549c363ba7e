"""Costs of single images against their definitions, written out with loops."""

import math

import pytest
import torch

from hf_simprune.rba.cost import OutputCost, kl_logits, kl_similarity, relative_squared_error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_kl_of_logits_is_the_original_against_the_changed():
    reference, output = torch.randn(4, 5), torch.randn(4, 5)
    expected = [kl(softmax(r.tolist()), softmax(o.tolist())) for r, o in zip(reference, output)]
    assert kl_logits(reference, output).tolist() == pytest.approx(expected, rel=1e-5)


def test_kl_of_similarities_follows_its_definition():
    reference, output, bank = torch.randn(3, 6), torch.randn(3, 6), 2 * torch.randn(7, 6)

    def similarities(feature):
        return [float(feature @ other / feature.norm() / other.norm()) / 0.5 for other in bank]

    expected = [kl(softmax(similarities(r)), softmax(similarities(o))) for r, o in zip(reference, output)]
    assert kl_similarity(reference, output, bank, temperature=0.5).tolist() == pytest.approx(expected, rel=1e-4)


def test_similarities_do_not_see_the_length_of_features_but_the_squared_error_does():
    reference, bank = torch.randn(3, 6), torch.randn(7, 6)
    assert kl_similarity(reference, 3 * reference, bank) == pytest.approx([0, 0, 0], abs=1e-6)
    assert relative_squared_error(reference, 3 * reference).tolist() == pytest.approx([4, 4, 4])


def test_unchanged_outputs_cost_nothing_in_any_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reference = torch.randn(4, 5).to(dtype)
        assert OutputCost()(reference, reference).abs().max() == 0
        assert OutputCost(torch.randn(9, 5).to(dtype))(reference, reference).abs().max() == 0


def test_the_cost_is_named_by_what_it_measures():
    reference, output, bank = torch.randn(2, 5), torch.randn(2, 5), torch.randn(9, 5)
    assert OutputCost().name.startswith("KL of the logits")
    assert OutputCost(bank).name.startswith("KL of the similarities")
    assert torch.equal(OutputCost()(reference, output)[0], kl_logits(reference, output).double())
    assert torch.equal(OutputCost(bank)(reference, output)[0], kl_similarity(reference, output, bank).double())
    assert torch.equal(OutputCost()(reference, output)[1], relative_squared_error(reference, output).double())


def test_confident_logits_stay_finite():
    reference, output = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])
    assert kl_logits(reference, output).item() == pytest.approx(300)


def test_an_image_is_not_compared_with_itself():
    reference, output = torch.randn(3, 6), torch.randn(3, 6)
    others = torch.randn(4, 6)
    bank = torch.cat([others[:2], reference[1:2], others[2:]])
    cost = OutputCost(bank, (10, 11, 7, 12, 13))
    found = cost(reference, output, (6, 7, 8))[0]
    assert found[1].item() == pytest.approx(kl_similarity(reference, output, others)[1].item(), rel=1e-5)
    for image in (0, 2):
        assert found[image].item() == pytest.approx(kl_similarity(reference, output, bank)[image].item(), rel=1e-5)
    # without row numbers, as for images of another data set, all of the bank counts
    assert torch.equal(cost(reference, output), OutputCost(bank)(reference, output))
    assert found[1] != cost(reference, output)[0, 1]
