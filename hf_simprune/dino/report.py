# SPDX-License-Identifier: Apache-2.0
"""What a finished run shows: the loss curve, the pruned tokens, the model card."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..hub.eval_results import benchmark_entry, evaluated_images, write_benchmark_entries
from ..hub.facts import Licence, hardware, is_hub_id, launch_words, licence_of, shown_command, versions
from ..hub.model_card import KNNRow, TrainingCard, knn_results, render_model_card
from ..pictures import PrunedView, plot_loss_curve, plot_pruned_tokens
from ..reduction.methods import METHODS
from .arguments import DinoArguments
from .build import Normalisation
from .reduction_choice import keep_rate_counts
from .resolve import ResolvedSettings
from .snapshots import MOMENTS, stage_dropped


LOSS_CURVE = "loss_curve.png"
PRUNED_TOKENS = "pruned_tokens.png"
TOKENS_BY_DEPTH = "tokens_by_depth.png"
_MOST_PANELS = 6
# Where a run reads and writes, and what does not change its result.
_NOT_SHOWN = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_schedule_change", "save_steps",
    "save_total_limit", "dataset_name_or_path", "eval_dataset_name_or_path", "token", "dataloader_num_workers",
    "logging_steps", "report_to", "run_name", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_strategy", "bf16", "fp16", "ddp_timeout", "license", "base_model_id", "dataset_id", "eval_dataset_id",
    "eval_task_id",
)  # fmt: skip


def draw_pictures(
    records: Sequence[dict[str, Any]], folder: Path, snapshots: Path, settings: ResolvedSettings, norm: Normalisation
) -> None:
    """Into `folder`: the loss curve from the records of `metrics.jsonl`; from the snapshots of a run with token
    reduction, pruned and merged tokens over the training, after all stages, and over the depth, at its end."""
    if any("loss" in record for record in records):
        plot_loss_curve(records, folder / LOSS_CURVE)
    if snapshots.exists():
        stages = [f"block {layer}" for layer in settings.reduction_layers]
        stored = load_file(snapshots)
        moments = [moment for moment in MOMENTS if moment in stored]
        if not moments:
            return
        views = token_views(stored, [(moment, -1) for moment in moments], settings, norm)
        plot_pruned_tokens(views, [f"{moment} of training" for moment in moments], stages, folder / PRUNED_TOKENS)
        depth = stored[f"{moments[-1]}_tokens"].shape[2]
        shown = sorted({round(place) for place in np.linspace(0, depth - 1, min(depth, _MOST_PANELS))})
        views = token_views(stored, [(moments[-1], stage) for stage in shown], settings, norm)
        plot_pruned_tokens(views, [f"after {stages[stage]}" for stage in shown], stages, folder / TOKENS_BY_DEPTH)


def token_views(
    stored: dict[str, Tensor], panels: Sequence[tuple[str, int]], settings: ResolvedSettings, norm: Normalisation
) -> list[PrunedView]:
    """Rows for the pictures from a snapshot file: for each image the student's view, then the teacher's.

    panels: a moment of training, and the stage after which its tokens are shown, counted from 0 or from the end.
    """
    side = settings.global_crop_size // settings.patch_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (norm.mean, norm.std))
    rows = []
    for image, crops in enumerate(stored["views"]):
        for branch, name in enumerate(("student", "teacher")):
            pixels = (crops[branch] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
            dropped, tokens = [], []
            for moment, stage in panels:
                followed = stored[f"{moment}_tokens"][image, branch]
                until = followed[: range(len(followed))[stage] + 1]
                dropped.append(stage_dropped(until.unsqueeze(0)).view(side, side).numpy())
                tokens.append(until[-1].view(side, side).numpy())
            rows.append(PrunedView(f"{name}, view {branch + 1}", pixels, dropped, tokens))
    return rows


def write_card(
    records: Sequence[dict[str, Any]],
    folder: Path,
    args: DinoArguments,
    settings: ResolvedSettings,
    model_class: str,
    seen: int,
    about: dict[str, object],
    evaluated_on: str = "",
    repo_id: str | None = None,
) -> None:
    """`README.md` in `folder`, which holds the pictures, from the run's own numbers, and `.eval_results` where a
    benchmark was named.

    Args:
        records: the objects of `metrics.jsonl`.
        model_class: the stock class that was saved.
        seen: images that went through training.
        about: further facts of the run, such as its precision.
        evaluated_on: what the k-NN classified, in words.
        repo_id: where the folder will be uploaded to.
    """
    accuracies = [record for record in records if "knn_accuracy" in record]
    losses = [record for record in records if "loss" in record]
    sizes = settings.geometry
    run: dict[str, Any] = {"steps": settings.total_steps, "images seen": seen, "global batch": settings.global_batch}
    run |= about
    run |= {"peak learning rate": f"{settings.learning_rate:.4g}", "prototypes": settings.out_dim}
    run |= {"teacher temperature": settings.teacher_temp, "teacher momentum": settings.momentum_teacher}
    if len(sizes.global_counts) > 1:
        run["patch tokens of a global view"] = " → ".join(map(str, sizes.global_counts))
    if losses:
        speed = sorted(record["images_per_second"] for record in losses)[len(losses) // 2]
        run |= {"last loss": f"{losses[-1]['loss']:.4f}", "images per second": f"{speed:.1f}"}
    rows = []
    if accuracies:
        first, last = accuracies[0], accuracies[-1]
        for key, name in (("knn_accuracy", "CLS"), ("knn_accuracy_patch_mean", "patch mean")):
            if first["step"] == 0:
                untrained = "random network" if args.model_name_or_path is None else "starting checkpoint"
                rows.append(KNNRow(features=f"{untrained}, {name}", all_labels=first[key]))
            if last["step"] > 0:
                rows.append(KNNRow(features=f"trained network, {name}", all_labels=last[key], trained=True))
    reduces = args.token_reduction != "none"
    start = args.model_name_or_path
    licence = Licence(args.license) if args.license else None
    if licence is None and start is not None:
        licence = licence_of(start, args.model_revision, args.token)
    name = (repo_id or Path(args.output_dir).resolve().name).split("/")[-1]
    card = TrainingCard(
        name=args.run_name or name,
        model_id=repo_id or args.output_dir,
        model_class=model_class,
        architecture=f"{sizes.name} ({sizes.depth} blocks, patch size {sizes.patch_size}, {sizes.image_size} px)",
        dataset=Path(args.dataset_name_or_path).name,
        dataset_id=args.dataset_name_or_path if is_hub_id(args.dataset_name_or_path) else args.dataset_id,
        base_model=start if is_hub_id(start) else args.base_model_id,
        licence=licence,
        command=command(sys.argv, args, about),
        seed=args.seed,
        hardware=hardware(),
        versions=versions(),
        token_reduction=args.token_reduction if reduces else None,
        merges=reduces and METHODS[args.token_reduction].merges,
        keep_rate=args.keep_rate if reduces and sizes.setting and keep_rate_counts(args, sizes.setting) else None,
        run=run,
        config={key: value for key, value in asdict(args).items() if key not in _NOT_SHOWN and value is not None},
        evaluated_on=evaluated_on,
        evaluated=evaluated_images(args, args.train_split, args.eval_dataset_id),
        eval_images=accuracies[-1].get("knn_images", 0) if accuracies else 0,
        knn=rows,
        knn_k=args.knn_k,
        knn_temperature=args.knn_temperature,
        loss_curve=LOSS_CURVE if (folder / LOSS_CURVE).exists() else None,
        pruned_tokens=PRUNED_TOKENS if (folder / PRUNED_TOKENS).exists() else None,
        tokens_by_depth=TOKENS_BY_DEPTH if (folder / TOKENS_BY_DEPTH).exists() else None,
        objective=args.objective,
        limits=limits(args, seen, bool(rows), licence),
    )
    (folder / "README.md").write_text(render_model_card(card), encoding="utf-8")
    results = knn_results(card)
    if args.eval_dataset_id is not None and results:
        write_benchmark_entries(folder, [benchmark_entry(results[0], args.eval_dataset_id, args.eval_task_id)])


def limits(args: DinoArguments, seen: int, classified: bool, licence: Licence | None) -> list[str]:
    """What a user has to keep in mind, from the run's own facts."""
    lines = [
        "It has no head: classify by neighbours or train a head on its features, or fine-tune it.",
        f"It saw {seen:,} images, repeats counted, of one data set; on others its features may be worth less.",
        "One run with one seed: another seed gives somewhat other numbers.",
        "Nobody checked what it learned from its images that it should not have, such as social biases.",
    ]
    if classified:
        lines.append(
            "The k-NN accuracies compare features of one data set with each other. They are not comparable with "
            "published ones, which take center crops and let all of ImageNet vote."
        )
    if licence is None:
        lines.append("No licence was named for these weights.")
    return lines


def command(argv: list[str], args: DinoArguments, about: dict[str, Any]) -> str:
    """What starts the same run from its beginning, without access tokens and folders of this machine."""
    words: list[str] = []
    rest = iter(launch_words(argv, "train", args, about.get("processes", 1)))
    for word in rest:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") != "__resume_from_checkpoint":
            words.append(word)
        elif not equals:
            next(rest, None)
    return shown_command(words)
