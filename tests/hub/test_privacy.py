"""What cards, records and repositories say of the machine they come from: nothing."""

import json
from dataclasses import dataclass, field

import pytest
import yaml

from hf_simprune.hub.facts import launch_words, shown_command
from hf_simprune.hub.model_card import settings_table
from hf_simprune.hub.privacy import home_in, masked, short_card, short_command, short_record, short_word


@dataclass
class Options:
    dataset: str = "images"
    token: str | None = None
    layers: list[int] = field(default_factory=lambda: [1])
    half: bool = False


def typed(*argv, processes=1, **options):
    return shown_command(launch_words(argv, "train", Options(**options), processes))


@pytest.mark.parametrize(
    ("word", "short"),
    [
        ("/home/jane/my images/", "my images"),
        ("~/images", "images"),
        ("--output_dir=/mnt/x/out", "--output_dir=out"),
        ("../other/images", "images"),
        ("C:\\Users\\jane\\images", "images"),
        ("file:///home/jane/a.parquet", "a.parquet"),
        ("user/images", "user/images"),
        ("outputs/smaller", "outputs/smaller"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("hf_models/deit", "hf_models/deit"),
        ("0.8x", "0.8x"),
        ("/", "/"),
    ],
)
def test_a_path_of_this_machine_is_named_by_its_last_part(word, short):
    assert short_word(word) == short


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("/home/j/env/bin/hf-simprune", "train", "--dataset", "/data/a b"), "hf-simprune train --dataset 'a b'"),
        (("/x y/bin/hf-simprune", "train", "a"), "hf-simprune train a"),
        (("/site/hf_simprune/cli.py", "train", "a"), "hf-simprune train a"),
        (("/w/repo/recipes/train_dino.py", "--config", "/w/repo/recipes/x.yaml", "--output_dir", "/tmp/r/out"),
         "python recipes/train_dino.py --config recipes/x.yaml --output_dir out"),
        (("recipes/train_dino.py", "--output_dir", "out"), "python recipes/train_dino.py --output_dir out"),
        (("/home/j/mine.py", "--token", "hf_x"), "python mine.py --token '***'"),
    ],
)  # fmt: skip
def test_the_command_is_what_anybody_types(argv, shown):
    assert typed(*argv).replace("--token ***", "--token '***'") == shown


def test_several_processes_are_launched_by_accelerate():
    launch = "accelerate launch --num_processes 2 "
    assert typed("/b/hf-simprune", "train", "a", processes=2) == launch + "-m hf_simprune.cli train a"
    assert typed("recipes/train_dino.py", processes=2) == launch + "recipes/train_dino.py"


@pytest.mark.parametrize("program", ["/env/ipykernel_launcher.py", "", "-c"])
def test_a_run_from_a_notebook_is_told_by_its_options(program):
    options = {"dataset": "/home/jane/my images", "layers": [1, 2], "half": True, "token": "hf_secret"}
    told = "hf-simprune train --dataset 'my images' --layers 1 2 --half true"
    assert typed(program, "-f", "/home/jane/kernel.json", **options) == told


def test_only_what_is_as_long_as_a_token_is_masked():
    secret = "hf_" + "a1B2" * 9
    assert masked(f"compress hf_models/deit --token short {secret}") == "compress hf_models/deit --token *** ***"


def test_records_and_settings_keep_all_but_the_folders():
    content = {
        "model": "/home/jane/deit",
        "command": "hf-simprune compress '/home/jane/de it' --output_dir=/tmp/x",
        "data": {"dataset": "../images", "revision": "main", "rows": [1, 2.5, None]},
        "notes": ["250 images of /home/jane/images (test), 3 / 4 images/s"],
    }
    expected = {
        "model": "deit",
        "command": "hf-simprune compress 'de it' --output_dir=x",
        "data": {"dataset": "images", "revision": "main", "rows": [1, 2.5, None]},
        "notes": ["250 images of images (test), 3 / 4 images/s"],
    }
    assert json.loads(short_record("compression.json", json.dumps(content))) == expected
    assert yaml.safe_load(short_record("training/arguments.yaml", yaml.safe_dump(content))) == expected
    assert short_record("a.json", '{"a":  1}') == '{"a":  1}'
    assert short_record("a.json", '{"a": "/home/jane/x') == '{"a": "x'
    assert "`plans/a.json`" in settings_table({"plan": "plans/a.json"})
    assert "`a.json`" in settings_table({"plan": "/home/jane/a.json"})


def test_a_card_shows_no_folder_in_its_command_and_keeps_what_its_owner_wrote():
    text = "```bash\npython a.py --output_dir /home/j/out\n```\n```bash\ncp /usr/a /usr/b\n```\n/usr/bin/env\n"
    assert short_card(text) == text.replace("/home/j/out", "out")
    assert short_command("a 'b c'  d") == "a 'b c'  d"


def test_a_home_folder_is_found_wherever_it_stands():
    assert home_in('{"a": "at:/home/jane/x"}') == "/home/jane"
    assert home_in("C:\\Users\\jane\\x") and home_in("/root/x") == "/root"
    assert home_in("https://x.org/a/home/b and /home") is None
