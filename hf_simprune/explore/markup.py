# SPDX-License-Identifier: Apache-2.0
"""The answers as HTML: pictures with a text for those who do not see them, tables that follow the page's colours."""

import base64
import io
from collections.abc import Collection, Sequence
from html import escape

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ..pictures import COLORS, tinted
from ..pictures_rba import log_norm, short
from .explorer import HeatMap, TokenAnswer
from .removal import RemovalEffect


_LEAST = 1e-6  # a change of zero has no logarithm
_NUMBERED_DEPTH = 16  # deeper networks have no room for numbers in the cells
_SHOWN_SIDE = 224  # smaller pictures are enlarged pixel by pixel
_QUALITY = 90
_VIEWS = ("student, view 1", "teacher, view 2")


def notice(text: str) -> str:
    """A line in place of an answer."""
    return f'<p class="hs-notice">{escape(text)}</p>'


def token_panels(answer: TokenAnswer) -> str:
    """Both views, and what is left of them after each reduction layer."""
    stages = [f"block {layer}" for layer in answer.dropped.layers]
    colors = [COLORS[index % len(COLORS)] for index in range(len(stages))]
    patches = answer.dropped.grids[0, 0].size
    figures = []
    for view, name in enumerate(_VIEWS):
        pixels = answer.views[view]
        figures.append(_figure(pixels, name, f"{patches} patches"))
        for stage, place in enumerate(stages):
            grid = answer.dropped.grids[view, stage]
            kept = answer.dropped.kept(view, stage)
            enlarged = _enlarged(pixels, grid.shape)
            figures.append(_figure(tinted(enlarged, grid, colors), f"after {place}", f"{kept} of {patches} kept"))
    legend = "".join(
        f'<li><span class="hs-swatch" style="--hs-color:{color}"></span>dropped at {name}</li>'
        for color, name in zip(colors, stages, strict=True)
    )
    columns = 1 + len(stages)
    return (
        f'<div class="hs-panels" style="--hs-columns:{columns}">{"".join(figures)}</div>'
        f'<ul class="hs-legend"><li><span class="hs-swatch hs-plain"></span>kept: shown as it is</li>{legend}</ul>'
    )


def redundancy_tables(maps: Sequence[HeatMap], removed: Collection[int] = ()) -> str:
    """Heat-maps by first and last removed block; bright is redundant, and spans of removed blocks are framed."""
    framed = _runs(removed)
    return f'<div class="hs-maps">{"".join(_heat_map(found, framed) for found in maps)}</div>'


