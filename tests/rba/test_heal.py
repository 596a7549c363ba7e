"""Distillation of a compressed network: what it moves, that it helps, and that it leaves everything else alone."""

import copy
import math

import numpy as np
import pytest
import torch

from hf_simprune.errors import InputError, TrainingError
from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.rba.analysis import analyze
from hf_simprune.rba.calibration import CalibrationSet, ImageReader
from hf_simprune.rba.converter import convert
from hf_simprune.rba.heal import heal, healed_parameters, position_after, random_crop
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from .conftest import DEPTH, make_model
from .image_sets import calibration, pictures, quiet_model


FOLDS = CompressionPlan(DEPTH, (Span(1, 2, "fold"), Span(4, 5, "fold")))
MAPS = CompressionPlan(
    DEPTH, (Span(1, 3, "linear"), Span(5, 6, "fold")), (Half(3, "attention", "linear"), Half(4, "attention", "const"))
)
IMAGES = calibration(14, 6)


def pair(kind: str, plan: CompressionPlan):
    model = quiet_model(make_model(kind), 0.5)
    granularity = "half" if plan.halves else "block"
    found = analyze(model, IMAGES, granularity=granularity, progress=False, max_span=2, cost_images=2)
    return convert(model, plan, found.maps), model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "plan"),
    [("vit-classifier", FOLDS), ("vit-classifier", MAPS), ("dinov2", FOLDS), ("dinov2", MAPS), ("clip", FOLDS)],
)
def test_the_loss_falls_and_only_the_named_parameters_move(kind, plan):
    student, teacher = pair(kind, plan)
    before, teacher_before = weights(student), weights(teacher)
    named = set(healed_parameters(student, teacher, plan))
    losses = heal(student, teacher, IMAGES, 30, plan=plan, learning_rate=3e-3, batch_size=8, progress=False)
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = weights(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # a key's bias shifts all scores of a query alike, so its gradient is zero and rounding decides
    still = {name for name in named - moved if "k_proj.bias" not in name and "key.bias" not in name}
    assert moved <= named and not still
    assert all(torch.equal(value, teacher_before[name]) for name, value in weights(teacher).items())
    assert not student.training and not any(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_what_is_healed_are_norms_biases_and_what_was_replaced():
    student, teacher = pair("vit-classifier", MAPS)
    named = set(healed_parameters(student, teacher, MAPS))
    # 0, the map of 1-2, 3, 4 (which took a fold in); so 3 and 4 are layers 2 and 3
    assert [position_after(MAPS, block) for block in (0, 3, 4)] == [0, 2, 3]
    assert {name for name in named if "vit.layers.1." in name} == {
        name for name, _ in student.named_parameters() if "vit.layers.1." in name
    }
    assert "vit.layers.3.mlp.fc2.weight" in named and "vit.layers.3.mlp.fc1.weight" not in named
    assert "vit.layers.2.mlp.fc2.weight" not in named and "vit.layers.2.mlp.fc2.bias" in named
    assert any("vit.layers.2.attention" in name and name.endswith("weight") for name in named)
    assert {"vit.layernorm.weight", "vit.layers.0.layernorm_before.weight", "vit.layers.0.mlp.fc1.bias"} <= named
    assert not any("classifier" in name or "embeddings" in name for name in named)


def test_a_text_tower_is_left_alone():
    student, teacher = pair("clip", FOLDS)
    assert all(name.startswith("vision_model.") for name in healed_parameters(student, teacher, FOLDS))


def test_the_same_seed_gives_the_same_network():
    student, teacher = pair("vit-classifier", FOLDS)
    other, third = copy.deepcopy(student), copy.deepcopy(student)
    options = {"plan": FOLDS, "batch_size": 6, "progress": False}
    assert heal(student, teacher, IMAGES, 4, **options) == heal(other, teacher, IMAGES, 4, **options)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(student).items())
    heal(third, teacher, IMAGES, 4, seed=1, **options)
    assert any(not torch.equal(value, weights(third)[name]) for name, value in weights(student).items())


def test_only_fit_images_are_read_unless_others_are_named():
    student, teacher = pair("vit-classifier", FOLDS)
    images = calibration(14, 6)
    read = set()
    original = images.reader.pixels
    images.reader.pixels = lambda index: read.add(index) or original(index)
    heal(student, teacher, images, 5, plan=FOLDS, batch_size=8, progress=False)
    assert read == set(images.fit)
    read.clear()
    heal(student, teacher, images, 3, plan=FOLDS, batch_size=4, indices=images.select, progress=False)
    assert read == set(images.select)


def test_half_precision_stays_and_is_trained_all_the_same():
    model = quiet_model(make_model("vit-classifier"), 0.5)
    found = analyze(model, IMAGES, progress=False, max_span=2, cost_images=2)
    teacher = model.bfloat16()
    student = convert(teacher, FOLDS, found.maps)
    losses = heal(student, teacher, IMAGES, 20, plan=FOLDS, learning_rate=3e-3, batch_size=8, progress=False)
    assert student.dtype == torch.bfloat16 and {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_loss_that_is_not_finite_leaves_the_network_as_it_was():
    student, teacher = pair("vit-classifier", FOLDS)
    before = weights(student)
    with pytest.raises(TrainingError, match="the loss is"):
        heal(student, teacher, IMAGES, 20, plan=FOLDS, learning_rate=1e20, batch_size=8, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in weights(student).items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_unreadable_images_are_passed_over_and_all_unreadable_refused():
    student, teacher = pair("vit-classifier", FOLDS)
    images = pictures(20)
    images[1] = images[2] = b"no image"
    some = calibration(14, 6, images=images)
    assert all(map(math.isfinite, heal(student, teacher, some, 4, plan=FOLDS, batch_size=5, progress=False)))
    assert some.reader.unreadable == {1, 2}
    none = calibration(14, 6, images=[b"no image"] * 20)
    with pytest.raises(InputError, match="none of the 14 images can be read"):
        heal(student, teacher, none, 4, plan=FOLDS, batch_size=5, progress=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_bad_options_are_refused(options):
    student, teacher = pair("vit-classifier", FOLDS)
    with pytest.raises(InputError, match="must be above 0"):
        heal(student, teacher, IMAGES, **{"steps": 1, "plan": FOLDS, "progress": False, **options})


def test_crops_have_the_size_asked_for_and_are_part_of_the_image():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(60)[None] * 4  # redness tells the column
    mirrored = 0
    for seed in range(60):
        crop = random_crop(image, (20, 30), np.random.default_rng(seed))
        assert crop.shape == (20, 30, 3) and crop.dtype == np.uint8
        columns = crop[10, :, 0].astype(int) / 4
        mirrored += columns[0] > columns[-1]
        assert 0 <= columns.min() and columns.max() <= 59
        width = abs(columns[-1] - columns[0])
        assert 15 < width < 60  # 35 % of the area is at least 25 columns, less what interpolation trims
    assert 15 < mirrored < 45


def test_images_have_the_size_that_the_processor_gives_them():
    # as DINOv2, configured for 518 pixels and used at 224
    student, teacher = pair("dinov2", FOLDS)
    processor = build_image_processor(24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    smaller = CalibrationSet(ImageReader(pictures(20), processor), IMAGES.split)
    seen = []
    student.embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    heal(student, teacher, smaller, 1, plan=FOLDS, batch_size=4, progress=False)
    assert seen == [(24, 24)] and student.config.image_size != 24
