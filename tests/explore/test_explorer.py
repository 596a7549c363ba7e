"""The questions of the page and their answers as HTML."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from hf_simprune.errors import InputError
from hf_simprune.explore import markup
from hf_simprune.explore.explorer import Explorer, spread
from hf_simprune.explore.removal import ClassShare

from .conftest import picture


class Balanced(HTMLParser):
    """Fails on a tag that is not closed."""

    VOID = ("img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def measured(checkpoint) -> Explorer:
    explorer = Explorer(checkpoint, [picture(seed) for seed in range(9)], timed_seconds=0.0)
    explorer.measure()
    return explorer


def test_a_fold_is_fitted_once_the_images_were_measured(explorer, measured):
    with pytest.raises(InputError, match="measure"):
        explorer.remove(picture(), [2], "fold")
    assert measured.remove(picture(), [2], "fold").blocks == (6, 5)
    _, costs = measured.redundancy(picture())
    assert (costs.title, costs.images) == ("Measured cost of a fold, KL of the logits, nats", 3)
    assert np.isfinite(costs.matrix.diagonal()[1:]).all() and np.isnan(costs.matrix[0]).all()


def test_redundancy_measured_on_many_images_is_the_mean_of_that_of_each(explorer, measured):
    single = [explorer.redundancy(picture(row))[0].matrix for row in measured.analysis.images.fit]
    found, _ = measured.redundancy(None)
    assert found.images == len(single) == 6
    np.testing.assert_allclose(found.matrix, np.mean(single, axis=0), rtol=1e-4)


def test_without_images_there_is_nothing_to_measure_on(checkpoint):
    explorer = Explorer(checkpoint)
    assert explorer.number_of_images == 0 and explorer.examples() == []
    assert explorer.redundancy(None) == []
    with pytest.raises(InputError, match="--dataset"):
        explorer.measure()


def test_new_views_and_new_images_are_not_answered_from_memory(explorer):
    first = explorer.tokens(picture(1), 0, 0.0, 0.7)
    assert np.array_equal(first.views, explorer.tokens(picture(1), 0, 1.0, 0.7).views)
    assert not np.array_equal(first.views, explorer.tokens(picture(1), 1, 0.0, 0.7).views)
    assert not np.array_equal(first.views, explorer.tokens(picture(2), 0, 0.0, 0.7).views)


def test_the_image_shown_is_the_one_that_the_network_reads(explorer):
    image = picture(4)
    shown = torch.from_numpy(explorer.seen(image)).permute(2, 0, 1)
    torch.testing.assert_close((shown - 0.5) / 0.25, explorer.prepare(image)[0])


def test_any_mode_of_image_is_read(explorer):
    for mode in ("L", "RGBA", "P"):
        assert explorer.prepare(picture().convert(mode)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("rows", "count", "found"), [(10, 3, [0, 4, 9]), (2, 6, [0, 1]), (0, 6, [])])
def test_examples_are_spread_over_the_rows(rows, count, found):
    assert spread(rows, count) == found


def test_every_picture_has_a_text_that_says_what_was_kept(explorer):
    text = markup.token_panels(explorer.tokens(picture(), 0, 0.5, 0.7))
    Balanced(text)
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert alts[:4] == [
        "student, view 1: 16 patches",
        "after block 1: 12 of 16 kept",
        "after block 3: 9 of 16 kept",
        "after block 4: 7 of 16 kept",
    ]
    assert len(alts) == 8 and text.count("dropped at block") == 3


def test_removed_spans_are_framed_in_the_heat_map(explorer):
    text = markup.redundancy_tables(explorer.redundancy(picture()), [1, 3, 4])
    Balanced(text)
    framed = re.findall(r'<td class="hs-removed"[^>]*title="([^:]*):', text)
    assert framed == ["block 1", "blocks 3 to 4"]
    assert text.count("title=") == 21, "one cell for every span of six blocks"


def test_tables_say_before_after_and_change_and_escape_the_labels(explorer):
    effect = explorer.remove(picture(), [2, 3])
    table = markup.effect_table(effect)
    Balanced(table)
    assert "<td>6</td><td>4</td>" in table and "identity 2→4" in table
    share = 100 * (effect.parameters[1] / effect.parameters[0] - 1)
    assert f"<td>{share:+.1f} %</td>" in table
    bars = markup.class_bars(replace(effect, classes=(ClassShare("<b>ant & bee", 0.25, 0.5),)))
    Balanced(bars)
    assert "&lt;b&gt;ant &amp; bee" in bars and "25.0 %" in bars and "50.0 %" in bars
    assert "no classifier" in markup.class_bars(replace(effect, classes=()))
    attention = markup.attention_panels(explorer.seen(picture()), effect)
    Balanced(attention)
    assert re.findall(r'<img alt="([^:]*):', attention) == ["the image", "attention before", "attention after"]


def test_a_dropped_patch_is_tinted_and_a_kept_one_shown_as_it_is(explorer):
    answer = explorer.tokens(picture(), 0, 0.5, 0.7)
    views = [_decoded(url) for url in re.findall(r'src="([^"]*)"', markup.token_panels(answer))]
    plain, last = views[0].reshape(4, 56, 4, 56, 3), views[3].reshape(4, 56, 4, 56, 3)
    change = np.abs(last - plain).mean(axis=(1, 3, 4))
    kept = answer.dropped.grids[0, -1] == 0
    assert change[kept].max() < 3 < 10 < change[~kept].min()


def _decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(float)
