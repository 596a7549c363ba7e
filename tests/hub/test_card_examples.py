"""The finished example cards: sound, whole, and free of the machine they were made on."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_simprune.hub.card_check import check_card, missing_parts


EXAMPLES = Path(__file__).parents[2] / "model_cards" / "examples"
NAMES = {"vit-micro-digits": "image-feature-extraction", "deit-tiny-10-blocks": "image-classification"}


@pytest.mark.parametrize("name", NAMES)
class TestExample:
    def test_is_sound_and_whole(self, name):
        text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
        assert check_card(text, EXAMPLES / name) == [] and missing_parts(text) == []
        assert not re.search(r"(?<![\w.:/])/(tmp|home|work|root|usr)/", text)

    def test_its_metadata_repeats_numbers_of_its_table(self, name):
        text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
        data = ModelCard(text).data
        assert (data.pipeline_tag, data.license) == (NAMES[name], "apache-2.0")
        assert data.eval_results
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        for result in data.eval_results:
            what = result.metric_name.split(", ")
            (row,) = [row for row in rows if set(row[0].split(", ")) <= set(what)]
            shown = [float(cell.removesuffix(" %")) for cell in row[1:] if re.fullmatch(r"[\d.]+ %", cell)]
            # four digits there and three here, each rounded from the number itself
            assert abs(shown[-1] - 100 * result.metric_value) <= 0.055 + 1e-9
            assert f"{result.metric_args['num_samples']} images" in text

    def test_shows_pictures_and_no_other_file_lies_there(self, name):
        text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
        shown = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))
        assert shown and {path.name for path in (EXAMPLES / name).iterdir()} == shown | {"README.md"}
        for picture in shown:
            with Image.open(EXAMPLES / name / picture) as image:
                assert image.width > 300
            assert (EXAMPLES / name / picture).stat().st_size < 400_000


def test_the_compressed_example_names_its_base_and_what_was_removed():
    text = (EXAMPLES / "deit-tiny-10-blocks" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("facebook/deit-tiny-patch16-224", "finetune")
    signs = re.search(r"block( +\d+)+\n +([■◧□ ]+)\n", text)[2].split()
    removed = [block for block, sign in enumerate(signs) if sign == "□"]
    assert len(signs) == 12 and len(removed) == 2
    assert all(f"| block {block} |" in text for block in removed)
