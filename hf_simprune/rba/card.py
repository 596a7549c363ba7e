# SPDX-License-Identifier: Apache-2.0
"""The model card of a finished compression and its score for a benchmark, from the run's own numbers."""

from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from ..hub.compression_card import CompressionCard, render_compression_card
from ..hub.eval_results import benchmark_entry, evaluated_images, write_benchmark_entries
from ..hub.facts import Licence, base_model_of, hardware, is_hub_id, licence_of, versions
from .adapters import Adapter
from .arguments import CompressArguments
from .block_map import block_map
from .candidates import TRAINED_MAPS
from .checkpoint import loader_of
from .comparison import LATENCY_ROUNDS, Accuracy, Comparison
from .output import CARD, PICTURE
from .plan import CompressionPlan
from .records import Result, typed_command
from .report import block_range
from .run_images import RunImages
from .saving import is_stock


# Where a run reads and writes, and what does not change its result.
_NOT_SHOWN = (
    "output_dir", "overwrite_output_dir", "dataset_name_or_path", "eval_dataset_name_or_path", "model_name_or_path",
    "token", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo", "plan", "license", "base_model_id",
    "dataset_id", "eval_dataset_id", "eval_task_id",
)  # fmt: skip
_CHOSEN = {
    "measured": "chosen by its measured effect on the outputs",
    "br-contiguous": "chosen by block redundancy (the best contiguous span)",
    "br-greedy": "chosen by block redundancy (the best single blocks)",
}


def write_card(
    folder: Path,
    args: CompressArguments,
    model: PreTrainedModel,
    original: Adapter,
    images: RunImages,
    result: Result,
    repo_id: str | None = None,
) -> None:
    """Write README.md into `folder` and, where a benchmark was named, the score into `.eval_results`."""
    results = eval_results(args, final_comparison(result))
    card = compression_card(args, model, original, images, result, results, repo_id)
    (folder / CARD).write_text(card, encoding="utf-8")
    if args.eval_dataset_id is not None and results:
        write_benchmark_entries(folder, [benchmark_entry(results[0], args.eval_dataset_id, args.eval_task_id)])


def compression_card(
    args: CompressArguments,
    model: PreTrainedModel,
    original: Adapter,
    images: RunImages,
    result: Result,
    results: list[EvalResult],
    repo_id: str | None = None,
) -> str:
    """The text of README.md."""
    assert args.model_name_or_path is not None
    plan = result.outcome.choice.plan
    auto_class = loader_of(type(model).__name__).__name__
    variable, output = _snippet(original, auto_class)
    source = args.model_name_or_path
    compressed, base_model = origin(args)
    calibration = images.calibration
    trained = any(item.map in TRAINED_MAPS for item in plan.items)
    licence = Licence(args.license) if args.license else licence_of(source, args.model_revision, args.token)
    card = CompressionCard(
        name=(repo_id or Path(args.output_dir).resolve().name).split("/")[-1],
        model_id=repo_id or args.output_dir,
        model_class=type(model).__name__,
        auto_class=auto_class,
        result=variable,
        output=output,
        stock=is_stock(model),
        original=compressed,
        base_model=base_model,
        depth=plan.depth,
        kept=plan.depth - len(plan.removed_blocks),
        chosen=_CHOSEN[args.strategy] if result.outcome.budget is not None else "named in a plan",
        fitted="by maps fitted to its activations, some of them trained" if trained else "in closed form, untrained",
        block_map=block_map(plan),
        replaced=replaced_rows(plan),
        dataset=Path(args.dataset_name_or_path).name,
        dataset_id=args.dataset_name_or_path if is_hub_id(args.dataset_name_or_path) else args.dataset_id,
        calibration=f"{len(calibration.fit) + len(calibration.select)} images",
        evaluated_on=images.evaluated_on,
        results=result.comparison.card_rows(),
        protocol=protocol(result.comparison, images),
        healed=result.healed.card_rows() if result.healed is not None else (),
        heal_steps=args.heal_steps,
        notes=(*result.notes, *missing_accuracies(result.comparison)),
        eval_results=results,
        limits=limits(images, result, licence),
        command=typed_command(args),
        seed=args.seed,
        hardware=hardware(),
        versions=versions(),
        licence=licence,
        settings={key: value for key, value in asdict(args).items() if key not in _NOT_SHOWN and value is not None},
        picture=PICTURE,
    )
    return render_compression_card(card)


