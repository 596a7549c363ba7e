"""Whole DINOv2 steps against an independent trainer, and what pruning must not break."""

import json
import math
import os
import signal

import pytest
import torch
from transformers import Dinov2Config

from hf_simprune.dino.dinov2.objective import Dinov2Objective
from hf_simprune.dino.engine import Views
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.errors import InputError, TrainingInterrupted

from ..conftest import OUT_DIM, tiny_engine, tiny_schedules, tiny_views
from .reference_dinov2 import ReferenceDinov2, ReferenceDinov2Trainer
from .tiny_dinov2 import MaskedViews, masked_views, tiny_dinov2, tiny_dinov2_engine


CONFIG = Dinov2Config(
    image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2,
    layer_norm_eps=1e-6,
)  # fmt: skip
PARTS = ("dino_loss", "ibot_loss", "koleo_loss")


def loop_settings(folder, **changes):
    values = {"output_dir": folder, "images_per_step": 3, "logging_steps": 1, "save_steps": 1000, "disable_tqdm": True}
    return LoopSettings(**(values | changes))


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("centering", "micro", "local", "reduction"),
    [("sinkhorn_knopp", 1, 2, "none"), ("sinkhorn_knopp", 2, 0, "simprune"), ("centering", 2, 1, "none")],
)
def test_twelve_steps_equal_an_independent_trainer(tmp_path, centering, micro, local, reduction):
    dual = tiny_dinov2(reduction)
    student, teacher = (ReferenceDinov2(CONFIG, OUT_DIM, 32, 12).double() for _ in range(2))
    student.load_ours(dual.student)
    teacher.load_ours(dual.teacher)
    schedules = tiny_schedules(12)

    def schedule(step):
        v = schedules.at(step)
        return v.learning_rate, v.weight_decay, v.momentum_teacher, v.teacher_temp, v.last_layer_frozen

    reference = ReferenceDinov2Trainer(student, teacher, OUT_DIM, schedule, centering)
    source = MaskedViews(micro, local=local)
    expected = []
    for step, micro_batches in zip(range(12), source.batches(0), strict=False):
        as_lists = []
        for views in micro_batches:
            crops = [*views.global_crops.chunk(2), *(views.local_crops.chunk(local) if local else [])]
            as_lists.append((crops, views.masks.chunk(2)))
        expected.append(reference.step(step, as_lists))

    engine = tiny_dinov2_engine(dual, Dinov2Objective(centering=centering))
    DinoTrainer(engine, schedules, source, loop_settings(tmp_path)).train()
    records = lines(tmp_path)
    assert [record["loss"] for record in records] == pytest.approx(expected, abs=1e-9, rel=0)
    for step, record in enumerate(records):
        parts = reference.parts[step * micro : (step + 1) * micro]
        for name, values in zip(PARTS, zip(*parts, strict=True), strict=True):
            assert record[name] == pytest.approx(sum(values) / micro, abs=1e-9, rel=0)
    assert max(expected) - min(expected) > 1e-3
    assert student.difference(dual.student) < 1e-9
    assert teacher.difference(dual.teacher) < 1e-9
    if centering == "centering":
        for name, center in reference.centers.items():
            assert (engine.objective.state[f"{name}_center"] - center).abs().max() < 1e-9
            assert center.abs().max() > 1e-4
    else:
        assert engine.objective.state == {}


def test_what_is_logged_adds_up(tmp_path):
    objective = Dinov2Objective(dino_weight=0.5, ibot_weight=2.0, koleo_weight=0.3)
    engine = tiny_dinov2_engine(tiny_dinov2("simprune", 0.8), objective)
    DinoTrainer(engine, tiny_schedules(4), MaskedViews(), loop_settings(tmp_path)).train()
    for step, record in enumerate(lines(tmp_path)):
        weighted = 0.5 * record["dino_loss"] + 2 * record["ibot_loss"] + 0.3 * record["koleo_loss"]
        assert record["loss"] == pytest.approx(weighted, abs=1e-12)
        assert record["kl"] == pytest.approx(record["dino_loss"] - record["teacher_entropy"], abs=1e-12)
        assert record["masked_tokens"] == pytest.approx(masked_views(step).masks.sum().item() / 6)
        assert 0 <= record["masked_tokens_kept"] < record["masked_tokens"]
    # at the start the most dissimilar pairs leave, which are the masked ones
    assert lines(tmp_path)[-1]["masked_tokens_kept"] > 0


def test_views_without_masks_train_on_cls_alone():
    engine = tiny_dinov2_engine()
    result = engine.step([tiny_views()], tiny_schedules().at(10))
    assert result.parts["ibot_loss"] == result.parts["masked_tokens"] == 0
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("reduction", ["none", "simprune", "evit"])
@pytest.mark.parametrize("masks", [True, False])
def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter(reduction, masks):
    engine = tiny_dinov2_engine(tiny_dinov2(reduction, 0.6))
    engine.optimizer.zero_grad = lambda: None
    views = masked_views()
    if not masks:  # as data-parallel wrappers want it, also where chance masks nothing
        views = views._replace(masks=torch.zeros_like(views.masks))
    engine.step([views], tiny_schedules().at(10))
    assert all(p.grad is None for p in engine.dual.teacher.parameters())
    assert all(p.grad is not None for p in engine.dual.student.parameters() if p.requires_grad)


