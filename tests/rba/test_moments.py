import gc
import os
import socket

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator

from hf_simprune.errors import InputError
from hf_simprune.rba.activations import Activations
from hf_simprune.rba.moments import MomentAccumulator, Moments

from .made_activations import DEPTH, TOKENS, WIDTH, covariance, images_of, made_chunk, stored


CHUNKS = [made_chunk(6, seed) for seed in range(4)]
PARITIES = [
    torch.tensor([0, 0, 0, 1, 1, 1]),
    torch.tensor([1, 0, 1, 1, 0, 0]),
    torch.ones(6).long(),
    torch.arange(6) % 2,
]


def accumulate(chunks=CHUNKS, parities=PARITIES, pilot=CHUNKS[0], **options) -> Moments:
    accumulator = MomentAccumulator(DEPTH, WIDTH, **{"max_span": 2, "halves": True, **options})
    accumulator.set_pilot(pilot)
    for chunk, parity in zip(chunks, parities, strict=True):
        accumulator.update(chunk, parity)
    return accumulator.finish()


def pairs(moments: Moments) -> list[tuple[str, str]]:
    return [(a, b) for a in moments.names for b in moments.names if moments.has(a, b)]


def test_means_and_second_moments_are_those_of_the_stored_activations():
    moments = accumulate()
    assert moments.count == 4 * 6 * TOKENS and moments.images == 24
    assert len(moments.names) == DEPTH + 1 + 4 * DEPTH
    for a in moments.names:
        torch.testing.assert_close(moments.mean(a), stored(CHUNKS, a).mean(0), rtol=1e-6, atol=1e-6)
    for a, b in pairs(moments):
        x, y = stored(CHUNKS, a), stored(CHUNKS, b)
        torch.testing.assert_close(moments.cov(a, b), covariance(x, y), rtol=0, atol=2e-6)
        torch.testing.assert_close(moments.second(a, b), x.T @ y / len(x), rtol=1e-5, atol=1e-5)


def test_every_product_that_a_map_needs_is_there_and_no_other():
    moments = accumulate()
    hidden = {(f"h{i}", f"h{j}") for i in range(DEPTH + 1) for j in range(DEPTH + 1)}
    folds = {(f"m{b}", f"h{k}") for b in range(DEPTH) for k in range(b + 1, min(DEPTH, b + 3) + 1)}
    halves = {pair for b in range(DEPTH) for pair in [(f"an{b}", f"a{b}"), (f"mn{b}", f"m{b}")]}
    same = {(name, name) for b in range(DEPTH) for name in (f"an{b}", f"mn{b}", f"m{b}")}
    wanted = hidden | folds | halves | same
    assert set(pairs(moments)) == wanted | {(b, a) for a, b in wanted}
    assert accumulate(kinds=("linear",), halves=False).names == tuple(f"h{i}" for i in range(DEPTH + 1))
    with pytest.raises(KeyError):
        moments.cov("a0", "a0")


def test_images_of_each_parity_are_kept_apart():
    for parity, part in enumerate(accumulate().halved):
        chunks = [images_of(chunk, chosen == parity) for chunk, chosen in zip(CHUNKS, PARITIES, strict=True)]
        assert part.images == sum(len(chunk.hidden[0]) for chunk in chunks)
        for a, b in (("h1", "h3"), ("m1", "h2"), ("an2", "a2")):
            expected = covariance(stored(chunks, a), stored(chunks, b))
            torch.testing.assert_close(part.cov(a, b), expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="one parity already"):
        part.subset(0)


def test_large_means_do_not_drown_small_variances():
    chunks = [made_chunk(6, seed, offset=3000.0) for seed in range(4)]
    moments = accumulate(chunks, pilot=chunks[0])
    for name in ("h0", "h4"):
        expected = covariance(stored(chunks, name), stored(chunks, name))
        assert (moments.cov(name, name) - expected).norm() < 1e-5 * expected.norm()


def test_pairs_of_hidden_states_are_compared_on_cls_and_on_all_tokens():
    moments = accumulate()
    for i, j in ((0, 1), (1, 4), (2, 3)):
        x, y = (torch.cat([chunk.hidden[k] for chunk in CHUNKS]).double() for k in (i, j))
        cosines = torch.nn.functional.cosine_similarity(x, y, dim=-1)
        assert moments.cls_squared_difference[i, j].item() == pytest.approx((x - y)[:, 0].square().mean().item())
        assert moments.cls_cosine[i, j].item() == pytest.approx(cosines[:, 0].mean().item())
        assert moments.token_cosine[i, j].item() == pytest.approx(cosines.mean().item(), abs=1e-6)


def test_without_cls_the_mean_over_tokens_stands_in():
    moments = accumulate(prefix_tokens=0)
    x, y = (torch.cat([chunk.hidden[k] for chunk in CHUNKS]).double().mean(1) for k in (1, 3))
    assert moments.cls_squared_difference[1, 3].item() == pytest.approx((x - y).square().mean().item(), rel=1e-5)
    cosines = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    assert moments.cls_cosine[1, 3].item() == pytest.approx(cosines.mean().item(), rel=1e-6)


def assert_same(one: Moments, other: Moments, tolerance: float) -> None:
    assert one.count == other.count and one.images == other.images and one.names == other.names
    for mine, theirs in zip((one, *one.halved), (other, *other.halved), strict=True):
        for a, b in pairs(one):
            difference = (mine.cov(a, b) - theirs.cov(a, b)).norm()
            assert difference <= tolerance * (mine.cov(a, a).norm() if one.has(a, a) else 1)
        for name in ("cls_squared_difference", "cls_cosine", "token_cosine"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)


