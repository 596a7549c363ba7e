# SPDX-License-Identifier: Apache-2.0
"""The page as a folder that runs as a Space: the package itself, what it needs, the model and a few images."""

import json
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml
from datasets import Dataset

from ..data.decoding import DECODING_ERRORS
from ..data.loading import encoded_bytes, find_image_column, image_rows
from ..errors import InputError
from ..hub.shared_files import home_warnings, shared_form
from ..options.common import check_revision
from ..rba.output import building
from .app import WITHOUT_GRADIO
from .images import ImageSource


SPACE_IMAGES = 64
_IMAGES = "images.parquet"
_MODELS = "models"
_PACKAGE = Path(__file__).parents[1]
_MODEL_FILES = ("*.json", "*.safetensors", "README.md", "LICENSE*")
_APP = '''"""The page of `hf-simprune explore` as a Space."""

from hf_simprune.explore.app import launch
from hf_simprune.explore.images import ImageSource


if __name__ == "__main__":
    launch({model}, {images}, {revision}port=None, open_browser=False)
'''
_LARGE_FILES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "parquet"))
_LEFT_BY_RUNNING = "__pycache__/\n.gradio/\n"
_TEXT = """
# {name}: tokens and blocks

Upload an image and see which patches [SimPrune](https://openreview.net/forum?id=GTcEe5fayC) keeps of two views of it;
remove blocks, as [RBA](https://arxiv.org/abs/2410.04941) does, and watch size, speed and predictions change.

This folder was written by `hf-simprune explore --space` and holds all it needs{what}.
"""


def write_space(
    folder: str | Path,
    model: str,
    images: ImageSource | None = None,
    *,
    model_revision: str | None = None,
) -> Path:
    """Write a folder that shows `hf-simprune explore` when it is uploaded as a Space, or run by `python app.py`.

    It holds the package's own files, so that it needs no release of it, and, of a local folder, the model: weights,
    configuration and processor. Of the data set it holds up to 64 images, without labels.

    Args:
        folder: to write; it must not be there, or be empty.
        model: a folder that `save_pretrained` wrote, which is copied, or a model on the Hub, which is named.
        images: will be as public as the Space.
        model_revision: branch, tag or commit of a model on the Hub.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds files, gradio is not installed, there is no such model or data set, or a revision
            of what is on this disk.
        TrainingError: a file could not be written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--space {target} is there and not empty: name a new folder")
    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        raise InputError(WITHOUT_GRADIO) from None
    check_revision("model_revision", model_revision, model)
    source = Path(model).expanduser()
    local = source.is_dir()
    if local and not (source / "config.json").is_file():
        raise InputError(f"MODEL {model}: that folder holds no config.json, so it is no saved model")
    if not local and (source.exists() or len(source.parts) != 2):
        raise InputError(f"MODEL {model}: a folder that save_pretrained wrote or a Hub name user/model is needed")
    encoded = None if images is None else _encoded(images.open())
    name = source.resolve().name if local else source.name
    with building(str(target), option="--space") as partial:
        _copy_package(partial / _PACKAGE.name)
        if local:
            _copy_model(source, partial / _MODELS / name)
            for warning in home_warnings(source, (path.name for path in (partial / _MODELS / name).iterdir())):
                warnings.warn(f"{model}: {warning}", stacklevel=2)
        if encoded is not None:
            pyarrow.parquet.write_table(pyarrow.table({"image": encoded}), partial / _IMAGES)
        shown = f"{_MODELS}/{name}" if local else model
        app = _APP.format(
            model=json.dumps(shown),
            images=None if encoded is None else f"ImageSource({json.dumps(_IMAGES)})",
            revision="" if local or model_revision is None else f"model_revision={json.dumps(model_revision)}, ",
        )
        (partial / "app.py").write_text(app, encoding="utf-8")
        (partial / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")
        (partial / "README.md").write_text(_card(name, None if local else model, gradio, encoded), encoding="utf-8")
        (partial / ".gitattributes").write_text(_LARGE_FILES, encoding="utf-8")
        (partial / ".gitignore").write_text(_LEFT_BY_RUNNING, encoding="utf-8")
    return target


def _copy_package(folder: Path) -> None:
    shutil.copytree(_PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _copy_model(source: Path, folder: Path) -> None:
    """What loading needs, as it is published, and no checkpoint or code beside it."""
    folder.mkdir(parents=True)
    for pattern in _MODEL_FILES:
        for file in source.glob(pattern):
            shared = shared_form(file.name, file, f"{_MODELS}/{folder.name}")
            if isinstance(shared, bytes):
                (folder / file.name).write_bytes(shared)
            else:
                shutil.copyfile(file, folder / file.name)


def _encoded(rows: Dataset) -> list[dict[str, bytes | None]]:
    """Up to 64 images as they are stored, evenly spread over the rows."""
    from .explorer import spread

    column = find_image_column(rows)
    cells = image_rows(rows, column)
    found = []
    for row in spread(len(rows), SPACE_IMAGES):
        try:
            found.append({"bytes": encoded_bytes(cells[row][column]), "path": None})
        except DECODING_ERRORS:
            continue
    if not found:
        raise InputError("--dataset: none of its images can be read")
    return found


def _requirements() -> list[str]:
    """What the package needs; a Space brings gradio itself, in the version that the card names."""
    try:
        found = requires("hf-simprune") or []
    except PackageNotFoundError as error:
        raise InputError(
            "--space: hf-simprune is not installed, so what it needs is not known: pip install it"
        ) from error
    return sorted(line for line in found if "extra ==" not in line)


def _card(name: str, model: str | None, gradio: str, images: list | None) -> str:
    values = {
        "title": f"{name}: tokens and blocks",
        "sdk": "gradio",
        "sdk_version": gradio,
        "app_file": "app.py",
        "pinned": False,
        "tags": ["hf_simprune", "simprune", "model-compression"],
    }
    if model is not None:
        values["models"] = [model]
    held = [*([] if model else ["the model"]), *([] if images is None else [f"{len(images)} images"])]
    what = f": {' and '.join(held)} too" if held else ""
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n{_TEXT.format(name=name, what=what)}"