def effect_table(effect: RemovalEffect) -> str:
    """What changes: sizes, speed, output."""
    ratio = effect.latency_ratio
    rows = [
        ("blocks", *map(str, effect.blocks), ""),
        ("parameters, M", *_pair(effect.parameters, 1e6)),
        ("FLOPs an image, G", *_pair([2 * value for value in effect.macs], 1e9)),
        (
            "latency of this image, ms",
            *(f"{1e3 * value:.1f}" for value in effect.seconds),
            f"x{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        ),
        ("cosine of the outputs", "1", f"{effect.cosine:.3f}", ""),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "before", "after", "change"))
    return (
        f'<table class="hs-table"><caption>{escape(str(effect.plan))}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def class_bars(effect: RemovalEffect) -> str:
    """The likeliest classes before and after, as bars."""
    if not effect.classes:
        return notice("This model has no classifier: the cosine above says how far its features move.")
    rows = "".join(
        f'<tr><th scope="row">{escape(found.label)}</th><td>{_bar(found.before)}</td><td>{_bar(found.after)}</td></tr>'
        for found in effect.classes
    )
    return (
        '<table class="hs-table hs-classes"><caption>Top predictions</caption><thead><tr><th scope="col"></th>'
        f'<th scope="col">before</th><th scope="col">after</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def attention_panels(pixels: np.ndarray, effect: RemovalEffect) -> str:
    """The image, (H, W, 3) floats in 0..1, and where the last attention looks before and after, on one scale."""
    high = max(found.max() for found in effect.attention)
    figures = [_figure(pixels, "the image", "as the network sees it")]
    for name, weights in zip(("before", "after"), effect.attention, strict=True):
        shown = _enlarged(pixels, weights.shape)
        caption = f"{100 * _share(weights):.0f} % of it on a tenth of the patches"
        figures.append(_figure(_heated(shown, weights / high), f"attention {name}:", caption))
    return f'<div class="hs-panels" style="--hs-columns:3">{"".join(figures)}</div>'


def _share(weights: np.ndarray) -> float:
    """The part of the attention that the tenth of the patches with the most of it gets."""
    ordered = np.sort(weights.ravel())[::-1]
    return float(ordered[: max(1, len(ordered) // 10)].sum())


def _figure(pixels: np.ndarray, title: str, caption: str) -> str:
    text = escape(f"{title.removesuffix(':')}: {caption}", quote=True)
    return (
        f'<figure><img alt="{text}" src="{_data_url(pixels)}">'
        f"<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption></figure>"
    )


def _data_url(pixels: np.ndarray) -> str:
    shown = _enlarged(pixels, pixels.shape[:2])
    buffer = io.BytesIO()
    Image.fromarray((255 * np.clip(shown, 0, 1)).round().astype(np.uint8)).save(
        buffer, format="JPEG", quality=_QUALITY, subsampling=0
    )
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlarged(pixels: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """(H, W, 3) by a whole factor, so that small pictures are not blurred and borders of patches fall on pixels."""
    height, width = pixels.shape[:2]
    factor = max(1, -(-_SHOWN_SIDE // max(height, width)))
    if height % grid[0] or width % grid[1]:
        factor *= 2
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _heated(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The picture in grey, with weights (rows, columns) in 0..1 laid over it in colour."""
    height, width = pixels.shape[:2]
    mask = Image.fromarray(weights.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(mask), 0, 1) ** 0.5  # small weights are most of them
    grey = pixels.mean(axis=2, keepdims=True)
    return 0.45 * grey + 0.55 * colormaps["inferno"](strength)[..., :3]


def _heat_map(found: HeatMap, framed: Collection[tuple[int, int]]) -> str:
    title = f"{found.title}, on {'this image' if found.images == 1 else f'{found.images} images'}"
    matrix = found.matrix
    depth, norm, colors = len(matrix), log_norm([matrix]), colormaps["viridis_r"]
    head = "".join(f'<th scope="col">{block}</th>' for block in range(depth))
    rows = []
    for first in range(depth):
        cells = []
        for last in range(depth):
            value = matrix[first, last]
            if not np.isfinite(value):
                cells.append("<td></td>")
                continue
            place = float(norm(max(value, _LEAST)))
            ink = "#fff" if place > 0.55 else "#000"
            frame = ' class="hs-removed"' if (first, last) in framed else ""
            span = f"block {first}" if first == last else f"blocks {first} to {last}"
            number = short(value) if depth <= _NUMBERED_DEPTH else ""
            cells.append(
                f'<td{frame} style="background:{to_hex(colors(place))};color:{ink}" title="{span}: {value:.4g}">'
                f"{number}</td>"
            )
        rows.append(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="hs-scroll" tabindex="0" role="region" aria-label="{escape(title, quote=True)}">'
        f'<table class="hs-heat"><caption>{escape(title)}; rows: first block removed, columns: last; bright: redundant'
        f"</caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _runs(blocks: Collection[int]) -> set[tuple[int, int]]:
    """(first, last) of every run of neighbours."""
    firsts = sorted(block for block in blocks if block - 1 not in blocks)
    lasts = sorted(block for block in blocks if block + 1 not in blocks)
    return set(zip(firsts, lasts, strict=True))


def _pair(values: Sequence[float], unit: float) -> tuple[str, str, str]:
    before, after = values
    return f"{before / unit:.4g}", f"{after / unit:.4g}", f"{100 * (after / before - 1):+.1f} %"


def _bar(share: float) -> str:
    percent = f"{100 * share:.1f}"
    return f'<span class="hs-share"><span class="hs-bar" style="--hs-share:{percent}%"></span>{percent} %</span>'
