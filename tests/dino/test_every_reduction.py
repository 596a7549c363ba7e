"""What holds for a training with any token-reduction method, those to come included."""

import json
import os
import signal

import pytest
import torch

from hf_simprune.dino.branch_passes import walk_alone
from hf_simprune.dino.dual_branch import DualBranch
from hf_simprune.dino.objective import Views
from hf_simprune.dino.trainer import DinoTrainer, LoopSettings
from hf_simprune.errors import TrainingInterrupted
from hf_simprune.reduction import (
    METHODS,
    BranchReducer,
    BranchWalk,
    Kept,
    PairReducer,
    PairSelection,
    ReductionSetting,
    Selection,
)
from hf_simprune.reduction.base import all_indices

from .conftest import FixedViews, tiny_branch, tiny_dual, tiny_engine, tiny_schedules, tiny_views


every_method = pytest.mark.parametrize("name", list(METHODS))
# Other draws in other batches; a number of tokens that follows the batch.
depends_on_the_batch = {"random", "simprune_dynamic"}
single_branch = pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name], BranchReducer)])
HALF = torch.tensor(0.5)
KEEP = 0.5  # the least that every method takes; of 4 x 4 patches something goes at every stage


def forward(dual, views, seed=0):
    torch.manual_seed(seed)
    return dual(views.global_crops, views.local_crops, HALF)


def trained(dual, steps=2, micro=1, **views):
    """The losses of some steps that move everything, and the engine."""
    engine = tiny_engine(dual)
    losses = []
    for step, micro_batches in zip(range(steps), FixedViews(micro, **views).batches(0), strict=False):
        torch.manual_seed(step)
        engine.before_step(step, 10, micro_batches)
        losses.append(engine.step(micro_batches, tiny_schedules().at(10 + step)).loss)
    return losses, engine


@every_method
@pytest.mark.parametrize(("local", "micro"), [(0, 1), (2, 2)])
def test_three_steps_move_every_parameter_of_student_and_teacher(name, local, micro):
    dual = tiny_dual(name, KEEP, layers=(1, 2))
    before = {key: value.clone() for key, value in dual.named_parameters()}
    losses, _ = trained(dual, 3, micro, local=local)
    assert len(set(losses)) == 3 and all(map(torch.isfinite, torch.tensor(losses)))
    # the modules of local crops rest without them, and prototypes on unit length do not move in length
    still = [key for key, value in dual.named_parameters() if torch.equal(before[key], value)]
    assert all("reduction" in key and not local for key in still if "weight_g" not in key and "original0" not in key)


@every_method
@pytest.mark.parametrize("architecture", ["vit_micro", "deit_tiny"], ids=["1 prefix token", "2 prefix tokens"])
def test_both_branches_and_local_crops_have_the_counts_that_the_method_tells(name, architecture):
    dual = tiny_dual(name, KEEP, layers=(0, 2), architecture=architecture)
    output = forward(dual, tiny_views())
    assert len(output.maps) == 2
    for branch, grid in ((0, (4, 4)), (1, (4, 4)), (2, (2, 2))):
        maps = [stage[branch] for stage in output.maps]
        found = [maps[0].count] + [after(one) for one in maps]
        if name != "simprune_dynamic":  # its gates decide
            assert found == dual.reducer.counts(grid)
        assert found[0] == grid[0] * grid[1]
        assert found[1] < found[0] or branch == 2  # 2 x 2 patches are too few for some
        assert [one.count for one in maps[1:]] == found[1:-1]


def after(token_map):
    """Output tokens of a map."""
    return token_map.apply(torch.zeros(*token_map.groups().shape, 1, dtype=torch.float64)).shape[1]


@every_method
def test_keep_rate_one_is_dense_training(name):
    dense, kept = (forward(tiny_dual(reduction), tiny_views()) for reduction in ("none", name))
    assert torch.allclose(dense.student_logits, kept.student_logits, rtol=0, atol=1e-6)
    assert torch.allclose(dense.teacher_logits, kept.teacher_logits, rtol=0, atol=1e-6)


@every_method
def test_a_pass_depends_on_its_own_crops_and_on_nothing_before_it(name):
    dual = tiny_dual(name, KEEP).eval()
    first = forward(dual, tiny_views(0))
    forward(dual, tiny_views(1))
    again = forward(dual, tiny_views(0))
    assert torch.equal(first.student_logits, again.student_logits)
    assert torch.equal(first.teacher_logits, again.teacher_logits)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in depends_on_the_batch])
