"""Analyse and compress from options to the finished folder."""

import json
import re
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    ViTForImageClassification,
)

from hf_simprune.cli import main
from hf_simprune.errors import InputError, TrainingError
from hf_simprune.hub.card_check import check_card, missing_parts
from hf_simprune.rba import run, saving
from hf_simprune.rba.block_map import block_map
from hf_simprune.rba.output import building, check_output_dir
from hf_simprune.rba.plan import CompressionPlan, Half, Span
from hf_simprune.rba.report import RedundancyReport

from ..tiny_run import write_images
from .tiny_compression import CLI, DEPTH, clip, environment, save_checkpoint, snapshot


IMAGES = 60
SPEED = ["--batch_size", "16", "--max_span", "3", "--disable_tqdm"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.parquet", IMAGES, broken=(3, 50))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("vit") / "vit")


@pytest.fixture(scope="module")
def compressed(images, checkpoint, tmp_path_factory):
    """The folder and the printed text of one compression with everything in it."""
    import contextlib
    import io
    import os

    folder = tmp_path_factory.mktemp("out") / "small"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    text = io.StringIO()
    words = ["compress", checkpoint, "--dataset", images, "--remove-blocks", "2", "--refit", "--heal-steps", "2"]
    with contextlib.redirect_stdout(text):
        assert main([*words, "--output", str(folder), *SPEED]) == 0
    return folder, text.getvalue()


def compress(model, images, folder, *words):
    assert main(["compress", str(model), "--dataset", images, "--output", str(folder), *SPEED, *words]) == 0
    return json.loads((folder / "compression.json").read_text())


class TestResult:
    def test_the_folder_is_whole_and_loads_as_a_stock_model(self, compressed):
        folder, _ = compressed
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "model.safetensors", "preprocessor_config.json", "compression.json", "redundancy.json",
            "redundancy.png", "README.md",
        }  # fmt: skip
        assert [path.name for path in folder.parent.iterdir()] == ["small"]
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert type(model) is ViTForImageClassification and model.config.num_hidden_layers == DEPTH - 2
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").size["height"] == 16
        with Image.open(folder / "redundancy.png") as picture:
            assert picture.width > 600

    def test_the_record_holds_plan_costs_data_and_times(self, compressed):
        record = json.loads((compressed[0] / "compression.json").read_text())
        plan = CompressionPlan.from_dict(record["plan"])
        assert len(plan.removed_blocks) == 2 and 0 not in plan.removed_blocks
        assert record["budget"] == {"kind": "blocks", "value": 2}
        costs = [entry["cost"] for entry in record["measured_plans"]]
        assert record["selection_cost"] == pytest.approx(min(costs))
        data = record["data"]
        parts = [set(data["indices"][name]) for name in ("fit", "selection", "evaluation")]
        assert not set.intersection(*parts) and len(set.union(*parts)) == IMAGES
        assert len(parts[2]) == IMAGES // 3 and data["evaluation_indices"] == data["indices"]["evaluation"]
        assert set(data["unreadable_indices"]) == {3, 50}
        assert {"moments", "costs", "planning", "refit", "conversion", "healing", "evaluation", "reloading"} <= set(
            record["seconds"]
        )
        assert set(record["refit"]) == {"cost", "kept"}
        assert len(record["heal_losses"]) == 2 and record["healed"] != record["training_free"]
        assert record["options"]["seed"] == 42 and "token" not in record["options"]

    def test_before_and_after_are_those_of_the_two_networks(self, compressed, checkpoint):
        folder, _ = compressed
        found = json.loads((folder / "compression.json").read_text())["training_free"]
        models = [AutoModelForImageClassification.from_pretrained(each) for each in (checkpoint, folder)]
        assert found["parameters"] == [sum(p.numel() for p in model.parameters()) for model in models]
        tokens, width, hidden = 17, 16, 32
        block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
        assert found["macs"][0] - found["macs"][1] == 2 * block
        assert found["images"] <= IMAGES // 3 and found["images"] >= IMAGES // 3 - 2
        cost, low, high = found["cost"]
        assert 0 < low <= cost <= high
        assert found["agreement"] is not None and found["retrained"]["original"] is not None
        assert found["head"]["original"] is None and "no names" in found["head"]["reason"]
        assert found["file_bytes"][1] == (folder / "model.safetensors").stat().st_size

    def test_the_terminal_shows_tables_plan_and_where_the_result_is(self, compressed):
        folder, text = compressed
        plan = CompressionPlan.from_dict(json.loads((folder / "compression.json").read_text())["plan"])
        assert f"plan: {plan}" in text
        for words in (
            "Single blocks",
            "training-free",
            "After 2 steps of distillation",
            "top-1, re-trained linear head",
        ):
            assert words in text
        assert f"AutoModelForImageClassification.from_pretrained('{folder}')" in text
        assert "\x1b" not in text

    def test_the_card_has_the_numbers_of_the_record(self, compressed):
        folder, _ = compressed
        card = (folder / "README.md").read_text()
        assert f"with {DEPTH - 2} of its {DEPTH} blocks, a `ViTForImageClassification`" in card
        assert "After 2 steps of label-free distillation" in card and "fold, into the MLP of block" in card
        parameters = json.loads((folder / "compression.json").read_text())["training_free"]["parameters"]
        assert f"| parameters, M | {parameters[0] / 1e6:.4g} | {parameters[1] / 1e6:.4g} |" in card

    def test_the_card_is_sound_and_its_metadata_is_of_the_network_in_the_folder(self, compressed):
        folder, _ = compressed
        card = (folder / "README.md").read_text()
        assert check_card(card, folder) == [] and missing_parts(card) == []
        record = json.loads((folder / "compression.json").read_text())
        (result,) = ModelCard(card).data.eval_results
        assert result.metric_value == round(record["healed"]["retrained"]["compressed"], 4)
        assert (result.dataset_name, result.dataset_split) == ("images.parquet", "train")
        assert result.metric_args == {"num_samples": record["healed"]["retrained"]["images"]}
        assert not (folder / ".eval_results").exists()
        assert block_map(CompressionPlan.from_dict(record["plan"])) in card

    def test_the_report_is_that_of_analyze(self, compressed, images, checkpoint, tmp_path):
        words = ["analyze", checkpoint, "--dataset", images, "--output", str(tmp_path / "a"), "--map", "fold", *SPEED]
        assert main(words) == 0
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"redundancy.json", "redundancy.png"}
        alone = RedundancyReport.load(tmp_path / "a" / "redundancy.json")
        assert alone.spans == RedundancyReport.load(compressed[0] / "redundancy.json").spans


