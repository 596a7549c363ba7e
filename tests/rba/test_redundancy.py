import pytest
import torch

from hf_simprune.rba import redundancy
from hf_simprune.rba.activations import Activations
from hf_simprune.rba.moments import MomentAccumulator, Moments

from .made_activations import DEPTH, WIDTH, covariance, images_of, made_chunk, stored


CHUNKS = [made_chunk(8, seed) for seed in range(4)]
PARITY = torch.arange(8) % 2
SPANS = [(i, j) for i in range(DEPTH) for j in range(i + 1, DEPTH + 1)]


def accumulate(chunks: list[Activations]) -> Moments:
    accumulator = MomentAccumulator(DEPTH, WIDTH, kinds=("linear",))
    for chunk in chunks:
        accumulator.update(chunk, PARITY)
    return accumulator.finish()


MOMENTS = accumulate(CHUNKS)
EVERY = {
    "block_redundancy": redundancy.block_redundancy,
    "cosine": redundancy.cosine,
    "linear_cka": redundancy.linear_cka,
    "svcca": redundancy.svcca,
    "explained_variance": redundancy.explained_variance,
}


@pytest.mark.parametrize("name", EVERY)
def test_every_span_has_a_value_and_nothing_else_has(name):
    result = EVERY[name](MOMENTS)
    assert result.shape == (DEPTH + 1, DEPTH + 1) and result.dtype == torch.float64
    assert torch.equal(result.isnan(), torch.ones_like(result).tril() > 0)


def test_block_redundancy_is_minus_the_mean_squared_change():
    everything, cls = redundancy.block_redundancy(MOMENTS), redundancy.block_redundancy(MOMENTS, "cls")
    for i, j in SPANS:
        change = torch.cat([chunk.hidden[j].double() - chunk.hidden[i].double() for chunk in CHUNKS])
        assert everything[i, j].item() == pytest.approx(-change.square().mean().item(), rel=1e-5)
        assert cls[i, j].item() == pytest.approx(-change[:, 0].square().mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="patches"):
        redundancy.block_redundancy(MOMENTS, "patches")


def test_cosine_is_the_mean_over_tokens():
    everything, cls = redundancy.cosine(MOMENTS), redundancy.cosine(MOMENTS, "cls")
    for i, j in SPANS:
        x, y = (torch.cat([chunk.hidden[k] for chunk in CHUNKS]).double() for k in (i, j))
        values = torch.nn.functional.cosine_similarity(x, y, dim=-1)
        assert everything[i, j].item() == pytest.approx(values.mean().item(), rel=1e-6)
        assert cls[i, j].item() == pytest.approx(values[:, 0].mean().item(), rel=1e-6)


def test_cka_is_that_of_the_gram_matrices_of_all_tokens():
    result = redundancy.linear_cka(MOMENTS)
    for i, j in SPANS:
        centred = [stored(CHUNKS, f"h{k}") - stored(CHUNKS, f"h{k}").mean(0) for k in (i, j)]
        k, m = (x @ x.T for x in centred)
        assert result[i, j].item() == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item(), rel=1e-5)


def test_svcca_is_the_mean_canonical_correlation_of_leading_components():
    result = redundancy.svcca(MOMENTS)
    for i, j in SPANS:
        bases = []
        for k in (i, j):
            x = stored(CHUNKS, f"h{k}")
            left, values, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            share = values.square().cumsum(0) / values.square().sum()
            bases.append(left[:, : next(n for n, s in enumerate(share, 1) if s >= 0.99)])
        expected = torch.linalg.svdvals(bases[0].T @ bases[1]).mean()
        assert result[i, j].item() == pytest.approx(expected.item(), rel=1e-4)


def ridge_map(x: torch.Tensor, y: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Affine, towards identity, by one dense solve."""
    s = covariance(x, x)
    eye = torch.eye(len(s), dtype=s.dtype)
    weight = eye + torch.linalg.solve(s + ridge * s.trace() / len(s) * eye, covariance(x, y - x))
    return weight, y.mean(0) - x.mean(0) @ weight


def test_explained_variance_is_that_of_images_the_map_has_not_seen():
    result = redundancy.explained_variance(MOMENTS, ridge=1e-3)
    seen = redundancy.explained_variance(MOMENTS, held_out=False, ridge=1e-3)
    sides = [[images_of(chunk, PARITY == parity) for chunk in CHUNKS] for parity in (0, 1)]
    for i, j in SPANS:
        values = []
        for fitted, judged in (sides, sides[::-1], (CHUNKS, CHUNKS)):
            weight, bias = ridge_map(stored(fitted, f"h{i}"), stored(fitted, f"h{j}"), 1e-3)
            x, y = stored(judged, f"h{i}"), stored(judged, f"h{j}")
            error = (y - x @ weight - bias).square().sum() / (y - y.mean(0)).square().sum()
            values.append(1 - error.item())
        assert result[i, j].item() == pytest.approx(sum(values[:2]) / 2, rel=1e-5)
        assert seen[i, j].item() == pytest.approx(values[2], rel=1e-5)
    assert (seen > result)[~result.isnan()].all()


def test_an_affine_change_is_explained_in_full_whatever_block_redundancy_says():
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    chunks = []
    for chunk in CHUNKS:
        hidden = [chunk.hidden[0]]
        for _ in range(DEPTH):
            hidden.append(hidden[-1] @ weight + 5)
        chunks.append(Activations(hidden))
    moments = accumulate(chunks)
    assert redundancy.explained_variance(moments, ridge=0)[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert redundancy.block_redundancy(moments)[0, 1] < -10


def test_no_images_of_one_parity_leaves_nothing_to_judge_on():
    accumulator = MomentAccumulator(DEPTH, WIDTH, kinds=("linear",))
    accumulator.update(CHUNKS[0], torch.zeros(8))
    moments = accumulator.finish()
    assert redundancy.explained_variance(moments).isnan().all()
    assert redundancy.explained_variance(moments, held_out=False)[0, 1].isfinite()
