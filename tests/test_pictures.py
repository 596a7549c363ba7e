# SPDX-License-Identifier: Apache-2.0
"""The pictures, by the pixels of the files."""

import numpy as np
import pytest
from PIL import Image

from hf_simprune.errors import InputError
from hf_simprune.pictures import PrunedView, plot_loss_curve, plot_pruned_tokens


LOSS, ENTROPY, KL, KNN = (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0)
FRAMES = [(213, 94, 0), (0, 114, 178), (0, 158, 115)]  # of the first, second and third stage


def pixels(png):
    return np.asarray(Image.open(png).convert("RGB")).astype(int)


def near(array, color, tolerance=6):
    return (np.abs(array - np.array(color)).max(axis=-1) <= tolerance).sum()


def tint(color, shade):
    """What a dropped patch of a grey image should look like."""
    return tuple(0.15 * shade + 0.85 * (0.45 * channel + 0.55 * 255) for channel in color)


def records(steps=50):
    return [
        {"step": s, "loss": 6 - s / steps, "teacher_entropy": 5 - s / steps, "kl": 1.0, "learning_rate": 1e-3}
        for s in range(1, steps)
    ]


def test_loss_curve_draws_what_was_logged_and_nothing_else(tmp_path):
    bare = [{"step": r["step"], "loss": r["loss"]} for r in records()]
    plot_loss_curve(bare, tmp_path / "bare.png")
    plot_loss_curve(records(), tmp_path / "kl.png")
    knn = [{"step": 0, "knn_accuracy": 0.3}, *records(), {"step": 50, "knn_accuracy": 0.6, "images": 10}]
    plot_loss_curve(knn, tmp_path / "all.png", {"raw pixels": 0.4})
    drawn = {name: pixels(tmp_path / f"{name}.png") for name in ("bare", "kl", "all")}
    assert [near(drawn["bare"], color) > 100 for color in (LOSS, ENTROPY, KL, KNN)] == [True, False, False, False]
    assert [near(drawn["kl"], color) > 100 for color in (LOSS, ENTROPY, KL, KNN)] == [True, True, True, False]
    assert [near(drawn["all"], color) > 100 for color in (LOSS, ENTROPY, KL, KNN)] == [True, True, True, True]
    heights = [drawn[name].shape[0] for name in ("bare", "kl", "all")]
    assert heights[0] < heights[1] < heights[2]


def test_loss_curve_falls_where_the_loss_falls(tmp_path):
    plot_loss_curve([{"step": s, "loss": 5 - s / 10} for s in range(41)], tmp_path / "loss.png")
    rows, columns = np.nonzero(np.abs(pixels(tmp_path / "loss.png") - LOSS).max(axis=-1) <= 6)
    in_line = columns < np.quantile(columns, 0.6)  # the legend lies to the right
    assert np.corrcoef(rows[in_line], columns[in_line])[0, 1] > 0.95  # rows count downwards


def test_one_evaluation_is_visible_as_a_point(tmp_path):
    plot_loss_curve([*records(), {"step": 20, "knn_accuracy": 0.5}], tmp_path / "point.png")
    assert near(pixels(tmp_path / "point.png"), KNN) > 30


def test_a_run_without_a_loss_has_no_curve(tmp_path):
    with pytest.raises(InputError, match="no logged step holds a loss"):
        plot_loss_curve([{"step": 0, "knn_accuracy": 0.5}], tmp_path / "none.png")


def test_each_stage_colours_as_many_patches_as_it_dropped(tmp_path):
    shade = 102
    image = np.full((64, 64, 3), shade / 255)
    grid = np.zeros((8, 8), int)
    grid.flat[:8], grid.flat[8:24], grid.flat[24:28] = 1, 2, 3
    view = PrunedView("student, view A", image, [grid, np.zeros((8, 8), int)])
    plot_pruned_tokens([view], ["start", "end"], ["block 1", "block 3", "block 4"], tmp_path / "tokens.png")
    picture = pixels(tmp_path / "tokens.png")
    counts = [near(picture, tint(color, shade), 2) for color in FRAMES]
    kept = near(picture, (shade,) * 3, 2)
    patch = counts[1] / 16
    assert patch > 500
    assert counts[0] / patch == pytest.approx(8, rel=0.05)
    assert counts[2] / patch == pytest.approx(4, rel=0.05)
    # The view, the last panel, and 36 of 64 patches of the first panel; frames cover a little of each patch.
    assert kept / patch == pytest.approx(64 + 64 + 36, rel=0.2)


def test_dropped_patches_are_framed(tmp_path):
    image, dropped = np.full((64, 64, 3), 0.4), np.zeros((4, 4), int)
    dropped.flat[::5] = 1  # four patches that do not touch
    framed = []
    for grid in (dropped, np.zeros((4, 4), int)):
        plot_pruned_tokens([PrunedView("A", image, [grid])], ["end"], ["block 1"], tmp_path / "tokens.png")
        framed.append(near(pixels(tmp_path / "tokens.png"), FRAMES[0], 60))
    assert framed[0] - framed[1] > 4 * 4 * 40  # four sides of patches of about 60 pixels; what is left is the legend


