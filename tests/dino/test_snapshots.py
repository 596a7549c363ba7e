"""Which patches left or merged at which stage, recorded at three moments of a run."""

import pytest
import torch
from safetensors.torch import load_file

from hf_simprune.dino.snapshots import MOMENTS, PruningSnapshots, follow_tokens, moment_steps, stage_dropped
from hf_simprune.reduction import METHODS, Kept

from .conftest import tiny_dual, tiny_schedules, tiny_views


def test_moments_coincide_in_short_runs_and_none_is_lost():
    assert moment_steps(101) == {0: ("start",), 50: ("middle",), 100: ("end",)}
    assert moment_steps(2) == {0: ("start", "middle"), 1: ("end",)}
    assert moment_steps(1) == {0: MOMENTS}


def test_stages_are_followed_back_to_the_first_grid():
    kept = [torch.tensor([[0, 2, 3, 5, 6], [1, 2, 3, 4, 7]]), torch.tensor([[1, 2, 4], [0, 1, 3]])]
    followed = follow_tokens([Kept(kept[0], 8).groups(), Kept(kept[1], 5).groups()])
    # first row: 1, 4, 7 leave first; of 0 2 3 5 6 the 1st, 2nd and 4th stay: 2, 3, 6
    # second row: 0, 5, 6 leave first; of 1 2 3 4 7 there stay 1, 2, 4
    assert stage_dropped(followed).tolist() == [[2, 1, 0, 0, 1, 2, 0, 1], [1, 0, 0, 2, 0, 1, 1, 2]]
    assert followed[0, 1].tolist() == [-1, -1, 0, 1, -1, -1, 2, -1]


def test_merging_and_dropping_are_followed_as_by_walking_patch_by_patch():
    """Any mixture of both, four stages deep, also with tokens that no patch is in (as EViT's fused one)."""
    generator = torch.Generator().manual_seed(3)
    counts = [20, 14, 9, 6, 3]
    groups = [
        torch.randint(-1, after, (5, before), generator=generator)
        for before, after in zip(counts, counts[1:], strict=False)
    ]
    followed = follow_tokens(groups)
    dropped = stage_dropped(followed)
    assert followed.shape == (5, 4, 20)
    for row in range(5):
        for patch in range(20):
            token, left = patch, 0
            for stage, found in enumerate(groups):
                if left == 0:
                    token = found[row, token].item()
                    left = stage + 1 if token == -1 else 0
                assert followed[row, stage, patch] == (-1 if left else token)
            assert dropped[row, patch] == left
    assert set(dropped.unique().tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", list(METHODS))
def test_a_snapshot_of_every_method_tells_where_each_patch_is_after_every_stage(tmp_path, name):
    dual = tiny_dual(name, 0.5, layers=(1, 2), dtype=torch.float32).train()
    snapshots = PruningSnapshots(tmp_path / "tokens.safetensors", dual, 3)
    state = torch.get_rng_state()
    for step in range(3):
        snapshots(step, tiny_views(step, batch=4, dtype=torch.float32), tiny_schedules(3).at(step))
    assert torch.equal(torch.get_rng_state(), state) and dual.training and not dual.teacher.training
    stored = load_file(tmp_path / "tokens.safetensors")
    assert stored.keys() == {"views", *MOMENTS, *(f"{moment}_tokens" for moment in MOMENTS)}
    assert stored["views"].shape == (3, 2, 3, 16, 16)
    views = tiny_views(0, batch=4, dtype=torch.float32).global_crops.unflatten(0, (2, 4))
    assert torch.equal(stored["views"], views[:, :3].transpose(0, 1))  # all moments show the images of the first
    counts = dual.reducer.counts((4, 4))
    for moment in MOMENTS:
        followed = stored[f"{moment}_tokens"]
        assert followed.shape == (3, 2, 2, 16)
        assert torch.equal(stored[moment], stage_dropped(followed.flatten(0, 1)).view(3, 2, 16))
        for stage in range(2):
            groups = [view.unique() for view in followed[:, :, stage].flatten(0, 1)]
            assert all(
                (group >= 0).sum() <= (counts[stage + 1] if name != "simprune_dynamic" else 16) for group in groups
            )
            assert all(len(group) < 16 for group in groups)


def test_a_snapshot_holds_the_student_of_the_first_view_and_the_teacher_of_the_second(tmp_path):
    dual = tiny_dual("evit", 0.5, layers=(1, 2), dtype=torch.float32).train()
    for parameter in dual.student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    views = tiny_views(0, dtype=torch.float32)
    PruningSnapshots(tmp_path / "tokens.safetensors", dual, 1)(0, views, tiny_schedules(1, warmup_steps=0).at(0))
    found = load_file(tmp_path / "tokens.safetensors")["end_tokens"]
    with torch.no_grad():
        maps = dual.eval()(views.global_crops, None, torch.tensor(0.0)).maps
    for branch, rows in ((0, slice(0, 3)), (1, slice(3, 6))):
        expected = follow_tokens([stage[branch].groups() for stage in maps])
        other = follow_tokens([stage[1 - branch].groups() for stage in maps])
        assert torch.equal(found[:, branch], expected[rows])
        assert not torch.equal(found[:, branch], other[rows])
