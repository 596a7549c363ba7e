"""The folder of a Space: what is in it, what is not, and what is refused."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset

from hf_simprune.errors import InputError
from hf_simprune.explore import app, space
from hf_simprune.explore.images import ImageSource

from ..tiny_run import png


@pytest.fixture(autouse=True)
def gradio_version(monkeypatch):
    """Whether gradio is installed or not: only its version is asked for."""
    original = space.version
    monkeypatch.setattr(space, "version", lambda name: "6.31.0" if name == "gradio" else original(name))


def test_a_space_holds_the_package_the_model_some_images_and_how_to_start(tmp_path, model_folder, data_set):
    (model_folder / "optimizer.bin").write_bytes(b"no part of a model")
    folder = space.write_space(tmp_path / "space", str(model_folder), ImageSource(data_set))
    (model_folder / "optimizer.bin").unlink()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    model = {name for name in names if name.startswith("models/")}
    assert model == {
        f"models/tiny-vit/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    }
    package = Path(app.__file__).parents[1]
    expected = {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names - model == expected | {
        "app.py",
        "requirements.txt",
        "README.md",
        ".gitattributes",
        ".gitignore",
        "images.parquet",
    }
    assert (
        'launch("models/tiny-vit", ImageSource("images.parquet"), port=None, open_browser=False)'
        in (folder / "app.py").read_text()
    )
    images = pq.read_table(folder / "images.parquet")
    assert images.column_names == ["image"], "labels stay at home"
    assert [row["bytes"] for row in images.column("image").to_pylist()] == [png(seed) for seed in range(12)]
    assert ".safetensors filter=lfs" in (folder / ".gitattributes").read_text()

    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and front["sdk_version"] == "6.31.0" and front["app_file"] == "app.py"
    assert "models" not in front, "a local folder has no name on the Hub"
    required = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("torch") for line in required)
    assert not any(line.startswith(("pytest", "gradio", "ruff")) for line in required)


def test_a_space_names_no_folder_of_this_machine(tmp_path, model_folder):
    model = tmp_path / "home" / "tiny"
    shutil.copytree(model_folder, model)
    card = f'\n## Use\n\n```python\nmodel = AutoModel.from_pretrained("{model}")\n```\n'
    (model / "README.md").write_text(card)
    (model / "compression.json").write_text(json.dumps({"model": "/home/jane/vit"}))
    (model / "other.json").write_text('{"a": "/home/jane/vit"}')
    with pytest.warns(UserWarning, match="other.json names a folder of this machine, /home/jane"):
        folder = space.write_space(tmp_path / "space", str(model)) / "models" / "tiny"
    assert (folder / "README.md").read_text() == card.replace(str(model), "models/tiny")
    assert json.loads((folder / "compression.json").read_text()) == {"model": "vit"}
    assert json.loads((model / "compression.json").read_text()) == {"model": "/home/jane/vit"}


def test_a_model_on_the_hub_is_named_and_not_copied(tmp_path):
    folder = space.write_space(tmp_path / "space", "user/some-vit")
    assert not (folder / "models").exists() and not (folder / "images.parquet").exists()
    assert 'launch("user/some-vit", None' in (folder / "app.py").read_text()
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["models"] == ["user/some-vit"]
    folder = space.write_space(tmp_path / "pinned", "user/some-vit", model_revision="v1")
    assert 'launch("user/some-vit", None, model_revision="v1", port=None' in (folder / "app.py").read_text()


def test_what_is_on_this_disk_has_no_revision_in_a_space_either(tmp_path, model_folder):
    with pytest.raises(InputError, match="--model_revision v1: .* is on this disk"):
        space.write_space(tmp_path / "space", str(model_folder), model_revision="v1")
    folder = space.write_space(tmp_path / "space", str(model_folder), model_revision="main")
    assert "model_revision" not in (folder / "app.py").read_text()


def test_all_that_says_which_images_reaches_the_loader(tmp_path, model_folder, data_set, monkeypatch):
    asked = []

    def load(name, split, **options):
        asked.append((name, split, options))
        return Dataset.from_parquet(data_set)

    monkeypatch.setattr("hf_simprune.data.loading.load_split", load)
    source = ImageSource("some/images", config_name="small", revision="v2", split="test", token="hf_x")
    folder = space.write_space(tmp_path / "space", str(model_folder), source)
    assert not any("hf_x" in path.read_text(errors="replace") for path in folder.glob("*") if path.is_file())
    options = {"config_name": "small", "revision": "v2", "token": "hf_x", "split_option": "--split"}
    assert asked == [("some/images", "test", options)]


def test_one_of_several_image_columns_is_chosen(tmp_path, model_folder):
    columns = {
        side: [{"bytes": png(first + row), "path": None} for row in range(3)]
        for side, first in (("left", 0), ("right", 7))
    }
    data = str(tmp_path / "two.parquet")
    pq.write_table(pa.table(columns), data)
    with pytest.raises(InputError, match="--image_column.*left.*right"):
        space.write_space(tmp_path / "space", str(model_folder), ImageSource(data))
    folder = space.write_space(tmp_path / "space", str(model_folder), ImageSource(data, image_column="right"))
    images = pq.read_table(folder / "images.parquet").column("image").to_pylist()
    assert [row["bytes"] for row in images] == [png(seed) for seed in range(7, 10)]


def test_what_cannot_be_a_space_is_refused_before_anything_is_written(tmp_path, model_folder, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--space .*not empty"):
        space.write_space(taken, str(model_folder))
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    (tmp_path / "no-model").mkdir()
    for model, message in (
        (tmp_path / "no-model", "no config.json"),
        ("a/b/c", "user/model"),
        ("plain", "user/model"),
    ):
        with pytest.raises(InputError, match=message):
            space.write_space(tmp_path / "space", str(model))
    with pytest.raises(InputError, match="--dataset"):
        space.write_space(tmp_path / "space", str(model_folder), ImageSource(str(tmp_path / "none.parquet")))
    monkeypatch.undo()
    monkeypatch.setattr(space, "version", _not_installed)
    with pytest.raises(InputError, match=r"pip install 'hf-simprune\[explore\]'"):
        space.write_space(tmp_path / "space", str(model_folder))
    assert not (tmp_path / "space").exists()


def _not_installed(name):
    raise space.PackageNotFoundError(name)


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf-simprune\[explore\]'") as error:
        app.launch("no/model")
    assert "\n" not in str(error.value)
