"""Whole training steps against an independent trainer, and the exactness claims that hold for whole steps."""

import json

import pytest
import torch
from accelerate import Accelerator
from transformers import ViTConfig

from hf_simprune.dino.engine import DinoEngine, NonFiniteLossError, Views
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings

from .conftest import OUT_DIM, TINY, FixedViews, tiny_dual, tiny_engine, tiny_schedules, tiny_views
from .reference_dino import ReferenceNet, ReferenceTrainer


def loop_settings(folder, **changes):
    values = {"output_dir": folder, "images_per_step": 3, "logging_steps": 1, "save_steps": 1000, "disable_tqdm": True}
    return LoopSettings(**(values | changes))


def trained(folder, engine, source=None, schedules=None, **changes):
    """Run to the end; returns the logged losses."""
    settings = loop_settings(folder, **changes)
    trainer = DinoTrainer(engine, schedules or tiny_schedules(), source or FixedViews(), settings)
    trainer.train()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("reduction", ["none", "simprune"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("local", [0, 2])
def test_twenty_steps_equal_an_independent_trainer(tmp_path, local, micro, reduction):
    dual = tiny_dual(reduction, keep_rate=1.0)
    config = ViTConfig(image_size=16, patch_size=4, layer_norm_eps=1e-6, **TINY)
    student, teacher = (ReferenceNet(config, OUT_DIM, 32, 12).double() for _ in range(2))
    student.load_ours(dual.student)
    teacher.load_ours(dual.teacher)
    schedules = tiny_schedules()

    def schedule(step):
        v = schedules.at(step)
        return v.learning_rate, v.weight_decay, v.momentum_teacher, v.teacher_temp, v.last_layer_frozen

    reference = ReferenceTrainer(student, teacher, OUT_DIM, schedule)
    source = FixedViews(micro, local=local)
    expected = []
    for step, micro_batches in zip(range(20), source.batches(0), strict=False):
        as_lists = []
        for views in micro_batches:
            crops = list(views.global_crops.chunk(2))
            as_lists.append(crops + (list(views.local_crops.chunk(local)) if local else []))
        expected.append(reference.step(step, as_lists))
    engine = tiny_engine(dual)
    losses = trained(tmp_path, engine, source, schedules)
    assert losses == pytest.approx(expected, abs=1e-9, rel=0)
    assert max(losses) - min(losses) > 1e-3  # something was learned, so that equality says something
    assert student.difference(dual.student) < 1e-9
    assert teacher.difference(dual.teacher) < 1e-9
    assert (engine.center - reference.center[0]).abs().max() < 1e-9


@pytest.mark.parametrize("architecture", ["vit_micro", "deit_tiny"])
def test_keep_rate_one_is_dense_bit_for_bit_with_the_reducer_executed(tmp_path, architecture):
    runs = {}
    for reduction in ("none", "simprune"):
        folder = tmp_path / reduction
        folder.mkdir()
        dual = tiny_dual(reduction, keep_rate=1.0, dtype=torch.float32, architecture=architecture, drop_path_rate=0.1)
        calls = []
        if dual.reducer is not None:
            pair = dual.reducer.pair
            dual.reducer.pair = lambda *a, pair=pair, calls=calls: calls.append(1) or pair(*a)
        runs[reduction] = trained(folder, tiny_engine(dual), FixedViews(dtype=torch.float32))
        assert len(calls) == (60 if reduction == "simprune" else 0)  # three layers on twenty steps
    assert runs["none"] == runs["simprune"]


def test_one_large_batch_equals_accumulated_small_ones():
    whole, parts = tiny_engine(tiny_dual("simprune", 0.6)), tiny_engine(tiny_dual("simprune", 0.6))
    schedules = tiny_schedules()
    for step in range(6):
        views = tiny_views(step, batch=32)
        crops, local = views.global_crops.unflatten(0, (2, 32)), views.local_crops.unflatten(0, (2, 32))
        micro = [Views(crops[:, i : i + 8].flatten(0, 1), local[:, i : i + 8].flatten(0, 1)) for i in range(0, 32, 8)]
        a, b = whole.step([views], schedules.at(step)), parts.step(micro, schedules.at(step))
        assert a.loss == pytest.approx(b.loss, abs=1e-6)
        assert (whole.center - parts.center).abs().max() < 1e-6
    for p, q in zip(whole.dual.parameters(), parts.dual.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6


def test_drop_path_is_applied_to_the_student_only():
    dual = tiny_dual(drop_path_rate=0.5)
    dual.train()
    views = tiny_views()
    progress = torch.tensor(0.0)
    first, second = (dual(views.global_crops, views.local_crops, progress) for _ in range(2))
    assert torch.equal(first.teacher_logits, second.teacher_logits)
    assert not torch.equal(first.student_logits, second.student_logits)


def test_both_branches_and_local_crops_keep_exactly_k_tokens():
    dual = tiny_dual("simprune", 0.6)
    views = tiny_views()
    output = dual(views.global_crops, views.local_crops, torch.tensor(0.5))
    counts = [[part.shape[1] for part in stage] for stage in output.kept]
    assert counts == [[10, 10, 3], [6, 6, 2], [4, 4, 2]]  # ceil(.6·16) …; ceil(.6·4) …


def test_teacher_receives_no_gradient_and_student_all():
    engine = tiny_engine(tiny_dual("simprune", 0.6))
    engine.optimizer.zero_grad = lambda: None
    engine.step([tiny_views()], tiny_schedules().at(10))
    assert all(p.grad is None for p in engine.dual.teacher.parameters())
    assert all(p.grad is not None for p in engine.dual.student.parameters() if p.requires_grad)


def state(engine):
    tensors = {**engine.dual.state_dict(), "center": engine.center}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_unchanged(before, engine):
    for name, tensor in state(engine).items():
        assert torch.equal(before[name], tensor), name


def test_non_finite_loss_changes_nothing():
    engine = tiny_engine()
    engine.step([tiny_views()], tiny_schedules().at(10))
    before = state(engine)
    views = tiny_views()
    views.global_crops[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError):
        engine.step([tiny_views(1), views], tiny_schedules().at(11))
    assert_unchanged(before, engine)


def test_non_finite_gradient_is_skipped_and_changes_nothing():
    engine = tiny_engine()
    engine.step([tiny_views()], tiny_schedules().at(10))
    before = state(engine)
    weight = engine.dual.student.backbone.layernorm.weight
    handle = weight.register_hook(lambda g: g * float("inf"))
    assert engine.step([tiny_views(1)], tiny_schedules().at(11)).skipped
    assert_unchanged(before, engine)
    handle.remove()
    assert not engine.step([tiny_views(1)], tiny_schedules().at(11)).skipped


class OverflowingScaler(torch.amp.GradScaler):
    """A gradient scaler that works on the CPU and finds an overflow on chosen calls."""

    def __init__(self, overflows):
        super().__init__("cpu", init_scale=16.0, enabled=True)
        self.overflows, self.calls = overflows, 0

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if self.calls in self.overflows:
            state = self._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = {torch.device("cpu"): torch.tensor(1.0)}
        self.calls += 1


def test_scaled_training_equals_unscaled_and_an_overflow_moves_nothing(tmp_path):
    plain = tiny_engine(tiny_dual(dtype=torch.float32))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = OverflowingScaler({1})
    scaled = DinoEngine(tiny_dual(dtype=torch.float32), accelerator)
    schedules = tiny_schedules()
    views = [tiny_views(i, dtype=torch.float32) for i in range(2)]
    for engine in (plain, scaled):
        assert not engine.step([views[0]], schedules.at(10)).skipped
    before = state(scaled)
    assert scaled.step([views[1]], schedules.at(11)).skipped
    assert_unchanged(before, scaled)
    assert accelerator.scaler.get_scale() == 8.0
    for engine in (plain, scaled):
        assert not engine.step([views[1]], schedules.at(11)).skipped
    for name, tensor in state(plain).items():
        torch.testing.assert_close(tensor, state(scaled)[name], rtol=1e-4, atol=1e-5)


def test_skipped_step_moves_no_schedule(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = OverflowingScaler({2})
    engine = DinoEngine(tiny_dual(dtype=torch.float32), accelerator)
    original = engine.step
    rates, skipped = [], []

    def step(views, values, diagnostics=False):
        result = original(views, values, diagnostics)
        rates.append(values.learning_rate)
        skipped.append(result.skipped)
        return result

    engine.step = step
    trainer = DinoTrainer(engine, tiny_schedules(6), FixedViews(dtype=torch.float32), loop_settings(tmp_path))
    trainer.train()
    assert skipped == [False, False, True, False, False, False, False] and rates[2] == rates[3]
    assert trainer.step == 6 and trainer.batches_seen == 7


def test_global_and_per_parameter_clipping_differ_and_hold():
    norms = {}
    for name, options in {"global": {"max_grad_norm": 0.01}, "each": {"clip_grad": 0.01}}.items():
        engine = tiny_engine(**options)
        engine.optimizer.zero_grad = lambda: None
        engine.step([tiny_views()], tiny_schedules().at(10))
        norms[name] = [p.grad.norm().item() for p in engine.dual.student.parameters() if p.grad is not None]
    assert sum(n**2 for n in norms["global"]) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert max(norms["each"]) == pytest.approx(0.01, rel=1e-3) and sum(n**2 for n in norms["each"]) ** 0.5 > 0.02


def test_gradient_checkpointing_gives_the_same_step():
    engines = [tiny_engine(tiny_dual("simprune", 0.6, drop_path_rate=0.2)) for _ in range(2)]
    engines[1].dual.student.backbone.activation_checkpointing_enable()
    for step in range(3):
        results = []
        for engine in engines:
            torch.manual_seed(step)
            results.append(engine.step([tiny_views(step)], tiny_schedules().at(step)).loss)
        assert results[0] == pytest.approx(results[1], abs=1e-12)