def origin(args: CompressArguments) -> tuple[str, str | None]:
    """What was compressed, and its Hub id, or that of what it was made from if its own card says so."""
    source = args.model_name_or_path
    copied = source if is_hub_id(source) else args.base_model_id
    return (copied, copied) if copied else (Path(source).resolve().name, base_model_of(source))


def final_comparison(result: Result) -> Comparison:
    """Of the network that is saved: the distilled one where there is one."""
    return result.comparison if result.healed is None else result.healed


def eval_results(args: CompressArguments, comparison: Comparison) -> list[EvalResult]:
    """Accuracies of the compressed network for the card's metadata, that of its own head first."""
    where = evaluated_images(args, args.calibration_split, args.eval_dataset_id)
    kinds = (
        ("top-1, original head", comparison.head, "image classification, the head as it was"),
        ("top-1, re-trained linear head", comparison.retrained, "logistic regression on frozen features"),
    )
    return [
        where.accuracy(name, accuracy.compressed, accuracy.images, how)
        for name, accuracy, how in kinds
        if accuracy is not None and accuracy.compressed is not None
    ]


def benchmark_notes(args: CompressArguments, comparison: Comparison) -> list[str]:
    """Why a benchmark that was named gets no score."""
    if args.eval_dataset_id is None or eval_results(args, comparison):
        return []
    reasons = " ".join(missing_accuracies(comparison)) or "the images have no labels."
    return [f"There is no score for {args.eval_dataset_id}: {reasons}"]


def protocol(comparison: Comparison, images: RunImages) -> list[str]:
    """How the results were measured, in sentences."""
    calibration = images.calibration
    lines = [
        f"Calibration: {len(calibration.fit):,} images to fit the maps, {len(calibration.select):,} to choose among "
        "plans; neither is evaluated on.",
        "Brackets are 95 % bootstrap intervals: of the compressed network's cost, of the paired difference in "
        f"accuracy, of the ratio of latencies over {LATENCY_ROUNDS} rounds in turns.",
    ]
    if comparison.retrained is not None and comparison.retrained.original is not None:
        lines.append(
            "The re-trained head is a logistic regression on frozen features of the calibration images, fitted for "
            "each of the two networks."
        )
    return lines


def limits(images: RunImages, result: Result, licence: Licence | None) -> list[str]:
    """What a user has to keep in mind, from the run's own facts."""
    comparison = final_comparison(result)
    lines = [
        f"Measured on {comparison.images:,} images of one data set. On images of another kind the loss may be larger: "
        "calibrate and evaluate on yours.",
        f"The latency is that of one image at a time on {hardware()}; other devices and batch sizes differ.",
        "What the original network gets wrong or is biased in, this one does too, and classes that few of the "
        "calibration images show may have lost more than the average says.",
    ]
    if len(images.calibration.select) < 100:
        lines.append(
            f"Plans were compared on {len(images.calibration.select)} images only, so the choice is uncertain."
        )
    if licence is None:
        lines.append("No licence was named for these weights; that of the original network binds them too.")
    return lines


def replaced_rows(plan: CompressionPlan) -> list[tuple[str, str]]:
    """What went and the kind of map in its place, in order."""
    rows = []
    for span in plan.spans:
        rank = "" if span.rank is None else f" of rank {span.rank}"
        blocks = "block" if span.length == 1 else "blocks"
        where = f", into the MLP of block {span.start - 1}" if span.map == "fold" else ""
        rows.append((f"{blocks} {block_range(span.start, span.end)}", f"{span.map}{rank}{where}"))
    return rows + [(f"{half.half} of block {half.block}", half.map) for half in plan.halves]


def missing_accuracies(comparison: Comparison) -> list[str]:
    """Why an accuracy is not among the results."""
    sides: dict[str, Accuracy | None] = {
        "the original head": comparison.head,
        "a re-trained linear head": comparison.retrained,
    }
    return [
        f"No accuracy of {name}: {accuracy.reason}."
        for name, accuracy in sides.items()
        if accuracy is not None and accuracy.reason
    ]


def _snippet(original: Adapter, auto_class: str) -> tuple[str, str]:
    """Variable and expression that show what the network gives."""
    if original.head == "classifier":
        return "label", "model.config.id2label[model(**inputs).logits.argmax(-1).item()]"
    if auto_class == "CLIPVisionModelWithProjection":
        return "features", "model(**inputs).image_embeds"
    if original.head == "projection":
        return "features", "model.get_image_features(**inputs).pooler_output"
    if original.family in ("vit", "deit"):
        return "features", "model(**inputs).last_hidden_state[:, 0]"
    return "features", "model(**inputs).pooler_output"