def test_accumulated_micro_batches_equal_one_batch(name):
    whole, parts = tiny_engine(tiny_dual(name, KEEP)), tiny_engine(tiny_dual(name, KEEP))
    for step in range(2):
        views = tiny_views(step, batch=8)
        crops, local = (part.unflatten(0, (2, 8)) for part in (views.global_crops, views.local_crops))
        micro = [Views(crops[:, i : i + 4].flatten(0, 1), local[:, i : i + 4].flatten(0, 1)) for i in (0, 4)]
        values = tiny_schedules().at(10 + step)
        assert whole.step([views], values).loss == pytest.approx(parts.step(micro, values).loss, abs=1e-7)
    for p, q in zip(whole.dual.parameters(), parts.dual.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5


@every_method
def test_gradient_checkpointing_changes_no_bit(name):
    duals = [tiny_dual(name, KEEP, drop_path_rate=0.2) for _ in range(2)]
    duals[1].student.backbone.activation_checkpointing_enable()
    (plain, _), (thrifty, _) = (trained(dual, 3) for dual in duals)
    assert plain == thrifty
    for p, q in zip(*(dual.parameters() for dual in duals), strict=True):
        assert torch.equal(p, q)


def trainer(folder, name, weights=0, **changes):
    settings = LoopSettings(
        output_dir=folder, images_per_step=3, logging_steps=1, save_steps=100, steps_per_epoch=2, disable_tqdm=True
    )
    dual = tiny_dual(name, KEEP, dtype=torch.float32, drop_path_rate=0.3, seed=weights)
    return DinoTrainer(tiny_engine(dual), tiny_schedules(5), FixedViews(dtype=torch.float32), settings, **changes)


@every_method
def test_a_resumed_run_equals_the_undisturbed_one_to_the_last_digit(tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    straight = trainer(whole, name)
    straight.train()
    interrupted = trainer(parts, name)
    step = interrupted.engine.step

    def stop_at_2(views, values, diagnostics=False):
        if interrupted.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(views, values, diagnostics)

    interrupted.engine.step = stop_at_2
    with pytest.raises(TrainingInterrupted, match="after step 2"):
        interrupted.train()
    resumed = trainer(parts, name, weights=99)  # other weights, so that loading must replace them all
    resumed.resume("latest")
    resumed.train()
    keys = ("step", "loss", "teacher_entropy", "gradient_norm")
    logged = [
        [[json.loads(line)[key] for key in keys] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, parts)
    ]
    assert len(logged[0]) == 5 and logged[0] == logged[1]
    found = resumed.engine.dual.state_dict()
    for key, tensor in straight.engine.dual.state_dict().items():
        assert torch.equal(tensor, found[key]), key


@single_branch
@pytest.mark.parametrize("layers", [(1, 2), (1, 3)], ids=["", "a stage in the last block"])
def test_cls_is_that_of_a_pass_in_which_the_last_block_computes_all_tokens(name, layers):
    dual = tiny_dual(name, KEEP, layers=layers).eval()
    net, learned, crops = dual.student.backbone, dual.student.reduction, tiny_views().global_crops
    with torch.no_grad():
        short, maps = walk_alone(net, net.embed(crops), (4, 4), dual.reducer, learned)
        walk, tokens = BranchWalk(dual.reducer, 1, (4, 4), learned), net.embed(crops)
        for index, layer in enumerate(net.layers):
            tokens = walk.block(index, layer, tokens)
        whole, _ = walk_alone(net, net.embed(crops), (4, 4), dual.reducer, learned, whole=True)
    assert short.shape == (6, 1, 24)
    assert torch.allclose(short, tokens[:, :1], rtol=0, atol=1e-9)
    assert torch.equal(whole, tokens) and whole.shape[1] > 1
    for ours, theirs in zip(maps, walk.maps, strict=False):
        assert torch.equal(ours.groups(), theirs.groups())


@single_branch
def test_each_branch_passes_alone_through_its_own_network(name):
    dual, views = tiny_dual(name, KEEP), tiny_views()
    for parameter in dual.student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    dual.eval()
    output = forward(dual, views)

    def logits(branch, *crops):
        net, cls = branch.backbone, []
        for part in crops:
            grid = (part.shape[-2] // 4, part.shape[-1] // 4)
            tokens, _ = walk_alone(net, net.embed(part), grid, dual.reducer, branch.reduction)
            cls.append(net.layernorm(tokens[:, 0]))
        return branch.head(torch.cat(cls))

    student = logits(dual.student, views.global_crops, views.local_crops)
    assert torch.allclose(output.student_logits, student, rtol=0, atol=1e-12)
    assert torch.allclose(output.teacher_logits, logits(dual.teacher, views.global_crops), rtol=0, atol=1e-12)
    assert (output.teacher_logits - student[:6]).abs().max() > 1e-3


class Weighing(PairReducer):
    """Keeps all tokens and gives the student's a factor."""

    name = "weighing"

    def __init__(self, factor, layers):
        super().__init__(1.0, ReductionSetting(layers))
        self.factor = factor
        self.stages = []

    def pair(self, student, teacher, progress, stage=0, learned=None):
        self.stages.append(("pair", stage, student.requires_grad))
        factors = None if self.factor is None else self.factor.expand(student.shape[:2])
        return PairSelection(all_indices(student), all_indices(teacher), factors)

    def local(self, local, teacher, progress, stage=0, learned=None):
        self.stages.append(("local", stage, local.requires_grad))
        factors = None if self.factor is None else self.factor.expand(local.shape[:2])
        return Selection(all_indices(local), factors)


def weighed(factor, layers=(1, 2)):
    torch.manual_seed(0)
    dual = DualBranch(tiny_branch(), tiny_branch(), Weighing(factor, layers)).double()
    return dual, forward(dual, tiny_views())


def test_factors_weigh_the_students_kept_patches_and_neither_cls_nor_the_teacher():
    plain, one = weighed(None), weighed(torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(plain[1].student_logits, one[1].student_logits)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    dual, output = weighed(factor)
    assert dual.reducer.stages == [(kind, stage, False) for kind in ("pair", "local") for stage in (0, 1)]
    assert torch.equal(plain[1].teacher_logits, output.teacher_logits)
    output.student_logits.sum().backward()
    assert factor.grad.abs() > 0

    net, views = dual.student.backbone, tiny_views()
    cls = []
    for crops in (views.global_crops, views.local_crops):
        tokens = net.embed(crops)
        for index, layer in enumerate(net.layers):
            tokens = layer(tokens, half="attention")
            if index in (1, 2):
                tokens = torch.cat([tokens[:, :1], 2 * tokens[:, 1:]], dim=1)
            tokens = layer(tokens, half="mlp")
        cls.append(net.layernorm(tokens[:, 0]))
    assert torch.allclose(output.student_logits, dual.student.head(torch.cat(cls)), rtol=0, atol=1e-12)


def test_factors_are_gathered_with_their_tokens():
    class Last(Weighing):
        def pair(self, student, teacher, progress, stage=0, learned=None):
            keep = torch.tensor([[3, 7]]).expand(len(student), 2)
            return PairSelection(keep, keep, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(student), 2))

    torch.manual_seed(0)
    dual = DualBranch(tiny_branch(), tiny_branch(), Last(None, (1,))).double()
    views = Views(tiny_views().global_crops, None)
    net, tokens = dual.student.backbone, dual.student.backbone.embed(views.global_crops)
    tokens = net.layers[1](net.layers[0](tokens), half="attention")
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + 3 : 2 + 3], 0 * tokens[:, 1 + 7 : 2 + 7]], dim=1)
    tokens = net.layers[3](net.layers[2](net.layers[1](tokens, half="mlp")))
    expected = dual.student.head(net.layernorm(tokens[:, 0]))
    output = forward(dual, views)
    assert torch.allclose(output.student_logits, expected, rtol=0, atol=1e-12)
    assert [part.tolist() for part in output.kept[0][:2]] == [[[3, 7]] * 6] * 2 and output.kept[0][2].numel() == 0


