"""Bad input: one error line, exit status 2, no traceback, nothing written, before training starts."""

import importlib.util
import io
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ..elsewhere import run


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "train_dino.py"
NUM_IMAGES = 24
TINY = (
    "--architecture", "vit_micro", "--image_size", "16", "--patch_size", "4", "--local_crops_number", "0",
    "--config_overrides", "hidden_size=24,num_hidden_layers=4,num_attention_heads=2,intermediate_size=48",
    "--out_dim", "16", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8", "--drop_path_rate", "0",
    "--per_device_train_batch_size", "8", "--max_steps", "2", "--disable_tqdm",
)  # fmt: skip


def load_recipe():
    spec = importlib.util.spec_from_file_location("train_dino", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    encoded = [{"bytes": png(seed), "path": None} for seed in range(NUM_IMAGES)]
    return write_parquet(path, image=encoded, label=[seed % 3 for seed in range(NUM_IMAGES)])


@pytest.fixture
def refused(capsys):
    """Runs the recipe in this process, expects it to refuse, and returns its one error line."""

    def run(*words: str, output_dir: Path) -> str:
        before = sorted(output_dir.rglob("*")) if output_dir.exists() else []
        status = load_recipe().main(["--output_dir", str(output_dir), *TINY, *words])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert status == 2, captured.err
        assert len(errors) == 1, captured.err
        assert "Traceback" not in captured.err + captured.out
        assert (sorted(output_dir.rglob("*")) if output_dir.exists() else []) == before
        return errors[0]

    return run


@pytest.fixture(scope="module")
def finished_run(images, tmp_path_factory) -> Path:
    """The output folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert load_recipe().main(["--output_dir", str(folder), "--dataset_name_or_path", images, *TINY]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep_rate", "0"], "--keep_rate 0.0"),
        (["--keep_rate", "1.5"], "--keep_rate 1.5"),
        (["--reduction_layers", "1", "4"], "reduction_layers contains 4: a model of 4 blocks has 0 to 3"),
        (["--reduction_layers", "1", "1"], "reduction_layers repeats"),
        (["--global_crop_size", "18"], "--global_crop_size 18 is no multiple of the patch size 4"),
        (["--local_crops_number", "2", "--local_crop_size", "4"], "--local_crop_size 4 gives 1 patches"),
        (["--architecture", "vit_giant"], "--architecture vit_giant is unknown"),
        (["--curriculum", "steep"], "--curriculum steep is unknown"),
        (["--token_reduction", "topk"], "--token_reduction topk is unknown"),
        (["--token_reduction", "tome", "--keep_rate", "0.4"], "--token_reduction tome --keep_rate 0.4: keep_rate 0.4"),
        (
            ["--token_reduction", "expedit", "--reduction_options", "schedule=published,grid=5"],
            "--token_reduction expedit --keep_rate 0.8 --reduction_options schedule=published,grid=5: ",
        ),
        (["--token_reduction", "evit", "--reduction_options", "r=2"], "--reduction_options r=2: evit has no option r"),
        (["--keep-rat", "0.7"], "unknown option --keep_rat; did you mean --keep_rate?"),
        (
            ["--learning_rate", "1e-3", "--base_learning_rate", "1e-3"],
            "--learning_rate 0.001 and --base_learning_rate",
        ),
        (["--model_name_or_path", "somewhere"], "--architecture vit_micro and --model_name_or_path somewhere"),
    ],
)
def test_bad_options(refused, images, tmp_path, words, message):
    assert message in refused("--dataset_name_or_path", images, *words, output_dir=tmp_path / "run")


def test_unknown_key_in_yaml(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("keprate: 0.7\n")
    message = refused("--config", str(tmp_path / "run.yaml"), output_dir=tmp_path / "run")
    assert "unknown option keprate; did you mean keep_rate?" in message


def test_missing_data_set(refused, tmp_path):
    missing = str(tmp_path / "nothing-here.parquet")
    assert missing in refused("--dataset_name_or_path", missing, output_dir=tmp_path / "run")


def test_revisions_of_what_is_on_this_disk(refused, images, finished_run, tmp_path):
    words = ("--dataset_name_or_path", images, "--dataset_revision", "v2")
    message = refused(*words, output_dir=tmp_path / "run")
    assert f"--dataset_revision v2: {images} is on this disk" in message
    start = ("--architecture", "none", "--config_overrides", "none", "--image_size", "none", "--patch_size", "none")
    start += ("--model_name_or_path", str(finished_run), "--model_revision", "v3")
    message = refused("--dataset_name_or_path", images, *start, output_dir=tmp_path / "run")
    assert f"--model_revision v3: {finished_run} is on this disk" in message


def test_data_set_without_rows(refused, tmp_path):
    empty = pa.array([], type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    path = write_parquet(tmp_path / "empty.parquet", image=empty)
    assert path in refused("--dataset_name_or_path", path, output_dir=tmp_path / "run")


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(
        "--dataset_name_or_path", str(tmp_path / "empty"), output_dir=tmp_path / "run"
    )


def test_no_image_column(refused, tmp_path):
    path = write_parquet(tmp_path / "words.parquet", text=["a", "b"], label=[0, 1])
    assert "image" in refused("--dataset_name_or_path", path, output_dir=tmp_path / "run")


def test_an_image_column_that_is_not_there(refused, images, tmp_path):
    message = refused("--dataset_name_or_path", images, "--image_column", "photo", output_dir=tmp_path / "run")
    assert "--image_column photo" in message


def test_two_candidate_columns(refused, tmp_path):
    encoded = [{"bytes": png(seed), "path": None} for seed in range(NUM_IMAGES)]
    path = write_parquet(tmp_path / "two.parquet", left=encoded, right=encoded)
    message = refused("--dataset_name_or_path", path, output_dir=tmp_path / "run")
    assert all(word in message for word in ("--image_column", "left", "right"))


def test_batch_larger_than_the_data_set(refused, images, tmp_path):
    words = ("--dataset_name_or_path", images, "--gradient_accumulation_steps", "4")
    message = refused(*words, output_dir=tmp_path / "run")
    assert "32" in message
    assert f"larger than the data set, {NUM_IMAGES} images" in message


def test_output_folder_of_another_run(refused, images, finished_run):
    message = refused("--dataset_name_or_path", images, output_dir=finished_run)
    assert all(
        word in message for word in ("already holds a run", "--overwrite_output_dir", "--resume_from_checkpoint")
    )


@pytest.mark.parametrize("where", ["latest", "nowhere/checkpoint-7"])
def test_nothing_to_resume(refused, images, tmp_path, where):
    words = ("--dataset_name_or_path", images, "--resume_from_checkpoint", where)
    assert f"--resume_from_checkpoint {where}" in refused(*words, output_dir=tmp_path / "run")


def test_resuming_with_another_architecture(refused, images, finished_run):
    overrides = "hidden_size=48,num_hidden_layers=4,num_attention_heads=2,intermediate_size=48"
    words = ("--resume_from_checkpoint", "latest", "--config_overrides", overrides)
    message = refused("--dataset_name_or_path", images, *words, output_dir=finished_run)
    assert "--config_overrides was " in message and f"is now {overrides}" in message


def test_resuming_with_another_number_of_steps(refused, images, finished_run):
    words = ("--resume_from_checkpoint", "latest", "--max_steps", "4")
    message = refused("--dataset_name_or_path", images, *words, output_dir=finished_run)
    assert "--allow_schedule_change" in message


def run_recipe(*words: str, folder: Path, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """The recipe as a user runs it, in a process of its own."""
    return run([str(RECIPE), *words], folder, package=True, fresh=fresh, CUDA_VISIBLE_DEVICES="", **environment)


def error_line(result: subprocess.CompletedProcess) -> str:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


def test_process_exits_with_2_and_one_line_for_a_bad_option(tmp_path):
    words = ["--output_dir", str(tmp_path / "run"), "--dataset_name_or_path", "x", "--keep_rate", "2"]
    result = run_recipe(*words, folder=tmp_path, fresh=True)
    assert error_line(result) == "error: --keep_rate 2.0: must be above 0 and at most 1"
    assert not (tmp_path / "run").exists()


def test_process_exits_with_2_and_one_line_for_a_missing_data_set(tmp_path):
    missing = str(tmp_path / "nothing-here.parquet")
    words = ["--output_dir", str(tmp_path / "run"), "--dataset_name_or_path", missing, *TINY]
    result = run_recipe(*words, folder=tmp_path)
    assert missing in error_line(result)
    assert not (tmp_path / "run").exists()


def test_process_refuses_fp16_on_the_cpu(images, tmp_path):
    words = ("--output_dir", str(tmp_path / "run"), "--dataset_name_or_path", images, *TINY, "--fp16")
    assert "--fp16: there is no fp16 training on the CPU" in error_line(run_recipe(*words, folder=tmp_path))


def test_process_refuses_a_precision_that_contradicts_accelerate(images, tmp_path):
    words = ("--output_dir", str(tmp_path / "run"), "--dataset_name_or_path", images, *TINY, "--bf16")
    result = run_recipe(*words, folder=tmp_path, ACCELERATE_MIXED_PRECISION="fp16")
    assert "--bf16 contradicts accelerate's mixed precision fp16" in error_line(result)


def test_only_one_process_of_a_machine_speaks(tmp_path):
    result = run_recipe("--keprate", "1", folder=tmp_path, fresh=True, LOCAL_RANK="1")
    assert (result.returncode, result.stderr) == (2, "")