class TestMethods:
    def test_halves_need_the_shipped_code_and_can_be_compressed_again(self, images, checkpoint, tmp_path):
        words = ["--max-flops", "0.85x", "--granularity", "half", "--map", "fold", "linear"]
        record = compress(checkpoint, images, tmp_path / "first", *words)
        macs = record["training_free"]["macs"]
        assert macs[1] <= 0.85 * macs[0]
        plan = CompressionPlan(DEPTH, (), (Half(4, "mlp", "linear"), Half(5, "attention", "const")))
        plan.save(tmp_path / "plan.json")
        compress(checkpoint, images, tmp_path / "halves", "--plan", str(tmp_path / "plan.json"))
        assert (tmp_path / "halves" / "modeling_simprune_vit.py").is_file()
        assert "trust_remote_code=True" in (tmp_path / "halves" / "README.md").read_text()
        again = compress(tmp_path / "halves", images, tmp_path / "second", "--max-params", "0.8x")
        assert again["plan"]["depth"] == DEPTH
        parameters = again["training_free"]["parameters"]
        assert parameters[1] <= 0.8 * parameters[0]
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "second") is not None

    def test_a_plan_by_hand_is_used_as_it_is(self, images, checkpoint, tmp_path):
        plan = CompressionPlan(DEPTH, (Span(1, 2, "identity"), Span(4, 5, "low_rank", 3)))
        plan.save(tmp_path / "plan.json")
        record = compress(checkpoint, images, tmp_path / "out", "--plan", str(tmp_path / "plan.json"))
        assert CompressionPlan.from_dict(record["plan"]) == plan
        assert record["budget"] is None and record["strategy"] == "given"
        assert "named in a plan" in (tmp_path / "out" / "README.md").read_text()

    def test_the_papers_selection(self, images, checkpoint, tmp_path):
        record = compress(
            checkpoint,
            images,
            tmp_path / "out",
            "--remove-blocks",
            "2",
            "--strategy",
            "br-contiguous",
            "--map",
            "linear",
        )
        report = RedundancyReport.load(tmp_path / "out" / "redundancy.json")
        best = max((s for s in report.spans if s.start >= 1 and s.end - s.start == 2), key=lambda span: span.br_all)
        assert record["plan"]["spans"] == [{"start": best.start, "end": best.end, "map": "linear"}]
        assert "by block redundancy" in (tmp_path / "out" / "README.md").read_text()

    def test_an_evaluation_set_of_its_own(self, images, checkpoint, tmp_path):
        other = write_images(tmp_path / "other.parquet", 12, first=IMAGES)
        words = ["--remove-blocks", "1", "--eval_dataset_name_or_path", other, "--max_eval_samples", "7"]
        words += ["--eval-dataset-id", "some/shapes", "--eval-split", "train", "--license", "mit"]
        words += ["--dataset-id", "my/set", "--base-model-id", "some/vit"]
        record = compress(checkpoint, images, tmp_path / "out", *words)
        card = (tmp_path / "out" / "README.md").read_text()
        assert check_card(card, tmp_path / "out") == []
        data = ModelCard(card).data
        assert (data.license, data.datasets, data.base_model) == ("mit", ["my/set"], "some/vit")
        (entry,) = yaml.safe_load((tmp_path / "out/.eval_results/some--shapes--default.yaml").read_text())
        assert entry["dataset"] == {"id": "some/shapes", "task_id": "default"}
        assert entry["value"] == round(record["training_free"]["retrained"]["compressed"], 4)
        assert "On 7 images of other.parquet (train);" in card and str(tmp_path) not in card.split("## Use")[0]
        assert str(tmp_path) not in card.split("## Results")[1]
        assert "7 images of train" in entry["notes"] and data.eval_results[0].dataset_type == "some/shapes"
        assert record["training_free"]["images"] == 7
        assert "7 images of other.parquet (train)" in record["data"]["evaluated_on"]
        assert "other.parquet (train)" in card
        assert len(record["data"]["indices"]["fit"]) + len(record["data"]["indices"]["selection"]) == IMAGES

    def test_images_of_the_calibration_split_are_not_evaluated_on(self, images, checkpoint, tmp_path, capsys):
        words = ["--remove-blocks", "1", "--calibration_split", "train[:40]", "--eval_split", "train[30:45]"]
        record = compress(checkpoint, images, tmp_path / "out", *words)
        assert record["training_free"]["images"] == 5
        assert sorted(record["data"]["evaluation_indices"]) == [10, 11, 12, 13, 14]  # rows 40 to 44 of the set
        assert "without 10 that are calibration images too" in record["data"]["evaluated_on"]
        words = ["compress", str(checkpoint), "--dataset", images, "--remove-blocks", "1", *SPEED]
        splits = ["--calibration_split", "train[:40]", "--eval_split", "train[10:20]"]
        assert main([*words, *splits, "--output", str(tmp_path / "refused")]) == 2
        assert "--eval_split train[10:20]: all 10 images" in capsys.readouterr().err

    def test_a_text_tower_stays(self, images, tmp_path):
        source = save_checkpoint(tmp_path / "clip", clip())
        compress(source, images, tmp_path / "out", "--max-params", "0.9x")
        before, after = (AutoModel.from_pretrained(folder) for folder in (source, tmp_path / "out"))
        assert type(after) is CLIPModel
        assert after.config.vision_config.num_hidden_layers < DEPTH
        text = {name: value for name, value in before.state_dict().items() if name.startswith("text_model")}
        assert text and all(torch.equal(after.state_dict()[name], value) for name, value in text.items())
        assert "get_image_features" in (tmp_path / "out" / "README.md").read_text()

    def test_half_precision_survives(self, images, tmp_path):
        from .tiny_compression import vit

        torch.manual_seed(0)
        source = save_checkpoint(tmp_path / "bf16", vit().bfloat16())
        compress(source, images, tmp_path / "out", "--remove-blocks", "1")
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