def test_koleo_off_needs_no_second_image():
    engine = tiny_dinov2_engine(objective=Dinov2Objective(koleo_weight=0.0))
    assert math.isfinite(engine.step([masked_views(batch=1)], tiny_schedules().at(10)).loss)


def test_shared_heads_are_one_head():
    dual = tiny_dinov2(shared_heads=True)
    assert dual.student.patch_head is None
    tokens = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(dual.student.project_patches(tokens), dual.student.head(tokens))
    separate = tiny_dinov2()
    assert not torch.equal(separate.student.project_patches(tokens), separate.student.head(tokens))


def test_the_mask_hides_the_pixels_from_the_student_and_not_from_the_teacher():
    dual = tiny_dinov2().eval()
    views = masked_views()
    hidden = views.masks.view(6, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(hidden, torch.randn_like(views.global_crops), views.global_crops)
    first, second = (dual(crops, None, torch.tensor(0.0), views.masks) for crops in (views.global_crops, other))
    assert torch.equal(first.student_logits, second.student_logits)
    assert torch.equal(first.student_patch_logits, second.student_patch_logits)
    assert not torch.equal(first.teacher_patch_logits, second.teacher_patch_logits)


@pytest.mark.parametrize("architecture", ["vit_micro", "deit_tiny"])
def test_vit_and_deit_can_be_masked_too(architecture):
    dual = tiny_dinov2("simprune", 0.6, architecture=architecture)
    engine = tiny_dinov2_engine(dual)
    before = dual.student.backbone.embeddings.mask_token.clone()
    losses = [engine.step([masked_views(i)], tiny_schedules().at(10)).loss for i in range(2)]
    assert all(map(math.isfinite, losses))
    assert not torch.equal(before, dual.student.backbone.embeddings.mask_token)


def test_gradient_checkpointing_gives_the_same_step():
    engines = [tiny_dinov2_engine(tiny_dinov2("simprune", 0.6, drop_path_rate=0.2)) for _ in range(2)]
    engines[1].dual.student.backbone.activation_checkpointing_enable()
    for step in range(2):
        results = []
        for engine in engines:
            torch.manual_seed(step)
            results.append(engine.step([masked_views(step)], tiny_schedules().at(step)).loss)
        assert results[0] == pytest.approx(results[1], abs=1e-12)


def build(folder, reduction, centering, seed=0, **changes):
    dual = tiny_dinov2(reduction, 0.6, dtype=torch.float32, drop_path_rate=0.3, seed=seed)
    engine = tiny_dinov2_engine(dual, Dinov2Objective(centering=centering))
    options = {key: changes.pop(key) for key in ("evaluate",) if key in changes}
    source = MaskedViews(dtype=torch.float32)
    settings = loop_settings(folder, save_steps=4, logging_steps=2, **changes)
    return DinoTrainer(engine, tiny_schedules(8), source, settings, **options)


@pytest.mark.parametrize(
    ("reduction", "centering"), [("simprune", "centering"), ("random", "sinkhorn_knopp"), ("evit", "centering")]
)
def test_a_resumed_run_equals_the_undisturbed_one_to_the_last_digit(tmp_path, reduction, centering):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    straight = build(whole, reduction, centering)
    straight.train()

    def stop_at_5(step, stopped):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return {"knn_accuracy": 0.5}

    with pytest.raises(TrainingInterrupted):
        build(parts, reduction, centering, evaluate=stop_at_5, knn_every=5).train()
    resumed = build(parts, reduction, centering, seed=99)
    resumed.resume("latest")
    resumed.train()
    keys = ("step", "loss", "kl", "masked_tokens_kept", *PARTS)
    assert [[record[key] for key in keys] for record in lines(parts)] == [
        [record[key] for key in keys] for record in lines(whole)
    ]
    for name, tensor in straight.engine.dual.state_dict().items():
        assert torch.equal(tensor, resumed.engine.dual.state_dict()[name]), name
    assert straight.engine.objective.state.keys() == resumed.engine.objective.state.keys()
    for name, center in straight.engine.objective.state.items():
        assert torch.equal(center, resumed.engine.objective.state[name]) and center.abs().max() > 0


def test_a_checkpoint_of_another_objective_or_centring_is_refused(tmp_path):
    build(tmp_path, "none", "centering").save()
    with pytest.raises(InputError, match="another --objective or --centering"):
        build(tmp_path, "none", "sinkhorn_knopp").resume("latest")
    dino = DinoTrainer(tiny_engine(), tiny_schedules(8), MaskedViews(), loop_settings(tmp_path))
    with pytest.raises(InputError, match="another architecture"):
        dino.resume("latest")


def test_collapse_is_recognised_by_the_loss_on_cls(tmp_path):
    trainer = DinoTrainer(tiny_dinov2_engine(), tiny_schedules(240), MaskedViews(), loop_settings(tmp_path))
    step, entropy = trainer.engine.step([masked_views()], tiny_schedules().at(0)), 0.99 * math.log(OUT_DIM)
    parts = step.parts | {"dino_loss": entropy + 0.001}
    uniform = type(step)(entropy + 7.0, entropy, 1.0, skipped=False, parts=parts)
    trainer.engine.step = lambda *a, **k: uniform
    trainer.train()
    assert "uniform collapse" in (tmp_path / "metrics.jsonl").read_text()


def test_views_carry_masks_behind_what_they_had():
    assert Views(1, 2, (3,)).masks is None