def test_chunks_of_two_ranks_merge_into_those_of_one():
    ranks = [accumulate(CHUNKS[rank::2], PARITIES[rank::2]) for rank in range(2)]
    assert_same(accumulate(), ranks[0].merge(ranks[1]), 1e-10)


def test_moments_about_other_pilot_means_merge_too():
    ranks = [accumulate(CHUNKS[rank::2], PARITIES[rank::2], pilot=CHUNKS[3 - rank]) for rank in range(2)]
    assert_same(accumulate(), ranks[0].merge(ranks[1]), 1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        ranks[0].merge(accumulate(halves=False))


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    accumulator = MomentAccumulator(DEPTH, WIDTH, 2, halves=True)
    accumulator.set_pilot(CHUNKS[0] if accelerator.is_main_process else None, accelerator)
    if rank == 0:  # the other rank has nothing to read
        for chunk, parity in zip(CHUNKS, PARITIES, strict=True):
            accumulator.update(chunk, parity)
    accumulator.reduce(accelerator)
    moments = accumulator.finish()
    torch.save([moments.cov("h1", "h3"), moments.mean("h2"), moments.token_cosine], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_pilot_means_and_sums(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (2, port, str(tmp_path)), nprocs=2)
    moments = accumulate()
    expected = [moments.cov("h1", "h3"), moments.mean("h2"), moments.token_cosine]
    for rank in range(2):
        for value, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


def bytes_of_tensors() -> int:
    gc.collect()
    # plain ones only: what an export leaves behind has no memory of its own
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_number_of_images():
    accumulator = MomentAccumulator(DEPTH, WIDTH, 2, halves=True)
    sizes = []
    for seed in range(12):
        accumulator.update(made_chunk(6, seed), PARITIES[seed % 4])
        if seed in (3, 11):
            sizes.append(bytes_of_tensors())
    assert sizes[0] == sizes[1]


def test_products_are_taken_in_full_precision_whatever_the_caller_runs_in():
    expected = accumulate()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(accumulate().cov("h1", "h2"), expected.cov("h1", "h2"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_reduced_precision_count_as_they_are(dtype):
    lists = {
        name: [values.to(dtype) for values in getattr(CHUNKS[0], name)] for name in ("hidden", "m", "an", "a", "mn")
    }
    chunk = Activations(**lists)
    moments = accumulate([chunk], PARITIES[:1], pilot=chunk)
    for a, b in (("h1", "h3"), ("mn0", "m0")):
        expected = covariance(stored([chunk], a), stored([chunk], b))
        torch.testing.assert_close(moments.cov(a, b), expected, rtol=0, atol=2e-6)


def test_one_accumulator_serves_inside_and_outside_of_inference_mode():
    accumulator = MomentAccumulator(DEPTH, WIDTH, 2, halves=True)
    with torch.inference_mode():
        accumulator.update(made_chunk(6, 0), PARITIES[0])
    for chunk, parity in zip(CHUNKS[1:], PARITIES[1:], strict=True):
        accumulator.update(chunk, parity)
    assert_same(accumulate(), accumulator.finish(), 1e-10)


def test_what_a_compressed_model_no_longer_has_is_left_out():
    full = [("attention", "mlp"), (), ("mlp",), ("attention",)]
    kept = {"an": (0, 3), "a": (0, 3), "mn": (0, 2), "m": (0, 2)}
    chunk = Activations(
        CHUNKS[0].hidden,
        **{
            name: [v if b in blocks else None for b, v in enumerate(getattr(CHUNKS[0], name))]
            for name, blocks in kept.items()
        },
    )
    moments = accumulate([chunk], PARITIES[:1], pilot=chunk, full_halves=full)
    assert set(moments.names) == {f"h{i}" for i in range(5)} | {f"{n}{b}" for n, bs in kept.items() for b in bs}
    assert moments.has("m2", "h3") and not moments.has("m1", "h2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_variable_that_is_not_finite_is_named(value):
    chunk = made_chunk(6, 1)
    for entries, first in ((chunk.m, 1), (chunk.an, 2), (chunk.hidden, 2)):
        for values in entries[first:]:
            values[3, 2, 5] = value
    with pytest.raises(InputError, match=r"^non-finite activations: the MLP output of block 1 \(m1\) [^\n]*$"):
        accumulate([CHUNKS[0], chunk], PARITIES[:2])


def test_no_images_and_chunks_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="calibration_images: no image"):
        MomentAccumulator(DEPTH, WIDTH).finish()
    accumulator = MomentAccumulator(DEPTH, WIDTH, halves=True)
    with pytest.raises(ValueError, match="lack an0"):
        accumulator.update(Activations(CHUNKS[0].hidden, m=CHUNKS[0].m), PARITIES[0])
    with pytest.raises(ValueError, match="6 images"):
        accumulator.update(CHUNKS[0], torch.zeros(5))
    with pytest.raises(ValueError, match="h0 has shape"):
        MomentAccumulator(DEPTH, 13, kinds=()).update(CHUNKS[0], PARITIES[0])
    with pytest.raises(ValueError, match="max_span: 0"):
        MomentAccumulator(DEPTH, WIDTH, 0)
    with pytest.raises(ValueError, match="kinds"):
        MomentAccumulator(DEPTH, WIDTH, kinds=("affine",))
