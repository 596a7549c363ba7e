import io

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from hf_simprune.errors import InputError
from hf_simprune.rba.activations import Activations
from hf_simprune.rba.maps import AffineMap, ConstMap, IdentityMap, LowRankMap, ModuleMap, fit, fit_all
from hf_simprune.rba.moments import MomentAccumulator, Moments
from hf_simprune.rba.plan import Half, Span
from hf_simprune.rba.solve import LeftSolver

from .made_activations import DEPTH, WIDTH, covariance, made_chunk, stored


CHUNKS = [made_chunk(8, seed) for seed in range(4)]
UNSEEN = [made_chunk(16, 99)]


def accumulate(chunks: list[Activations], **options) -> Moments:
    depth, width = len(chunks[0].hidden) - 1, chunks[0].hidden[0].shape[-1]
    accumulator = MomentAccumulator(depth, width, **options)
    for chunk in chunks:
        accumulator.update(chunk, torch.arange(len(chunk.hidden[0])) % 2)
    return accumulator.finish()


MOMENTS = accumulate(CHUNKS, halves=True)


def least_squares(
    x: torch.Tensor, y: torch.Tensor, bias: bool = True, penalty: float = 0.0, rcond: float | None = None
) -> tuple:
    """min |x w + c - y|^2 + n penalty |w|^2 by one dense fp64 solve of stored rows."""
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    extra = (len(x) * penalty) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    rows, targets = torch.cat([x - mean_x, extra]), torch.cat([y - mean_y, torch.zeros(x.shape[1], y.shape[1])])
    weight = torch.linalg.lstsq(rows, targets.to(x.dtype), rcond, driver="gelsd").solution
    return weight, mean_y - mean_x @ weight


def penalty_of(x: torch.Tensor, ridge: float, bias: bool) -> float:
    x = x - x.mean(0) if bias else x
    return ridge * x.square().mean().item()


def assert_affine(fitted: AffineMap, weight: torch.Tensor, bias: torch.Tensor) -> None:
    assert isinstance(fitted, AffineMap) and fitted.weight.dtype == fitted.bias.dtype == torch.float32
    torch.testing.assert_close(fitted.weight.double(), weight, rtol=0, atol=2e-4)
    torch.testing.assert_close(fitted.bias.double(), bias, rtol=0, atol=2e-3)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_map_is_least_squares_with_a_ridge_towards_identity(ridge, bias):
    for i, j in ((0, 1), (1, 4)):
        x, y = stored(CHUNKS, f"h{i}"), stored(CHUNKS, f"h{j}")
        delta, offset = least_squares(x, y - x, bias, penalty_of(x, ridge, bias))
        assert_affine(fit(Span(i, j, "linear"), MOMENTS, ridge, bias), torch.eye(WIDTH) + delta, offset)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_is_least_squares_on_the_mlp_write_of_the_block_before(ridge, bias):
    for i, j in ((1, 2), (2, 4)):
        m, h = stored(CHUNKS, f"m{i - 1}"), stored(CHUNKS, f"h{i}")
        y = h - m  # the stream before that MLP
        delta, offset = least_squares(m, stored(CHUNKS, f"h{j}") - y - m, bias, penalty_of(m, ridge, bias))
        assert_affine(fit(Span(i, j), MOMENTS, ridge, bias), torch.eye(WIDTH) + delta, offset)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_linear_half_is_least_squares_on_its_normed_input_with_a_ridge_towards_a_constant(half):
    norm, write = ("an", "a") if half == "attention" else ("mn", "m")
    x, y = stored(CHUNKS, f"{norm}2"), stored(CHUNKS, f"{write}2")
    weight, offset = least_squares(x, y, penalty=penalty_of(x, 1e-2, True))
    assert_affine(fit(Half(2, half, "linear"), MOMENTS, 1e-2), weight, offset)


def test_without_a_ridge_a_half_gets_a_map_that_fits_best_though_its_input_lacks_a_direction():
    x, y = stored(CHUNKS, "mn1"), stored(CHUNKS, "m1")
    assert torch.linalg.eigvalsh(covariance(x, x))[0] < 1e-10
    weight, offset = least_squares(x, y, rcond=1e-5)  # rounding leaves a little of that direction, no use to a map
    best = (y - x @ weight - offset).square().mean()
    fitted = fit(Half(1, "mlp", "linear"), MOMENTS, 0.0)
    assert (y - fitted(x)).square().mean() == pytest.approx(best.item(), rel=1e-5)
    assert fitted.weight.abs().max() < 10


