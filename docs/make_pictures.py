# SPDX-License-Identifier: Apache-2.0
"""The picture of pruned tokens in the README: both views of a photograph, with a trained network as both branches.

    python docs/make_pictures.py --model facebook/deit-tiny-patch16-224

The photograph comes with scikit-learn: china.jpg by danielbuechele, CC BY 2.0. The README's picture of redundant
blocks is that of the example card, which `model_cards/make_examples.py` makes; those of the page come from
`docs/make_screenshots.py`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_simprune.explore.token_walk import TokenWalk, draw_views
from hf_simprune.pictures import PrunedView, plot_pruned_tokens
from hf_simprune.rba.adapters import adapter_for
from hf_simprune.rba.checkpoint import load_checkpoint


IMAGES = Path(__file__).parent / "images"
# Of the window of kept tokens; the walk counts the tokens that leave, from the least alike on.
MOMENTS = {"start": 0.0, "middle": 0.5, "end": 1.0}
KEEP_RATE = 0.7
WIDTH = 900  # pixels


def draw(model: str, seed: int, png: Path) -> None:
    """Draw the photograph's two views, and what has left them after all stages at three moments of the curriculum."""
    checkpoint = load_checkpoint(model)
    adapter = adapter_for(checkpoint.model)
    processor, size = checkpoint.processor, adapter.image_size[0]
    photograph = torch.from_numpy(np.array(load_sample_image("china.jpg")))
    crops, shown = draw_views(photograph, size, processor.image_mean, processor.image_std, seed)
    walk = TokenWalk(adapter, crops)
    after = [walk.dropped(progress, KEEP_RATE) for progress in MOMENTS.values()]
    views = [
        PrunedView(title, shown[view], [dropped.grids[view, -1] for dropped in after])
        for view, title in enumerate(("student, view A", "teacher, view B"))
    ]
    plot_pruned_tokens(views, [f"{name} of training" for name in MOMENTS], [f"block {b}" for b in walk.layers], png)
    shrink(png)


def shrink(png: Path) -> None:
    """To the width of a page, and to 256 colours, which no eye misses and which take a quarter of the bytes."""
    drawn = Image.open(png).convert("RGB")
    drawn = drawn.resize((WIDTH, round(WIDTH * drawn.height / drawn.width)), Image.Resampling.LANCZOS)
    drawn.quantize(256).save(png, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/deit-tiny-patch16-224", help="Hub name or folder")
    parser.add_argument("--seed", type=int, default=0, help="of the views")
    parser.add_argument("--output", type=Path, default=IMAGES / "pruned_tokens.png")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(exist_ok=True)
    draw(arguments.model, arguments.seed, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
