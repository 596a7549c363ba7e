# SPDX-License-Identifier: Apache-2.0
"""The model card of a compressed network, written from its own numbers: what is not passed in is not in the card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult

from .facts import Licence
from .model_card import card_data, markdown_table, render, settings_table
from .privacy import masked


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
        base_model: its Hub id, if it has one, else that of the network it was made from itself.
        depth, kept: blocks before and after.
        chosen: how, such as "chosen by its measured effect on the outputs".
        fitted: how the maps were made, such as "in closed form, without training".
        block_map: the blocks in plain text, removed ones marked.
        replaced: what went and what took its place, one row each: (blocks or half, kind of map).
        dataset: name of the calibration images in words, `dataset_id` their Hub id.
        calibration: such as "333 images to fit, 167 to choose".
        evaluated_on: such as "250 images held out from calibration".
        results: rows (quantity, original, compressed, change, what it was measured on), as text.
        protocol: how that was measured, a sentence or two each.
        eval_results: accuracies of the network in this folder for the card's metadata.
        limits: what the model cannot do and the numbers do not show, a sentence or two each.
        healed: the same rows after distillation, if there was any; `results` then are the training-free ones.
        heal_steps: its steps.
        notes: plain sentences a user has to know, such as that the network has little to give.
        command: what was typed; access tokens in it are masked.
        seed, hardware, versions: of the run, the machine, the libraries.
        licence: of the weights; None where nobody named one, which the card calls unknown.
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
    block_map: str
    replaced: Sequence[tuple[str, str]]
    dataset: str
    calibration: str
    evaluated_on: str
    results: Sequence[tuple[str, str, str, str, str]]
    command: str
    seed: int
    hardware: str
    versions: Mapping[str, str]
    base_model: str | None = None
    dataset_id: str | None = None
    licence: Licence | None = None
    healed: Sequence[tuple[str, str, str, str, str]] = ()
    heal_steps: int = 0
    notes: Sequence[str] = ()
    protocol: Sequence[str] = ()
    limits: Sequence[str]
    eval_results: Sequence[EvalResult] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    picture: str | None = None


def render_compression_card(card: CompressionCard) -> str:
    """The text of `README.md`: metadata for the Hub, then the card in Markdown."""
    data = card_data(
        name=card.name,
        pipeline_tag="image-classification" if card.auto_class == _CLASSIFIER else "image-feature-extraction",
        tags=["vision", "model-compression", "depth-pruning", "simprune"],
        licence=card.licence,
        dataset_id=card.dataset_id,
        base_model=card.base_model,
        results=card.eval_results,
    )
    header = ["", "original", "compressed", "change", "measured on"]
    return render(
        "compressed_model.md",
        data,
        card=card,
        replaced_table=markdown_table(["removed", "replaced by"], card.replaced),
        results_table=markdown_table(header, card.results),
        healed_table=markdown_table(header, card.healed),
        command=masked(card.command),
        settings_table=settings_table(card.settings),
        versions=", ".join(f"{name} {version}" for name, version in card.versions.items()),
    )