def test_const_half_is_the_mean_of_its_write():
    fitted = fit(Half(3, "attention", "const"), MOMENTS)
    assert isinstance(fitted, ConstMap)
    torch.testing.assert_close(fitted.bias.double(), stored(CHUNKS, "a3").mean(0), rtol=1e-5, atol=1e-6)
    assert fitted(torch.zeros(2, 5, WIDTH)).shape == (2, 5, WIDTH)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_low_rank_map_is_the_best_of_its_rank(ridge):
    x, y = stored(CHUNKS, "h1"), stored(CHUNKS, "h4")
    penalty = penalty_of(x, ridge, True)
    delta, _ = least_squares(x, y - x, penalty=penalty)
    # Eckart-Young on the fitted values of the problem with the ridge written as extra rows.
    extra = (len(x) * penalty) ** 0.5 * torch.eye(WIDTH, dtype=x.dtype)
    _, _, directions = torch.linalg.svd(torch.cat([x - x.mean(0), extra]) @ delta, full_matrices=False)
    for rank in (1, 3, WIDTH):
        expected = delta @ directions[:rank].T @ directions[:rank]
        fitted = fit(Span(1, 4, "low_rank", rank), MOMENTS, ridge)
        assert isinstance(fitted, LowRankMap) and fitted.down.shape == (WIDTH, rank)
        torch.testing.assert_close((fitted.down @ fitted.up).double(), expected, rtol=0, atol=5e-4)
        bias = (y - x).mean(0) - x.mean(0) @ expected
        torch.testing.assert_close(fitted(x), x + x @ expected + bias, rtol=0, atol=1e-2)
    torch.testing.assert_close(fitted(x), fit(Span(1, 4, "linear"), MOMENTS, ridge)(x), rtol=0, atol=1e-4)


def test_a_strong_ridge_leaves_identity_and_a_shift_of_the_mean():
    fitted = fit(Span(1, 3, "linear"), MOMENTS, ridge=1e9)
    torch.testing.assert_close(fitted.weight, torch.eye(WIDTH), rtol=0, atol=1e-6)
    shift = (stored(CHUNKS, "h3") - stored(CHUNKS, "h1")).mean(0)
    torch.testing.assert_close(fitted.bias.double(), shift, rtol=0, atol=1e-4)


def vit_activations(dtype: torch.dtype) -> tuple[list[Activations], list[Activations]]:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTModel(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(96, 3, 32, 32).to(dtype)
    with torch.inference_mode():
        hidden = [model(part, output_hidden_states=True).hidden_states for part in images.split(16)]
    chunks = [Activations(list(states)) for states in hidden]
    return chunks[:4], chunks[4:]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_residual_is_that_of_lstsq_on_stored_activations(dtype, bias):
    chunks, unseen = vit_activations(dtype)
    moments = accumulate(chunks, kinds=("linear",))
    for i, j in ((0, 1), (1, 2), (1, 3)):
        weight, offset = least_squares(stored(chunks, f"h{i}"), stored(chunks, f"h{j}"), bias)
        x, y = stored(unseen, f"h{i}"), stored(unseen, f"h{j}")
        expected = (y - x @ weight - offset).square().sum()
        fitted = fit(Span(i, j, "linear"), moments, ridge=0, bias=bias)
        assert (y - fitted(x)).square().sum().item() == pytest.approx(expected.item(), rel=1e-4)


def test_held_out_residual_is_that_of_lstsq_on_a_real_model(shared_data):
    folder = shared_data / "deit_tiny_patch16_224"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    table = pyarrow.parquet.read_table(shared_data / "imagenet_sample500_240.parquet", columns=["image"]).slice(0, 24)
    cells = table["image"].to_pylist()
    files = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = [model(part, output_hidden_states=True).hidden_states for part in pixels.split(8)]
    chunks = [Activations(list(states)) for states in hidden]
    moments = accumulate(chunks[:2], kinds=("linear",))
    for i, j in ((1, 2), (5, 7), (11, 12)):
        for bias in (True, False):
            weight, offset = least_squares(stored(chunks[:2], f"h{i}"), stored(chunks[:2], f"h{j}"), bias)
            x, y = stored(chunks[2:], f"h{i}"), stored(chunks[2:], f"h{j}")
            expected = (y - x @ weight - offset).square().sum()
            fitted = fit(Span(i, j, "linear"), moments, ridge=0, bias=bias)
            assert (y - fitted(x)).square().sum().item() == pytest.approx(expected.item(), rel=1e-4)


def test_many_maps_share_the_decomposition_of_their_input(monkeypatch):
    decompositions = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: decompositions.append(1) or eigh(matrix))
    items = [Span(i, j, kind) for kind in ("linear", "fold") for i in (1, 2) for j in (3, 4)]
    maps = fit_all([*items, Span(0, 1, "identity"), Half(0, "mlp", "const")], MOMENTS)
    assert len(decompositions) == 4  # h1, h2, m0, m1
    assert list(maps)[: len(items)] == items and isinstance(maps[Span(0, 1, "identity")], IdentityMap)
    monkeypatch.undo()
    for item in items:
        torch.testing.assert_close(maps[item].weight, fit(item, MOMENTS).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_maps_work_in_the_dtype_of_what_they_are_given(dtype):
    x = UNSEEN[0].hidden[1].to(dtype)
    module = ModuleMap(torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False))
    fitted = [fit(item, MOMENTS) for item in (Span(1, 3, "linear"), Span(1, 3, "low_rank", 2), Span(1, 3, "identity"))]
    for function in (*fitted, fit(Half(1, "mlp", "const"), MOMENTS), module):
        assert function(x).dtype == dtype and function(x).shape == x.shape
    expected = x.double() @ fitted[0].weight.double() + fitted[0].bias.double()
    torch.testing.assert_close(fitted[0](x).double(), expected, rtol=2e-2, atol=0.15)


