"""Tiny compressed folders of every kind, and the snippets of docs/works_with.md run on them."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_simprune.evaluation.features import build_image_processor
from hf_simprune.models import SimPruneViTForImageClassification
from hf_simprune.models.sharing import save_with_code
from hf_simprune.rba.converter import convert
from hf_simprune.rba.maps import AffineMap, ConstMap
from hf_simprune.rba.plan import CompressionPlan, Half, Span

from ..rba.tiny_compression import IMAGE_SIZE, SIZES, vit
from ..tiny_run import ROOT, png


PAGE = ROOT / "docs" / "works_with.md"
LABELS = ("ant", "bee", "cat", "dog")
DEPTH, WIDTH = 4, SIZES["hidden_size"]
STOCK = CompressionPlan(DEPTH, (Span(2, 3, "fold"),))
OWN = CompressionPlan(DEPTH, (Span(1, 2, "linear"),), (Half(2, "attention", "const"), Half(3, "mlp", "linear")))
REDUCTION = {"token_reduction": "tome", "keep_rate": 0.7, "reduction_layers": [0], "restore_tokens": True}
# A shorter stock ViT, one with maps of a class of ours, and that with token reduction as well.
KINDS = ("stock", "own", "reduced")


def compress(plan: CompressionPlan, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A random image classifier, or `model`, with random maps where the plan has them."""
    torch.manual_seed(0)
    model = vit(DEPTH, len(LABELS)) if model is None else model
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: index for index, label in enumerate(LABELS)}
    maps = {
        item: ConstMap(torch.randn(WIDTH))
        if item.map == "const"
        else AffineMap(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH), 0.1 * torch.randn(WIDTH))
        for item in plan.items
    }
    return convert(model.eval(), plan, maps)


def reduced(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """`model`, of a class of ours, with token reduction."""
    config = type(model.config).from_dict({**model.config.to_dict(), **settings})
    again = type(model)(config)
    again.load_state_dict(model.state_dict())
    return again.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved folder of every kind, with its image processor."""
    root = tmp_path_factory.mktemp("works-with")
    own = compress(OWN)
    models = {"stock": compress(STOCK), "own": own, "reduced": reduced(own, **REDUCTION)}
    for kind, model in models.items():
        if isinstance(model, SimPruneViTForImageClassification):
            save_with_code(model, root / kind)
        else:
            model.save_pretrained(root / kind)
        build_image_processor(IMAGE_SIZE, [0.5] * 3, [0.25] * 3).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def snippet(heading: str) -> str:
    """The Python under a heading of the page."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    return "\n".join(block.partition("\n```")[0] for block in text.partition("\n## ")[0].split("```python\n")[1:])


class Page:
    """A folder in which the page's snippets can run, `outputs/smaller` and two pictures in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        copytree(model, folder / "outputs" / "smaller")
        for seed, name in enumerate(("one.png", "two.png")):
            (folder / name).write_bytes(png(seed, size=20))
        self.names: dict[str, Any] = {}
        self.run("Load it")
        self.model: PreTrainedModel = self.names["model"]
        self.pixels: torch.Tensor = self.names["pixels"]

    def run(self, heading: str) -> dict[str, Any]:
        """The names there are after the snippet under `heading`."""
        code = snippet(heading)
        assert code, f"{PAGE.name} has no snippet under {heading!r}"
        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), self.names)
        return self.names

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Those of the untouched model, read from the folder once more."""
        return type(self.model).from_pretrained("outputs/smaller").eval()(pixels).logits


@pytest.fixture
def open_page(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Page]:
    """The page for one kind of model, in an empty working folder."""

    def open_for(kind: str) -> Page:
        monkeypatch.chdir(tmp_path)
        return Page(tmp_path, folders[kind])

    return open_for


@pytest.fixture
def page(open_page: Callable[[str], Page], kind: str) -> Page:
    return open_page(kind)


@pytest.fixture
def others() -> torch.Tensor:
    """A batch of another size than the snippets', as the model sees it."""
    return torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They run the code blocks of docs/works_with.md."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.documents)
