# SPDX-License-Identifier: Apache-2.0
"""The model card of a DINO run, written from the run's own numbers: what is not passed in is not in the card."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .eval_results import Evaluated
from .facts import Licence
from .privacy import masked, short_values, short_word


_TEMPLATES = files("hf_simprune.hub") / "templates"


@dataclass(frozen=True, kw_only=True)
class KNNRow:
    """Weighted k-NN accuracy of one kind of features, as fractions; None where it was not measured.

    Attributes:
        features: such as "trained network, CLS" or "raw pixels".
        all_labels: with every labelled image in the bank.
        few_labels: mean over draws of a few labelled images a class.
        few_labels_std: standard deviation over those draws.
        trained: the row describes the network of this card; its numbers go into the card's metadata.
    """

    features: str
    all_labels: float | None = None
    few_labels: float | None = None
    few_labels_std: float | None = None
    trained: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingCard:
    """Everything a card says about a run.

    Attributes:
        name: title of the card, usually the repository's or the folder's name.
        model_id: what `from_pretrained` takes, a Hub id or a folder.
        model_class: the stock class that was saved, `ViTModel` or `DeiTModel`.
        architecture: such as "ViT-micro (6 blocks, width 192, patch size 4, 28 px)".
        dataset: name of the training images in words.
        command: what was typed to start the run; access tokens in it are masked.
        seed: of the run.
        hardware: such as "2 CPU cores".
        versions: of the libraries, by name.
        token_reduction: name of the method; None if patches were not dropped.
        keep_rate: fraction of the patch tokens kept at each stage; None where it has no say.
        merges: the method merges patches and does not drop them.
        dataset_id: the data set's Hub id, if it has one.
        base_model: Hub id of the checkpoint that training started from.
        licence: of the weights; None where nobody named one, which the card calls unknown.
        run: numbers of the run in the order shown, such as {"steps": 800, "images per second": 310}.
        config: the run's arguments, by name; access tokens are masked.
        evaluated_on: such as "360 test images".
        evaluated: the same for the card's metadata, which has no results without it.
        eval_images: how many were classified.
        knn: k-NN accuracies; rows without a number are left out.
        knn_k, knn_temperature: of the k-NN classifier.
        few_labels_name: heading of the few-label column, such as "10 labels a class, 20 draws".
        gain: mean, low and high of the paired difference trained − random network, as fractions.
        loss_curve, pruned_tokens, tokens_by_depth: file names of the pictures beside the card.
        objective: "dino" or "dinov2".
        limits: what the model cannot do and the numbers do not show, a sentence or two each.
    """

    name: str
    model_id: str
    model_class: str
    architecture: str
    dataset: str
    command: str
    seed: int
    hardware: str
    versions: Mapping[str, str]
    token_reduction: str | None = None
    keep_rate: float | None = None
    merges: bool = False
    dataset_id: str | None = None
    base_model: str | None = None
    licence: Licence | None = None
    run: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    evaluated_on: str = "the evaluation split"
    evaluated: Evaluated | None = None
    eval_images: int = 0
    knn: Sequence[KNNRow] = ()
    knn_k: int = 20
    knn_temperature: float = 0.07
    few_labels_name: str = "few labels"
    gain: tuple[float, float, float] | None = None
    loss_curve: str | None = None
    pruned_tokens: str | None = None
    tokens_by_depth: str | None = None
    objective: str = "dino"
    limits: Sequence[str]


def render_model_card(card: TrainingCard) -> str:
    """The text of `README.md`: metadata for the Hub, then the card in Markdown."""
    results = knn_results(card)
    data = card_data(
        name=card.name,
        pipeline_tag="image-feature-extraction",
        tags=[card.objective, "simprune", "vision", "self-supervised-learning"],
        licence=card.licence,
        dataset_id=card.dataset_id,
        base_model=card.base_model,
        results=results,
    )
    return render(
        "dino_backbone.md",
        data,
        card=card,
        knn_table=_knn_table(card),
        gain=_gain_sentence(card),
        run_table=markdown_table(["", ""], list(card.run.items())),
        command=masked(card.command),
        config_table=settings_table(card.config),
        versions=", ".join(f"{name} {version}" for name, version in card.versions.items()),
    )


def card_data(
    *,
    name: str,
    pipeline_tag: str,
    tags: list[str],
    licence: Licence | None,
    dataset_id: str | None,
    base_model: str | None,
    results: Sequence[EvalResult],
) -> ModelCardData:
    """A card's metadata. The Hub has no relation "pruned": what is made of a model's weights it calls a finetune."""
    licence = licence or Licence("unknown")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=tags,
        license=licence.identifier,
        license_name=licence.name,
        license_link=licence.link,
        datasets=None if dataset_id is None else [dataset_id],
        metrics=["accuracy"] if results else None,
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune",
        # without results it would become a key of its own, which the Hub does not know
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def render(template: str, data: ModelCardData, **values: Any) -> str:
    """The text of a card from one of the package's templates, with both papers to cite."""
    papers = (_TEMPLATES / "papers.bib").read_text(encoding="utf-8").strip()
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return str(ModelCard.from_template(data, template_str=text, papers=papers, **values)).rstrip() + "\n"


