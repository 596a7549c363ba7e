"""Whole runs: what they leave behind, and what must not change their result."""

import json
import math
import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, DeiTModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_simprune.dino.argument_parsing import parse_arguments
from hf_simprune.dino.engine import DinoEngine
from hf_simprune.dino.export import load_teacher_backbone
from hf_simprune.dino.online_knn import OnlineKnn
from hf_simprune.dino.run import run_training
from hf_simprune.errors import InputError, TrainingError, TrainingInterrupted
from hf_simprune.hub.card_check import check_card, missing_parts
from hf_simprune.hub.publish import UploadError

from ...tiny_run import NUM_IMAGES, losses, metrics, naive_knn, png, untimed, words, write_images


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run with local crops and SimPrune, left as it ended."""
    folder = tmp_path_factory.mktemp("finished") / "my-run"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(True)
    run_training(
        parse_arguments(words(output_dir=folder, dataset_name_or_path=images, knn_every=2, token="hf_secret"))
    )
    del os.environ["ACCELERATE_USE_CPU"]
    return folder


def same_network(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestOutputFolder:
    def test_every_promised_file_is_there(self, finished):
        names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
        assert names >= {
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "README.md",
            "metrics.jsonl",
            "loss_curve.png",
            "pruned_tokens.png",
            "training/run.json",
            "training/arguments.yaml",
            "training/initial/model.safetensors",
            "training/student/model.safetensors",
            "training/teacher/model.safetensors",
            "training/student_head.safetensors",
            "training/teacher_head.safetensors",
            "checkpoint-4/trainer_state.json",
            "checkpoint-6/trainer_state.json",
        }
        assert not (finished / "checkpoint-2").exists()
        assert not any("partial" in name for name in names)

    def test_stock_transformers_loads_the_teacher_bit_equal(self, finished):
        config = json.loads((finished / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("vit", ["ViTModel"])
        model, info = AutoModel.from_pretrained(finished, output_loading_info=True)
        assert type(model) is ViTModel
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        teacher = load_teacher_backbone(finished).eval()
        trained = load_file(finished / "checkpoint-6" / "teacher.safetensors")
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, trained[f"backbone.{name}"]), name
        pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, stock = teacher(pixels), model.eval()(pixels)
        assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)
        assert torch.equal(ours.last_hidden_state[:, 0], stock.pooler_output)

    def test_training_moved_student_and_teacher_apart_from_the_start(self, finished):
        initial = load_file(finished / "training" / "initial" / "model.safetensors")
        teacher = load_file(finished / "model.safetensors")
        student = load_file(finished / "training" / "student" / "model.safetensors")
        name = "layernorm.bias"
        assert not initial[name].equal(teacher[name]) and not teacher[name].equal(student[name])
        assert (teacher[name] - initial[name]).norm() < (student[name] - initial[name]).norm()

    def test_the_image_processor_prepares_images_as_training_saw_them(self, finished):
        processor = AutoImageProcessor.from_pretrained(finished, backend="pil")
        assert processor.size["height"] == processor.size["width"] == 16
        pixels = np.full((16, 16, 3), 51, dtype=np.uint8)
        values = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0, :, 0, 0]
        expected = [(0.2 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
        assert values.tolist() == pytest.approx(expected, abs=1e-5)

    def test_metrics_hold_a_line_a_step_and_knn_objects(self, finished):
        records = metrics(finished)
        steps = [record for record in records if "loss" in record]
        assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
        promised = {"step", "epoch", "loss", "learning_rate", "images_per_second", "data_wait", "window_offset"}
        promised |= {"teacher_entropy", "kl", "cls_std", "cls_rank", "momentum_teacher", "bad_images", "compute"}
        for record in steps:
            assert promised <= record.keys()
            assert all(math.isfinite(record[key]) for key in promised)
        assert [record["window_offset"] for record in steps] == [0, 1, 1, 2, 2, 3]  # of 16 patches 13 stay
        results = [record for record in records if "knn_accuracy" in record]
        assert [record["step"] for record in results] == [0, 2, 4, 6]
        keys = {"knn_accuracy", "knn_accuracy_patch_mean", "knn_images", "epoch", "step"}
        assert all(record.keys() == keys for record in results)

    def test_the_card_tells_the_runs_own_numbers(self, finished):
        card = (finished / "README.md").read_text()
        results = [record for record in metrics(finished) if "knn_accuracy" in record]
        for record, name in ((results[0], "random network"), (results[-1], "trained network")):
            assert f"| {name}, CLS | {100 * record['knn_accuracy']:.1f} % |" in card
            assert f"| {name}, patch mean | {100 * record['knn_accuracy_patch_mean']:.1f} % |" in card
        assert f"| last loss | {losses(finished)[-1]:.4f} |" in card
        assert f"| images seen | {6 * 8} |" in card
        assert "# my-run" in card and "`ViTModel`" in card and "keep rate 0.8" in card
        assert "4 training images, drawn at random, classified by 36 others" in card
        assert all(name in card for name in ("loss_curve.png", "pruned_tokens.png"))
        assert "| patch tokens of a global view | 16 → 13" in card

    def test_the_card_is_sound_and_its_metadata_holds_the_last_accuracies(self, finished):
        card = (finished / "README.md").read_text()
        assert check_card(card, finished) == [] and missing_parts(card) == []
        last = [record for record in metrics(finished) if "knn_accuracy" in record][-1]
        found = ModelCard(card).data.eval_results
        expected = [round(last[key], 4) for key in ("knn_accuracy", "knn_accuracy_patch_mean")]
        assert [result.metric_value for result in found] == expected
        assert all(result.metric_args == {"num_samples": 4} and result.dataset_split == "train" for result in found)
        assert not (finished / ".eval_results").exists()

    def test_the_run_file_names_the_process_and_how_it_ended(self, finished):
        about = json.loads((finished / "training" / "run.json").read_text())
        assert (about["pid"], about["finished"], about["step"]) == (os.getpid(), True, 6)
        assert about["settings"]["total_steps"] == 6

    def test_no_file_holds_the_access_token(self, finished):
        for path in finished.rglob("*"):
            assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path

    def test_pictures_are_pictures(self, finished):
        for name in ("loss_curve.png", "pruned_tokens.png"):
            with Image.open(finished / name) as picture:
                assert min(picture.size) > 300
                assert len(picture.convert("RGB").getcolors(2**24)) > 20

    def test_pruned_tokens_are_recorded_for_both_views_at_three_moments(self, finished):
        stored = load_file(finished / "training" / "pruned_tokens.safetensors")
        assert stored["views"].shape == (3, 2, 3, 16, 16)
        for moment in ("start", "middle", "end"):
            for view in stored[moment].flatten(0, 1):
                counts = [int((view == stage).sum()) for stage in range(4)]
                assert counts == [9, 3, 2, 2]  # 16 -> 13 -> 11 -> 9
        assert not stored["start"].equal(stored["end"])

    def test_the_last_accuracy_is_that_of_the_saved_model(self, train, tmp_path):
        queries = write_images(tmp_path / "queries.parquet", count=10)
        folder = train(eval_dataset_name_or_path=queries)
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
        pictures = [Image.open(pa.BufferReader(png(i))) for i in range(NUM_IMAGES)]
        with torch.no_grad():
            tokens = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
        labels = [i % 4 for i in range(NUM_IMAGES)]
        for key, features in (("knn_accuracy", tokens[:, 0]), ("knn_accuracy_patch_mean", tokens[:, 1:].mean(dim=1))):
            predicted = naive_knn(features, labels, features[:10], k=5, temperature=0.07)
            accuracy = sum(p == label for p, label in zip(predicted, labels)) / 10
            assert metrics(folder)[-1][key] == pytest.approx(accuracy)


def interrupt_evaluation_of(wanted, monkeypatch):
    """Ctrl-C while the k-NN of that step is at work."""
    evaluate = OnlineKnn.__call__

    def interrupted(self, step, stopped):
        if step == wanted:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, step, stopped)

    monkeypatch.setattr(OnlineKnn, "__call__", interrupted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2},
        {"streaming": True},
        {"token_reduction": "random", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=["plain", "workers", "streaming", "random-accumulated"],
)
def test_an_interrupted_and_resumed_run_equals_the_undisturbed_one(train, monkeypatch, options):
    straight = train("straight", knn_every=3, **options)
    evaluate = OnlineKnn.__call__
    interrupt_evaluation_of(3, monkeypatch)
    with pytest.raises(TrainingInterrupted, match="after step 3.*--resume_from_checkpoint latest"):
        train("parts", knn_every=3, **options)
    monkeypatch.setattr(OnlineKnn, "__call__", evaluate)
    parts = train("parts", knn_every=3, resume_from_checkpoint="latest", **options)
    assert untimed(parts) == untimed(straight)
    assert same_network(parts, straight)


def test_a_run_interrupted_in_its_last_evaluation_is_saved_and_only_that_and_the_result_are_left(
    train, monkeypatch, tmp_path
):
    evaluate, folder = OnlineKnn.__call__, tmp_path / "run"
    interrupt_evaluation_of(6, monkeypatch)
    with pytest.raises(TrainingInterrupted, match="after step 6.*--resume_from_checkpoint latest"):
        train(knn_every=6)
    assert (folder / "checkpoint-6").exists() and not (folder / "model.safetensors").exists()
    assert [record["step"] for record in metrics(folder) if "knn_accuracy" in record] == [0]
    steps = metrics(folder)
    monkeypatch.setattr(OnlineKnn, "__call__", evaluate)
    monkeypatch.setattr(DinoEngine, "step", lambda *a, **k: pytest.fail("a step was taken again"))
    train(knn_every=6, resume_from_checkpoint="latest")
    assert (folder / "model.safetensors").exists()
    assert metrics(folder)[:-1] == steps and {"step": 6, "epoch": 1.2}.items() <= metrics(folder)[-1].items()
    assert "knn_accuracy" in metrics(folder)[-1]


class TestWhatMustNotMatter:
    def test_workers(self, train):
        alone = train("alone", dataloader_num_workers=0)
        helped = train("helped", dataloader_num_workers=2)
        assert untimed(alone) == untimed(helped)
        assert same_network(alone, helped)

    @pytest.mark.parametrize("reduction", ["none", "simprune"])
    def test_accumulation(self, train, reduction):
        # in fp32, clipped gradients of this tiny head carry rounding on, so only the first steps are compared
        options = {"token_reduction": reduction, "drop_path_rate": 0, "max_steps": 3, "warmup_steps": 0}
        whole = train("whole", per_device_train_batch_size=8, **options)
        halves = train("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
        assert losses(halves) == pytest.approx(losses(whole), rel=2e-5)
        assert len(set(losses(whole))) == 3

    def test_gradient_checkpointing(self, train):
        plain, thrifty = train("plain"), train("thrifty", gradient_checkpointing=True)
        assert losses(thrifty) == pytest.approx(losses(plain), rel=1e-5)

    def test_the_attention_implementation(self, train, capsys):
        sdpa = train("sdpa", max_steps=3, attn_implementation="sdpa")
        assert "attention: sdpa" in capsys.readouterr().out
        eager = train("eager", max_steps=3, attn_implementation="eager")
        assert "attention: eager" in capsys.readouterr().out
        assert losses(eager) == pytest.approx(losses(sdpa), rel=1e-4)

    def test_bf16_much(self, train):
        full, half = train("full", max_steps=3), train("half", max_steps=3, bf16=True)
        assert losses(half) != losses(full)
        assert losses(half) == pytest.approx(losses(full), rel=0.15)
        assert load_file(half / "model.safetensors")["layernorm.weight"].dtype == torch.float32


class TestStartingNetwork:
    @pytest.fixture
    def checkpoint(self, tmp_path_factory):
        """A stock ViT with its own layer norm epsilon and its own normalisation."""
        folder = tmp_path_factory.mktemp("stock")
        torch.manual_seed(3)
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            layer_norm_eps=1e-5,
        )
        ViTModel(config).save_pretrained(folder)
        processor = ViTImageProcessor(
            size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
        )
        processor.save_pretrained(folder)
        return folder

    def start(self, train, checkpoint, tmp_path, **changes):
        options = dict.fromkeys(("architecture", "config_overrides", "image_size", "patch_size"))
        queries = write_images(tmp_path / "queries.parquet", count=10)
        options |= {"model_name_or_path": checkpoint, "max_steps": 2, "eval_dataset_name_or_path": queries}
        return train(**options, **changes)

    def test_a_stock_checkpoint_starts_both_branches(self, train, checkpoint, tmp_path, capsys):
        folder = self.start(train, checkpoint, tmp_path, model_revision="main", token="hf_any")
        assert f"normalisation: that of {checkpoint}" in capsys.readouterr().out
        initial, stock = (load_file(f / "model.safetensors") for f in (folder / "training/initial", checkpoint))
        for name in initial.keys() - {"pooler.dense.weight", "pooler.dense.bias"}:
            assert torch.equal(initial[name], stock[name]), name
        assert json.loads((folder / "config.json").read_text())["layer_norm_eps"] == 1e-5
        processor = AutoImageProcessor.from_pretrained(folder)
        assert (list(processor.image_mean), list(processor.image_std)) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
        assert "starting checkpoint, CLS" in (folder / "README.md").read_text()

    def test_the_first_accuracy_is_the_checkpoints(self, train, checkpoint, tmp_path):
        benchmark = {"eval_dataset_id": "some/shapes", "eval_task_id": "knn", "eval_split": "train"}
        folder = self.start(train, checkpoint, tmp_path, **benchmark, base_model_id="some/vit", license="mit")
        model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoImageProcessor.from_pretrained(checkpoint)
        pictures = [Image.open(pa.BufferReader(png(i))) for i in range(NUM_IMAGES)]
        with torch.no_grad():
            features = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state[:, 0]
        labels = [i % 4 for i in range(NUM_IMAGES)]
        predicted = naive_knn(features, labels, features[:10], k=5, temperature=0.07)
        accuracy = sum(p == label for p, label in zip(predicted, labels)) / 10
        assert metrics(folder)[0]["knn_accuracy"] == pytest.approx(accuracy)
        data = ModelCard.load(folder / "README.md").data
        assert (data.base_model, data.base_model_relation, data.license) == ("some/vit", "finetune", "mit")
        (entry,) = yaml.safe_load((folder / ".eval_results/some--shapes--knn.yaml").read_text())
        assert entry["value"] == data.eval_results[0].metric_value == round(metrics(folder)[-1]["knn_accuracy"], 4)

    def test_a_checkpoint_without_processor_is_normalised_as_imagenet_and_says_so(
        self, train, checkpoint, tmp_path, capsys
    ):
        bare = tmp_path / "bare"
        AutoModel.from_pretrained(checkpoint).save_pretrained(bare)
        folder = self.start(train, bare, tmp_path)
        assert f"as {bare} has no image processor" in capsys.readouterr().out
        assert AutoImageProcessor.from_pretrained(folder).image_mean == pytest.approx([0.485, 0.456, 0.406])

    def test_deit(self, train):
        folder = train(architecture="deit_tiny")
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert type(model) is DeiTModel and not info["missing_keys"] and not info["unexpected_keys"]
        assert model(torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 18, 24)
        assert "`DeiTModel`" in (folder / "README.md").read_text()

    def test_another_seed_is_another_network(self, train):
        one, other = train("one", max_steps=1), train("other", max_steps=1, seed=7)
        assert not same_network(one, other)


class TestAgain:
    def test_overwriting_leaves_foreign_files_and_nothing_of_the_old_run(self, train):
        folder = train(max_steps=4)
        (folder / "mine.txt").write_text("keep me")
        with pytest.raises(InputError, match="already holds a run"):
            train(max_steps=2)
        assert len(losses(folder)) == 4
        train(max_steps=2, overwrite_output_dir=True, token_reduction="none")
        assert (folder / "mine.txt").read_text() == "keep me"
        assert len(losses(folder)) == 2
        assert not (folder / "checkpoint-4").exists() and not (folder / "pruned_tokens.png").exists()

    def test_a_checkpoint_of_another_architecture_is_refused_and_kept(self, train):
        folder = train(max_steps=2)
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(InputError, match="--architecture was .* and is now deit_tiny"):
            train(max_steps=2, architecture="deit_tiny", resume_from_checkpoint="latest")
        with pytest.raises(InputError, match="another architecture"):
            train(max_steps=2, architecture="deit_tiny", resume_from_checkpoint="latest", allow_schedule_change=True)
        assert (folder / "model.safetensors").read_bytes() == before

    def test_another_keep_rate_is_refused_by_its_name_where_the_method_learned_for_the_first(self, train):
        train(max_steps=2, token_reduction="self_slimmed", keep_rate=0.9)
        with pytest.raises(InputError, match="--keep_rate was 0.9 and is now 0.8"):
            train(max_steps=2, token_reduction="self_slimmed", keep_rate=0.8, resume_from_checkpoint="latest")

    def test_a_checkpoint_of_another_folder_is_not_resumed_into_a_run(self, train):
        other, folder = train("other", max_steps=2), train("mine", max_steps=2)
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError, match="already holds a run"):
            train("mine", max_steps=2, resume_from_checkpoint=str(other / "checkpoint-2"))
        assert (folder / "metrics.jsonl").read_bytes() == before

    def test_a_folder_that_cannot_be_written_is_named(self, train, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="--output_dir .*file/run"):
            train("file/run")


def test_tensorboard_gets_the_numbers_of_the_metrics(train):
    folder = train(report_to="tensorboard", run_name="tiny")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "logs" / "hf-simprune"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in reader.Scalars("loss")] == pytest.approx(losses(folder), rel=1e-6)
    assert [event.step for event in reader.Scalars("knn_accuracy")] == [0, 6]


class TestPublishing:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A Hub that takes the repository and then refuses every upload."""

        def refuse(folder, repo_id, message, token=None):
            raise UploadError(f"the upload to {repo_id} failed (away)")

        monkeypatch.setattr("hf_simprune.dino.run.create_repo_early", lambda name, private, token: f"somebody/{name}")
        monkeypatch.setattr("hf_simprune.dino.run.upload_run", refuse)

    def test_a_hub_that_is_away_does_not_stop_the_training(self, hub, train, tmp_path, capsys):
        with pytest.raises(TrainingError, match="the upload to somebody/net failed"):
            train(push_to_hub=True, hub_model_id="net", hub_strategy="every_save")
        assert len(losses(tmp_path / "run")) == 6
        assert capsys.readouterr().out.count("was not published: the upload to somebody/net failed") == 3

    def test_the_card_names_the_repository(self, hub, train, tmp_path):
        with pytest.raises(TrainingError):
            train(push_to_hub=True, hub_model_id="net", max_steps=1)
        card = (tmp_path / "run" / "README.md").read_text()
        assert 'AutoModel.from_pretrained("somebody/net")' in card and "# net\n" in card