class Learning(BranchReducer):
    """Keeps the first half, scaled by a parameter, which also has a loss of its own."""

    name = "learning"
    site = "after"
    learns = True

    def __init__(self, layers=(1, 3)):
        super().__init__(0.5, ReductionSetting(layers))
        self.loss = None

    def build_learned(self):
        return torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1)) for _ in self.layers])

    def decide(self, seen):
        self.loss = (self.loss or 0) + (seen.learned[seen.stage] - 3).square().sum()
        return Kept(all_indices(seen.patches)[:, ::2], seen.patches.shape[1])

    def take_auxiliary_loss(self):
        loss, self.loss = self.loss, None
        return loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_methods_own_loss_reaches_what_it_learns_once(checkpointing):
    torch.manual_seed(0)
    dual = DualBranch(tiny_branch(), tiny_branch(), Learning()).double()
    if checkpointing:
        dual.student.backbone.activation_checkpointing_enable()
    dual.train()
    for _ in range(2):  # what the backward pass computes again must not be counted in the next pass
        dual.zero_grad()
        output = forward(dual, tiny_views())
        assert output.auxiliary_loss.item() == 3 * (1 - 3) ** 2  # teacher, student, local crops
        output.auxiliary_loss.backward(retain_graph=True)
        output.student_logits.sum().backward()
        gradients = [parameter.grad.item() for parameter in dual.student.reduction]
        # the stage in the last block does not run, and has a gradient all the same
        assert gradients == [2 * 2 * (1 - 3), 0]
    assert [len(dual.state_dict()[f"{branch}.reduction.0"]) for branch in ("student", "teacher")] == [1, 1]
    assert not any(parameter.requires_grad for parameter in dual.teacher.parameters())
