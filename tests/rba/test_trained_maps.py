import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.models.vit.maps_simprune_vit import MLPMap, ResMLPMap
from hf_simprune.rba.trained_maps import fit_trained


WIDTH = 16


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and a nonlinear function of them, of mean 0 and variance 1 in each token as a final norm leaves it."""
    weights, draws = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, WIDTH, WIDTH, generator=weights) / WIDTH**0.5
    x = torch.randn(count, WIDTH, generator=draws)
    return x, torch.nn.functional.layer_norm(x + 2 * torch.relu(x @ first) @ second, (WIDTH,))


@pytest.mark.parametrize(("kind", "module"), [("mlp", MLPMap), ("res_mlp", ResMLPMap)])
def test_training_lowers_the_error_on_tokens_not_seen(kind, module):
    x, y = tokens(2000, 1)
    unseen_x, unseen_y = tokens(500, 2)
    errors = [(fit_trained(kind, x, y, steps=n)(unseen_x) - unseen_y).square().mean().item() for n in (1, 300)]
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.6 * unseen_y.var().item()
    fitted = fit_trained(kind, x, y, steps=2)
    assert isinstance(fitted.module, module)
    assert not fitted.module.training and not any(p.requires_grad for p in fitted.module.parameters())


def test_residual_map_learns_what_no_affine_map_can():
    x, y = tokens(2000, 1)
    unseen_x, unseen_y = tokens(500, 2)
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    affine = torch.linalg.lstsq(rows, y).solution
    error = (torch.cat([unseen_x, torch.ones(500, 1)], 1) @ affine - unseen_y).square().mean()
    assert (fit_trained("res_mlp", x, y)(unseen_x) - unseen_y).square().mean() < error


def test_the_seed_decides_and_the_random_state_of_the_caller_stays():
    x, y = tokens(100, 1)
    before = torch.get_rng_state()
    first, again, other = (fit_trained("res_mlp", x, y, steps=5, batch=32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(x), again(x)) and not torch.equal(first(x), other(x))


def test_training_goes_through_all_tokens_in_batches(monkeypatch):
    x, y = tokens(100, 1)
    seen = []
    forward = MLPMap.forward
    monkeypatch.setattr(MLPMap, "forward", lambda self, batch: seen.append(batch) or forward(self, batch))
    fit_trained("mlp", x, y, steps=5, batch=50)
    assert [len(batch) for batch in seen] == [50] * 5
    assert torch.equal(torch.cat(seen[:2]).sort(0).values, x.sort(0).values)


def test_tokens_from_inference_mode_and_of_reduced_precision_are_taken():
    with torch.inference_mode():
        x, y = (values.bfloat16() for values in tokens(100, 1))
        fitted = fit_trained("mlp", x, y, steps=2)
        assert fitted(x).dtype == torch.bfloat16
    with torch.inference_mode():
        x, y = tokens(100, 1)
    assert fit_trained("mlp", x, y, steps=2)(x).isfinite().all()


def test_bad_input_is_refused_before_training():
    x, y = tokens(100, 1)
    with pytest.raises(InputError, match="map: 'linear' is not trained, accepted are mlp, res_mlp"):
        fit_trained("linear", x, y)
    with pytest.raises(InputError, match="calibration_images: 10 tokens are fewer than the 16 features"):
        fit_trained("mlp", x[:10], y[:10])
    with pytest.raises(InputError, match="non-finite activations"):
        fit_trained("mlp", x, y.masked_fill(y > 1, float("nan")))
    with pytest.raises(ValueError, match="x and y"):
        fit_trained("mlp", x, y[:50])
    with pytest.raises(ValueError, match="steps=0"):
        fit_trained("mlp", x, y, steps=0)
