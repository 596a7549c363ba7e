"""Passes of a frozen network under a reduction, the two controls, and how methods are named."""

import _walks
import pytest
import torch

from hf_simprune.errors import InputError
from hf_simprune.models.architectures import build_backbone
from hf_simprune.reduction import keep_count, token_counts


METHODS = ["random", "position", "simprune@0.5", *_walks.registered("evit", "tome", "mctf")]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return build_backbone("vit_micro", 24, patch_size=4, **sizes).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def reducer(text: str, model, keep_rate: float):
    return _walks.parse_method(text).build(keep_rate, _walks.reduction_setting(model, (6, 6)))


def test_without_reduction_it_is_the_network(model, pixels):
    hidden = model(pixels).last_hidden_state
    passed = _walks.walk_pairs(model, pixels, None)
    torch.testing.assert_close(passed.cls, hidden[:, 0])
    torch.testing.assert_close(_walks.dense_tokens(model, pixels, None), hidden[:, 1:])
    assert passed.groups.tolist() == [list(range(36))] * 6


@pytest.mark.parametrize("text", METHODS)
def test_at_keep_rate_one_every_method_is_the_network(text, model, pixels):
    passed = _walks.walk_pairs(model, pixels, reducer(text, model, 1.0), 0.5)
    dense = _walks.walk_pairs(model, pixels, None)
    torch.testing.assert_close(passed.cls, dense.cls)
    assert sorted(passed.groups[0].tolist()) == list(range(36))


@pytest.mark.parametrize("text", METHODS)
def test_groups_name_the_token_that_each_patch_is_in(text, model, pixels):
    torch.manual_seed(0)
    built = reducer(text, model, 0.7)
    passed = _walks.walk_pairs(model, pixels, built, 0.5)
    count = built.counts((6, 6))[-1]
    assert passed.tokens.shape == (6, count, 24) and passed.cls.shape == (6, 24)
    for row in passed.groups.tolist():
        assert set(row) <= {-1, *range(count)}
        if text in ("random", "position", "simprune@0.5"):
            assert sorted(group for group in row if group >= 0) == list(range(count))
    assert not torch.allclose(passed.cls, _walks.walk_pairs(model, pixels, None).cls)


def test_the_views_of_simprune_are_the_student_and_the_teacher(model, pixels):
    """Its second half is the teacher's branch, which prunes what matches the student's pruned tokens."""
    built = reducer("simprune@0", model, 0.7)
    passed = _walks.walk_pairs(model, pixels, built, 0.0)
    first, images = built.layers[0], 3
    tokens = model.embed(pixels)
    for layer in model.layers[:first]:
        tokens = layer(tokens)
    tokens = model.layers[first](tokens, half="attention")[:, 1:]
    chosen = built.pair(tokens, tokens, torch.tensor(0.0))
    for image in range(images):
        survivors = {patch for patch, group in enumerate(passed.groups[image].tolist()) if group >= 0}
        assert survivors <= set(chosen.student[image].tolist())
        survivors = {patch for patch, group in enumerate(passed.groups[images + image].tolist()) if group >= 0}
        assert survivors <= set(chosen.teacher[images + image].tolist())


def test_controls_look_at_nothing(model, pixels):
    position = _walks.walk_pairs(model, pixels, reducer("position", model, 0.7)).groups
    assert (position == position[0]).all()
    torch.manual_seed(0)
    random = _walks.walk_pairs(model, pixels, reducer("random", model, 0.7)).groups
    assert len({tuple(row) for row in random.tolist()}) == 6


def test_the_position_control_keeps_the_middle():
    grid, counts = (5, 6), token_counts(30, 0.7, 3)
    alive = list(range(30))

    def distance(patch: int) -> float:
        return ((patch // 6 + 0.5) / 5 - 0.5) ** 2 + ((patch % 6 + 0.5) / 6 - 0.5) ** 2

    for places, count in zip(_walks.nested_centres(grid, counts), counts[1:], strict=True):
        kept = [alive[place] for place in places]
        dropped = set(alive) - set(kept)
        assert len(kept) == count and kept == sorted(kept)
        assert max(map(distance, kept)) <= min(map(distance, dropped)) + 1e-9
        alive = kept


def test_groups_of_stages_compose():
    stages = [torch.tensor([[0, 1, -1, 2, 1, 3]]), torch.tensor([[1, 0, -1, 1]])]
    expected = []
    for patch in range(6):
        group = stages[0][0, patch].item()
        expected.append(group if group < 0 else stages[1][0, group].item())
    assert _walks.compose(stages, torch.zeros(1, 2, 4)).tolist() == [expected] == [[1, 0, -1, -1, 0, 1]]


def test_a_dropped_patch_comes_back_as_it_left(model, pixels):
    """With tokens leaving in the last block only, what comes back is the last block's tokens after attention."""
    setting = _walks.reduction_setting(model, (6, 6))
    last = _walks.ReductionSetting(layers=(3,), num_prefix=1, grids=setting.grids)
    built = _walks.CentreBranch(0.5, last)
    found = _walks.dense_tokens(model, pixels, built)
    kept = _walks.nested_centres((6, 6), built.counts((6, 6)))[0]
    tokens = model.embed(pixels)
    for layer in model.layers[:3]:
        tokens = layer(tokens)
    attended = model.layers[3](tokens, half="attention")
    whole = model.layers[3](attended, half="mlp")
    for patch in range(36):
        expected = (whole if patch in kept else attended)[:, 1 + patch]
        torch.testing.assert_close(found[:, patch], model.layernorm(expected))
    assert len(kept) == keep_count(36, 0.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("evti", "evti is unknown"),
        ("simprune", "a window, as simprune@0.5"),
        ("random@0.5", "a window, as simprune@0.5"),
        ("simprune@1.5", "a number from 0 to 1, got 1.5"),
        ("simprune@half", "a number from 0 to 1, got half"),
        ("position:middle=true", "position has no options"),
        ("simprune@0:window=3", "window"),
    ],
)
def test_a_mistyped_method_is_refused(text, complaint):
    with pytest.raises(InputError, match=complaint):
        _walks.parse_method(text)


def test_a_checkpoint_of_a_run_is_its_teacher(model, tmp_path):
    from safetensors.torch import save_file

    from hf_simprune.models.stock import to_stock

    to_stock(model).save_pretrained(tmp_path / "training" / "initial")
    other = {f"backbone.{key}": value + 1 for key, value in model.state_dict().items()}
    (tmp_path / "checkpoint-5").mkdir()
    save_file(other | {"head.weight": torch.zeros(1)}, tmp_path / "checkpoint-5" / "teacher.safetensors")
    initial = _walks.load_backbone(str(tmp_path / "training" / "initial"))
    later = _walks.load_backbone(str(tmp_path / "checkpoint-5"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(initial.state_dict()[key], value)
        torch.testing.assert_close(later.state_dict()[key], value + 1)


def test_who_reduces_a_single_image_by_itself():
    alone = {text for text in ("none", *METHODS) if _walks.parse_method(text).reduces_alone}
    assert alone == {*METHODS} - {"simprune@0.5"}
