# SPDX-License-Identifier: Apache-2.0
"""The model card of a compressed network, written from its own numbers: what is not passed in is not in the card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData

from .model_card import markdown_table, masked, settings_table


_TEMPLATE = files("hf_simprune.hub") / "templates" / "compressed_model.md"
_CLASSIFIER = "AutoModelForImageClassification"


@dataclass(frozen=True, kw_only=True)
class CompressionCard:
    """Everything a card says about a compressed network.

    Attributes:
        name: title of the card, usually the repository's or the folder's name.
        model_id: what `from_pretrained` takes, a Hub id or a folder.
        model_class: the class that was saved.
        auto_class: the Auto class that loads it.
        output: expression of `model` and `inputs` that the snippet shows, such as "model(**inputs).logits".
        result: the variable it goes to.
        stock: whether stock transformers loads it; otherwise it needs `trust_remote_code` or this package.
        original: the network that was compressed, a Hub id or a name.
        base_model: its Hub id, if it has one.
        depth, kept: blocks before and after.
        chosen: how, such as "chosen by its measured effect on the outputs".
        fitted: how the maps were made, such as "in closed form, without training".
        replaced: what went and what took its place, one row each: (blocks or half, kind of map).
        dataset: name of the calibration images in words, `dataset_id` their Hub id.
        calibration: such as "333 images to fit, 167 to choose".
        evaluated_on: such as "250 images held out from calibration".
        results: rows (quantity, original, compressed, change), as text.
        healed: the same rows after distillation, if there was any; `results` then are the training-free ones.
        heal_steps: its steps.
        notes: plain sentences a user has to know, such as that the network has little to give.
        command: what was typed; access tokens in it are masked.
        seed, hardware, versions, license: of the run, the machine, the libraries, the weights.
        settings: the options, by name; access tokens are masked.
        picture: file name of the heat-maps beside the card.
    """

    name: str
    model_id: str
    model_class: str
    auto_class: str
    result: str
    output: str
    stock: bool
    original: str
    depth: int
    kept: int
    chosen: str
    fitted: str
    replaced: Sequence[tuple[str, str]]
    dataset: str
    calibration: str
    evaluated_on: str
    results: Sequence[tuple[str, str, str, str]]
    command: str
    seed: int
    hardware: str
    versions: Mapping[str, str]
    base_model: str | None = None
    dataset_id: str | None = None
    license: str | None = None
    healed: Sequence[tuple[str, str, str, str]] = ()
    heal_steps: int = 0
    notes: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    picture: str | None = None


def render_compression_card(card: CompressionCard) -> str:
    """The text of `README.md`: metadata for the Hub, then the card in Markdown."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if card.auto_class == _CLASSIFIER else "image-feature-extraction",
        tags=["vision", "model-compression", "depth-pruning", "simprune"],
        license=card.license,
        datasets=card.dataset_id,
        base_model=card.base_model,
        model_name=card.name,
    )
    header = ["", "original", "compressed", "change"]
    rendered = ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        card=card,
        replaced_table=markdown_table(["removed", "replaced by"], card.replaced),
        results_table=markdown_table(header, card.results),
        healed_table=markdown_table(header, card.healed),
        command=masked(card.command),
        settings_table=settings_table(card.settings),
        versions=", ".join(f"{name} {version}" for name, version in card.versions.items()),
    )
    return str(rendered).rstrip() + "\n"