def constant_images() -> list[Activations]:
    one = made_chunk(1, 0)
    return [Activations([h.expand(12, -1, -1) for h in one.hidden], m=[m.expand(12, -1, -1) for m in one.m])]


def test_constant_images_need_a_ridge_and_the_error_says_so():
    moments = accumulate(constant_images())
    for item in (Span(1, 2, "linear"), Span(1, 2, "fold"), Span(1, 2, "low_rank", 2)):
        with pytest.raises(InputError, match=r"^ridge: 0 with singular moments[^\n]*ridge above 0[^\n]*$"):
            fit(item, moments, ridge=0)
    fitted = fit(Span(1, 2, "linear"), moments)
    x, y = (constant_images()[0].hidden[k] for k in (1, 2))
    assert (y - fitted(x)).square().mean() < 0.01 * (y - x).square().mean()
    assert fitted.weight.abs().max() < 10


def test_what_rounding_leaves_of_a_constant_feature_is_not_taken_for_signal():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] *= 1e-9
    solver = LeftSolver(covariance(x, x), 0.0)
    assert solver.deficient
    assert solver.solve(torch.ones(6, 2, dtype=torch.float64))[3].abs().max() < 10
    x[:, 3] *= 1e5
    assert not LeftSolver(covariance(x, x), 0.0).deficient  # small, and yet larger than rounding


def test_a_variable_that_never_varies_is_mapped_by_its_mean():
    chunk = Activations([torch.ones(4, 7, WIDTH), 3 * torch.ones(4, 7, WIDTH)])
    fitted = fit(Span(0, 1, "linear"), accumulate([chunk], kinds=("linear",)))
    torch.testing.assert_close(fitted(chunk.hidden[0]), chunk.hidden[1])


def test_too_few_tokens_are_refused():
    chunk = made_chunk(1, 0)
    moments = accumulate([chunk], halves=True)
    with pytest.raises(
        InputError, match="calibration_images: 1 images give 7 tokens.* 12 features.*at least 2 images"
    ):
        fit(Span(1, 2, "linear"), moments)
    assert isinstance(fit(Half(1, "mlp", "const"), moments), ConstMap)  # a mean needs no more


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        (Span(1, 2, "linear"), {"ridge": -1.0}, "ridge: -1.0"),
        (Span(1, 2, "linear"), {"ridge": float("nan")}, "ridge: nan"),
        (Span(1, 2, "low_rank", WIDTH + 1), {}, f"rank: {WIDTH + 1}"),
        (Span(1, DEPTH + 1, "linear"), {}, f"reaches beyond the model's {DEPTH} blocks"),
        (Half(DEPTH, "mlp", "const"), {}, f"reaches beyond the model's {DEPTH} blocks"),
        (Span(1, 3, "fold"), {}, "no moments"),
        (Half(1, "attention", "linear"), {}, "no moments"),
        (Half(1, "attention", "const"), {}, "no moments"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(item, options, message):
    moments = accumulate(CHUNKS, max_span=1)
    with pytest.raises(InputError, match=message) as error:
        fit(item, moments, **options)
    assert "\n" not in str(error.value)


def test_trained_kinds_are_not_solved_for():
    with pytest.raises(ValueError, match="trained"):
        fit(Span(1, 2, "mlp"), MOMENTS)