def knn_results(card: TrainingCard) -> list[EvalResult]:
    """The accuracies of the trained network for the card's metadata, best known first."""
    if card.evaluated is None or card.eval_images < 1:
        return []
    protocol = f"k-NN classification of frozen features (k = {card.knn_k}, temperature {card.knn_temperature})"
    found = []
    for row in card.knn:
        columns = {"all labels": row.all_labels, card.few_labels_name: row.few_labels}
        found += [
            card.evaluated.accuracy(f"k-NN accuracy, {row.features}, {name}", value, card.eval_images, protocol)
            for name, value in columns.items()
            if row.trained and value is not None
        ]
    return found


def _knn_table(card: TrainingCard) -> str:
    rows = [row for row in card.knn if row.all_labels is not None or row.few_labels is not None]
    with_all = any(row.all_labels is not None for row in rows)
    with_few = any(row.few_labels is not None for row in rows)
    header = ["features"] + ["all labels"] * with_all + [card.few_labels_name] * with_few
    body = []
    for row in rows:
        few = _percent(row.few_labels)
        if row.few_labels is not None and row.few_labels_std is not None:
            few = f"{100 * row.few_labels:.1f} ± {100 * row.few_labels_std:.1f} %"
        body.append([row.features] + [_percent(row.all_labels)] * with_all + [few] * with_few)
    return markdown_table(header, body)


def _gain_sentence(card: TrainingCard) -> str:
    if card.gain is None:
        return ""
    mean, low, high = (100 * value for value in card.gain)
    return (
        f"Trained minus random network ({card.few_labels_name}, same draws for both): {mean:+.1f} points, "
        f"95 % interval {low:+.1f} to {high:+.1f}."
    )


def settings_table(settings: Mapping[str, object]) -> str:
    """Options and their values, without access tokens and folders of this machine."""
    return markdown_table(["setting", "value"], [(f"`{k}`", f"`{_setting(k, v)}`") for k, v in settings.items()])


def _setting(name: str, value: object) -> str:
    return "***" if name == "token" and value is not None else masked(str(short_values(value)))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; an empty string without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", r"\|").split())


def addressed_to(text: str, repo_id: str, written: Callable[[str], bool]) -> str:
    """A card whose code under "Use" loads `repo_id`: before it is published, it names the folder it lies in.

    Only where all that the code loads has one name, and that name is a path or `written` by this package; what a
    person wrote otherwise stays. The same text comes out however often this is done.
    """
    head, heading, rest = text.partition("\n## Use\n")
    section, following, tail = rest.partition("\n## ")
    loads = re.compile(r"(\.from_pretrained\(\")([^\"\n]+)(\")")
    names = {found[1] for found in loads.findall(section)}
    if len(names) != 1:
        return text
    (name,) = names
    if not written(name) and short_word(name) == name and not name.startswith(".") and name.count("/") < 2:
        return text
    section = loads.sub(lambda found: f"{found[1]}{repo_id}{found[3]}", section)
    return head + heading + section + following + tail
