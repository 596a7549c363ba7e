"""What a saved model is, told from its configuration and the headers of its weights."""

import json

import pytest
import torch

from hf_simprune.cli import main
from hf_simprune.evaluation.model_cost import file_size, macs
from hf_simprune.evaluation.model_files import open_files
from hf_simprune.models import SimPruneViTConfig, SimPruneViTForImageClassification
from hf_simprune.models.sharing import save_with_code

from ..hub.loopback import LoopbackHub
from ..rba.tiny_compression import DEPTH, SIZES, dinov2, save_checkpoint, vit
from ..tiny_run import write_images


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("vit") / "vit")


@pytest.fixture
def info(capsys):
    """Runs `info --json` and returns the record."""

    def run(*words):
        assert main(["info", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_stock_model(info, plain, capsys):
    found = info(plain)
    model = vit()
    counted = macs(lambda pixels: model.eval()(pixels).logits, torch.zeros(1, 3, 16, 16))
    assert found["parameters"] == model.num_parameters() and found["dtypes"] == {"F32": model.num_parameters()}
    assert found["flops"] == 2 * counted and found["weight_bytes"] == file_size(plain)
    assert (found["blocks"], found["original_blocks"], found["kept"], found["removed"]) == (DEPTH, DEPTH, DEPTH, {})
    assert found["image_size"] == [16, 16] and found["patch_size"] == [4, 4] and found["classes"] == 4
    assert found["token_reduction"] is None and not found["needs_code"] and found["made_by"] == ""
    assert main(["info", plain]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{plain}\nclass") and "ViTForImageClassification (vit)" in shown and "\033" not in shown
    assert "all stay" in shown and "16x16 pixels, patches of 4" in shown


def test_a_folder_has_no_revisions(info, plain, capsys):
    assert main(["info", plain, "--model_revision", "v1"]) == 2
    assert f"--model_revision v1: {plain} is on this disk, which has no revisions" in capsys.readouterr().err
    assert info(plain, "--model_revision", "main")["model"] == plain, "where any model is found"


def test_weights_are_not_read(info, plain, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    assert info(plain)["parameters"] > 0


def test_a_compressed_model_says_what_went(info, plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = write_images(tmp_path / "images.parquet", 24)
    words = ["--dataset", data, "--output", str(tmp_path / "small"), "--plan", str(tmp_path / "plan.json")]
    plan = {"depth": DEPTH, "spans": [{"start": 2, "end": 4, "map": "linear"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"halves": [{"block": 5, "half": "mlp", "map": "const"}]}))
    assert main(["compress", plain, *words, "--json", "--disable_tqdm"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["plan"]["spans"][0]["map"] == "linear"  # --json of compress is its record
    found = info(tmp_path / "small")
    assert (found["blocks"], found["original_blocks"], found["kept"]) == (DEPTH - 1, DEPTH, DEPTH - 2)
    assert found["removed"] == {"2-3": "linear"} and found["replaced_halves"] == {"mlp of block 5": "const"}
    assert found["needs_code"] and found["made_by"] == "compressed" and found["made_from"] == plain
    assert found["flops"] == 2 * record["training_free"]["macs"][1]
    assert found["parameters"] == record["training_free"]["parameters"][1]
    (tmp_path / "small" / "compression.json").unlink()  # then the configuration alone tells
    assert main(["info", str(tmp_path / "small")]) == 0
    shown = capsys.readouterr().out
    assert "block 2" in shown and "replaced by linear" in shown and "mlp of block 4" in shown


def test_token_reduction(info, tmp_path, capsys):
    options = {"token_reduction": "tome", "keep_rate": 0.5, "reduction_layers": [1, 3]}
    model = SimPruneViTForImageClassification(SimPruneViTConfig(**SIZES, num_labels=4, **options))
    save_with_code(model.eval(), tmp_path)
    found = info(tmp_path)
    assert found["token_reduction"] == {"method": "tome", "keep_rate": 0.5, "layers": [1, 3]}
    whole = macs(lambda pixels: model(pixels).logits, torch.zeros(1, 3, 16, 16))
    assert found["flops"] == 2 * whole < info(save_checkpoint(tmp_path / "vit"))["flops"]
    assert main(["info", str(tmp_path)]) == 0 and "tome, keep_rate 0.5, layers [1, 3]" in capsys.readouterr().out


def test_a_backbone_and_where_it_came_from(info, tmp_path):
    folder = save_checkpoint(tmp_path / "dinov2", dinov2())
    card = "---\nbase_model: owner/large\nlicense: mit\ndatasets: [owner/images]\n---\n# Card\n"
    (tmp_path / "dinov2" / "README.md").write_text(card)
    found = info(folder)
    assert found["classes"] is None and found["made_from"] == "owner/large" and found["datasets"] == ["owner/images"]
    (tmp_path / "dinov2" / "training").mkdir()
    (tmp_path / "dinov2" / "training" / "arguments.yaml").write_text("dataset_name_or_path: x\n")
    assert info(folder)["made_by"] == "pretrained"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json is no JSON object"),
        ("config.json", '{"model_type": "bert"}', "a bert is no vision transformer"),
        ("config.json", '{"model_type": "nothing"}', "its configuration is none of a model that is known here"),
        ("config.json", '{"model_type": "vit", "num_hidden_layers": 10000000}', "num_hidden_layers must be from 1"),
        ("config.json", '{"model_type": "vit", "architectures": [3]}', "architectures [3]: a list of class names"),
        ("config.json", '{"model_type": "vit", "architectures": "ViTModel"}', "architectures 'ViTModel': a list of"),
        ("model.safetensors", "short", "model.safetensors cannot be read"),
        ("compression.json", '{"plan": {"depth": 3, "spans": [1]}}', "compression.json: plan"),
    ],
)
def test_folders_that_are_broken(plain, tmp_path, capsys, name, content, message):
    import shutil

    folder = shutil.copytree(plain, tmp_path / "broken")
    (folder / name).write_text(content)
    assert main(["info", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_records_of_other_types_say_nothing(info, tmp_path):
    folder = tmp_path / "vit"
    save_checkpoint(folder)
    (folder / "README.md").write_text("---\nbase_model: 3\ndatasets: 4\n---\n# Card\n")
    assert info(folder)["datasets"] == []
    (folder / "compression.json").write_text('{"data": 3, "model": ["a"], "command": {"b": 1}}')
    found = info(folder)
    assert (found["made_by"], found["made_from"], found["datasets"], found["command"]) == (
        "compressed",
        None,
        [],
        None,
    )
    (folder / "compression.json").write_text('{"data": {"dataset": 5}}')
    assert info(folder)["datasets"] == []


def test_a_model_on_the_hub(plain, tmp_path, monkeypatch):
    """The client reads its endpoint when it is imported, so here it is handed on."""
    from huggingface_hub import constants

    with LoopbackHub() as hub:
        hub.add("someone/vit", plain)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for module in ("huggingface_hub.constants", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
            monkeypatch.setattr(f"{module}.ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        found = open_files("someone/vit")
        asked = list(hub.requests)
    local = open_files(plain)
    assert found.parameters == local.parameters and found.weight_bytes == local.weight_bytes
    assert found.json("config.json") == local.json("config.json") and found.commit
    assert sum("model.safetensors" in line for line in asked) == 1  # its header, and not the file