class TestNothingHalfWritten:
    def test_a_benchmarks_score_goes_with_the_result_it_was_of(self, tmp_path):
        def write(*names):
            with building(str(tmp_path / "out")) as folder:
                for name in ("redundancy.json", *names):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(name)

        write(".eval_results/a.yaml")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        write(".eval_results/b.yaml")
        assert snapshot(tmp_path / "out").keys() == {"notes.txt", "redundancy.json", ".eval_results/b.yaml"}
        write()
        assert snapshot(tmp_path / "out").keys() == {"notes.txt", "redundancy.json"}

    def test_a_second_run_into_the_folder_is_refused_or_replaces_only_the_result(
        self, images, checkpoint, tmp_path, capsys
    ):
        folder = tmp_path / "out"
        compress(checkpoint, images, folder, "--remove-blocks", "1")
        (folder / "notes.txt").write_text("mine")
        before = snapshot(folder)
        words = ["compress", checkpoint, "--dataset", images, "--output", str(folder), "--remove-blocks", "2", *SPEED]
        assert main(words) == 2
        assert "already holds an earlier result" in capsys.readouterr().err
        assert snapshot(folder) == before
        assert main(["analyze", checkpoint, "--dataset", images, "--output", str(folder), *SPEED,
                     "--overwrite_output_dir"]) == 0  # fmt: skip
        assert {path.name for path in folder.iterdir()} == {"notes.txt", "redundancy.json", "redundancy.png"}

    def test_a_model_that_is_not_what_was_computed_is_not_left_behind(self, images, checkpoint, tmp_path, monkeypatch):
        def save_another(model, processor, source, folder, token=None):
            broken = model.__class__(model.config)
            saving.save_model(broken, processor, source, folder, token)

        monkeypatch.setattr(run, "save_model", save_another)
        words = [
            "compress",
            checkpoint,
            "--dataset",
            images,
            "--output",
            str(tmp_path / "out"),
            "--remove-blocks",
            "1",
        ]
        assert main([*words, *SPEED]) == 1
        assert list(tmp_path.iterdir()) == []

    def test_what_loads_as_another_class_is_said(self, tmp_path, checkpoint):
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        with pytest.raises(TrainingError, match="loads as ViTForImageClassification, not as ViTModel"):
            saving.check_reload(model.vit, checkpoint, torch.zeros(1, 3, 16, 16))

    def test_one_changed_bit_and_one_changed_setting_are_noticed(self, tmp_path, checkpoint):
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        pixels = torch.randn(1, 3, 16, 16)
        saving.check_reload(model, checkpoint, pixels)  # where the bytes of a file lie must not matter
        with torch.no_grad():
            bias = model.vit.layers[2].mlp.fc1.bias
            bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
        with pytest.raises(TrainingError, match="for example vit.layers.2.mlp.fc1.bias"):
            saving.check_reload(model, checkpoint, pixels)
        model = AutoModelForImageClassification.from_pretrained(checkpoint, layer_norm_eps=0.1)
        with pytest.raises(TrainingError, match="computes something else"):
            saving.check_reload(model, checkpoint, pixels)

    def test_ctrl_c_leaves_nothing(self, images, checkpoint, tmp_path, monkeypatch, capsys):
        def interrupted(*args, **kwargs):
            assert any(path.name.startswith(".out-") for path in tmp_path.iterdir())
            raise KeyboardInterrupt

        monkeypatch.setattr(run, "compare", interrupted)
        words = [
            "compress",
            checkpoint,
            "--dataset",
            images,
            "--output",
            str(tmp_path / "out"),
            "--remove-blocks",
            "1",
        ]
        assert main([*words, *SPEED]) == 130
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"

    def test_the_folder_appears_at_once(self, tmp_path):
        with building(str(tmp_path / "deep" / "out")) as folder:
            (folder / "redundancy.json").write_text("{}")
            assert not (tmp_path / "deep" / "out").exists()
        assert snapshot(tmp_path / "deep") == {"out/redundancy.json": b"{}"}
        (tmp_path / "file").write_text("")
        for path, message in (
            ("file", "is a file"),
            ("deep", "already holds files"),
            ("file/out", "cannot be written"),
        ):
            with pytest.raises(InputError, match=message):
                check_output_dir(str(tmp_path / path), overwrite=False)
        (tmp_path / "deep" / "config.json").write_text("{}")
        with pytest.raises(InputError, match="holds config.json but no redundancy.json"):
            check_output_dir(str(tmp_path / "deep"), overwrite=True)