def test_patches_lie_where_the_grid_says(tmp_path):
    """The patch grid does not divide the picture of the view, and the view is not square."""
    image = np.zeros((30, 60, 3))
    grid = np.zeros((3, 5), int)
    grid[2, 0] = 1
    plot_pruned_tokens([PrunedView("A", image, [grid])], ["end"], ["block 1"], tmp_path / "tokens.png")
    picture = pixels(tmp_path / "tokens.png")
    dark = picture.max(axis=-1) <= 2
    panel_rows = np.nonzero(dark.mean(axis=1) > 0.5)[0]  # both panels are black there; text never is
    area = picture[panel_rows.min() : panel_rows.max() + 1]
    black = np.nonzero((area.max(axis=-1) <= 2).mean(axis=0) > 0.5)[0]
    gap = np.nonzero(np.diff(black) > 1)[0][0]
    left, right = black[gap + 1], black[-1]
    rows, columns = np.nonzero(np.abs(area - np.array(tint(FRAMES[0], 0))).max(axis=-1) <= 2)
    height, width = len(area), right - left
    # Bottom left of the right-hand panel: its lower third, and the first fifth of its width; the frame covers the rim.
    assert (rows.min(), rows.max()) == (pytest.approx(2 / 3 * height, abs=3), pytest.approx(height, abs=3))
    assert (columns.min(), columns.max()) == (pytest.approx(left, abs=3), pytest.approx(left + width / 5, abs=3))
    assert width == pytest.approx(2 * height, rel=0.05)


def naive_panel(image, stages, tokens, side):
    """Which colour each patch shows, patch by patch: None where it is dropped."""
    shown = {}
    for patch, token in enumerate(tokens.flat):
        row, col = divmod(patch, side)
        members = [p for p, other in enumerate(tokens.flat) if other == token and stages.flat[p] == 0]
        pixels = [image[8 * (p // side) : 8 * (p // side) + 8, 8 * (p % side) : 8 * (p % side) + 8] for p in members]
        if stages.flat[patch] == 0:
            shown[row, col] = np.mean(pixels, axis=(0, 1, 2)), len(members)
    return shown


def test_merged_patches_have_their_mean_colour_and_an_outline(tmp_path):
    """Patches of one plain colour each, five of them one token, three another one, two dropped, the others alone."""
    side, colors = 4, np.random.default_rng(5).integers(20, 236, (4, 4, 3))
    image = colors.repeat(8, axis=0).repeat(8, axis=1) / 255
    tokens = np.arange(16).reshape(4, 4)
    tokens[0, :3], tokens[1, 1], tokens[3, 0], tokens[3, 3] = 3, 3, 7, 7
    stages = np.zeros((4, 4), int)
    stages[2, 1:3] = 1
    tokens[2, 1:3] = -1
    view = PrunedView("A", image, [stages], [tokens])
    plot_pruned_tokens([view], ["end"], ["block 1"], tmp_path / "tokens.png")
    picture = pixels(tmp_path / "tokens.png")
    plot_pruned_tokens([PrunedView("A", image, [stages])], ["end"], ["block 1"], tmp_path / "plain.png")
    plain = pixels(tmp_path / "plain.png")
    expected = naive_panel(image, stages, tokens, side)
    assert sorted(size for _, size in expected.values()) == [1] * 6 + [3] * 3 + [5] * 5
    patch = near(plain, colors[0, 3], 2) / 2  # of the view and of the panel
    for (row, col), (color, size) in expected.items():
        drawn = near(picture, 255 * color, 2)
        if size > 1:
            assert drawn == pytest.approx(size * patch, rel=0.12)  # lines cover a little
            assert near(picture, colors[row, col], 2) == pytest.approx(patch, rel=0.12)  # in the view alone
        else:
            assert drawn == pytest.approx(2 * patch, rel=0.12)
    outlined = near(picture, (34, 34, 34)) - near(plain, (34, 34, 34))
    # a dozen sides of patches at the least, of about sqrt(patch) pixels each
    assert outlined > 12 * patch**0.5


def test_patches_that_are_alone_look_as_without_tokens(tmp_path):
    image, stages = np.random.default_rng(0).random((16, 16, 3)), np.zeros((4, 4), int)
    stages[0] = 1
    alone = np.where(stages > 0, -1, np.arange(16).reshape(4, 4))
    drawn = []
    for tokens in (None, [alone]):
        plot_pruned_tokens([PrunedView("A", image, [stages], tokens)], ["end"], ["block 1"], tmp_path / "x.png")
        drawn.append(pixels(tmp_path / "x.png"))
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("merged", [False, True])
def test_the_legend_of_a_narrow_picture_fits_on_it(tmp_path, merged):
    grid = np.zeros((4, 4), int) if merged else np.arange(16).reshape(4, 4) % 5
    view = PrunedView("A", np.full((64, 64, 3), 0.4), [grid], [np.zeros((4, 4), int)] if merged else None)
    stages = [f"block {layer}" for layer in range(1, 5)]
    plot_pruned_tokens([view], ["after block 4"], stages, tmp_path / "tokens.png")
    picture = pixels(tmp_path / "tokens.png")
    assert (picture[:, [0, 1, 2, -3, -2, -1]] == 255).all()


def test_views_that_do_not_fit_are_named(tmp_path):
    image, grid = np.zeros((8, 8, 3)), np.full((2, 2), 2)
    with pytest.raises(InputError, match="'A' has 1 grids, but there are 2 moments"):
        plot_pruned_tokens([PrunedView("A", image, [grid])], ["start", "end"], ["block 1"], tmp_path / "x.png")
    with pytest.raises(InputError, match="'A' has stages 2 to 2; 0 to 1 exist"):
        plot_pruned_tokens([PrunedView("A", image, [grid])], ["start"], ["block 1"], tmp_path / "x.png")
    with pytest.raises(InputError, match="'A' has 2 arrays of tokens for 1 grids"):
        view = PrunedView("A", image, [0 * grid], [grid, grid])
        plot_pruned_tokens([view], ["start"], ["block 1"], tmp_path / "x.png")
    with pytest.raises(InputError, match="no view"):
        plot_pruned_tokens([], [], [], tmp_path / "x.png")