def test_a_process_of_its_own_on_two_ranks(images, checkpoint, tmp_path):
    """The main process alone writes, and the plan is that of one process."""
    launch = [*CLI[:1], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *CLI[2:]]
    words = ["compress", checkpoint, "--dataset", images, "--remove-blocks", "2", *SPEED]
    found = subprocess.run(
        [*launch, *words, "--output", str(tmp_path / "two")],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert len(re.findall("^plan: ", found.stdout, re.MULTILINE)) == 1
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "compression.json").read_text()) for name in ("one", "two"))
    assert one["plan"] == two["plan"]
    assert one["selection_cost"] == pytest.approx(two["selection_cost"], rel=1e-6)


def test_trained_maps_on_several_processes_are_refused_before_the_work(
    images, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run.Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(run, "analyze", None)  # is not reached
    words = ["compress", checkpoint, "--dataset", images, "--remove-blocks", "1", "--map", "fold", "mlp"]
    assert main([*words, "--output", str(tmp_path / "out"), *SPEED]) == 2
    assert "--map mlp: maps are trained by one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_evaluation_set_is_named_by_its_own_option(images, checkpoint, tmp_path, capsys):
    words = ["compress", checkpoint, "--dataset", images, "--remove-blocks", "1", "--output", str(tmp_path / "out")]
    assert main([*words, "--eval_dataset_name_or_path", str(tmp_path / "gone.parquet"), *SPEED]) == 2
    assert "--eval_dataset_name_or_path" in capsys.readouterr().err


def test_a_single_evaluation_image_is_enough(images, checkpoint, tmp_path, capsys):
    words = ["compress", checkpoint, "--dataset", images, "--remove-blocks", "1", "--output", str(tmp_path / "out")]
    assert main([*words, "--max_eval_samples", "1", *SPEED]) == 0
    assert "On 1 evaluation images" in capsys.readouterr().out
