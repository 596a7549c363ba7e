# SPDX-License-Identifier: Apache-2.0
"""A whole run, from options to the published folder; read it top to bottom."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from ..atomic import STORAGE_ERRORS, reason, write_text
from ..errors import InputError, TrainingError
from ..hub.facts import hardware, versions
from ..hub.publish import UploadError, create_repo_early, upload_run
from ..lasting_output import lasting_output
from ..reduction import window_offset
from .allocator import keep_freed_memory
from .arguments import DinoArguments
from .build import (
    attention_implementation,
    augmentation,
    build_dual_branch,
    build_objective,
    build_schedules,
    image_processor,
    normalisation,
)
from .checkpoint import saved_networks, set_aside_later
from .data import listed_images
from .dual_branch import DualBranch
from .engine import DinoEngine, Views
from .export import TRAINING, export_model, result_folder, save_initial, write_json
from .folder_lock import FolderLock
from .main_process import on_main
from .output_folder import RUN_FILE, check_output_dir, clear_previous_run, tidy_up
from .processes import raise_if_lost
from .report import draw_pictures, write_card
from .resolve import ResolvedSettings, describe, resolve
from .run_data import open_data
from .runlog import read_metrics
from .schedules import StepValues
from .sharding import chosen_sharding
from .snapshots import PruningSnapshots, moment_steps
from .tracking import end_trackers, start_trackers
from .trainer import DinoTrainer, LoopSettings
from .validation import check_precision, hub_model_id, tracker_names, validate


SNAPSHOTS = f"{TRAINING}/pruned_tokens.safetensors"
TRACKERS = f"{TRAINING}/trackers.json"
# What makes a run the run it is; what else may differ on resume is where it runs, what it logs and how often it saves.
UNCHANGED_ON_RESUME = frozenset(
    (
        "architecture", "config_overrides", "model_name_or_path", "model_revision", "image_size", "patch_size",
        "drop_path_rate", "token_reduction", "keep_rate", "curriculum", "matching", "reduction_options",
        "norm_last_layer", "student_temp", "teacher_temp", "center_momentum", "momentum_teacher",
        "global_crop_size", "local_crop_size", "local_crops_number", "global_crops_scale", "local_crops_scale",
        "hflip_prob", "color_jitter", "color_jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob",
        "min_learning_rate", "weight_decay", "weight_decay_end", "max_grad_norm", "clip_grad", "objective",
        "dino_loss_weight", "ibot_loss_weight", "koleo_loss_weight", "centering", "shared_heads", "mask_probability",
        "mask_ratio_min", "mask_ratio_max", "masked_policy",
    )
)  # fmt: skip


def run_training(args: DinoArguments) -> None:
    """Train, evaluate, export, draw, write the card and publish, as `args` say.

    Raises:
        InputError: bad input; raised before training starts.
        TrainingError: the run cannot go on.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    lock = FolderLock()
    try:
        with lasting_output():
            _run(args, lock)
    except RuntimeError as error:
        raise_if_lost(error, Path(args.output_dir))
        raise
    finally:
        lock.release()


def _run(args: DinoArguments, lock: FolderLock) -> None:
    started = time.time()
    validate(args)
    output_dir = Path(args.output_dir)
    check_output_dir(args)
    accelerator = build_accelerator(args)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    sharding = chosen_sharding(accelerator)
    repo_id = _create_repo(args, accelerator)
    data = open_data(args)
    settings = resolve(args, data.num_images, accelerator.num_processes)
    norm = normalisation(args)
    processor = image_processor(settings, norm)
    attention = attention_implementation(args, accelerator.device.type, accelerator.mixed_precision)
    model = build_dual_branch(args, settings, attention)
    say = accelerator.print
    for line in [*describe(settings), *data.notes, f"normalisation: {norm.source}", f"attention: {attention}"]:
        say(line)

    def publish_step(step: int) -> None:
        try:
            with saved_networks(output_dir / f"checkpoint-{step}", engine), result_folder(output_dir) as folder:
                export_model(folder, model, processor)
            assert repo_id is not None
            upload_run(output_dir, repo_id, f"step {step}", args.token)
        except UploadError as error:  # the Hub being away for a moment is no reason to stop training
            say(f"warning: step {step} was not published: {error}")
        except STORAGE_ERRORS as error:
            say(f"warning: step {step} was not published: the model could not be written ({reason(error)})")

    engine = DinoEngine(
        model, accelerator, build_objective(args), settings.max_grad_norm, settings.clip_grad, sharding
    )
    model = engine.networks
    schedules = build_schedules(args, settings)
    snapshots = PruningSnapshots(output_dir / SNAPSHOTS, model, settings.total_steps)

    def take_snapshot(step: int, views: Views, values: StepValues) -> None:
        with engine.whole_networks():
            if not accelerator.is_main_process:
                return
            try:
                snapshots(step, views, values)
            except STORAGE_ERRORS as error:
                say(f"warning: the pruned tokens of step {step} will not be drawn: {reason(error)}")

    knn = data.online_knn(model.teacher.backbone, processor, accelerator)

    def evaluate(step: int, stopped: Callable[[], bool]) -> dict[str, float] | None:
        assert knn is not None
        with engine.whole_teacher():
            return knn(step, stopped)

    trainer = DinoTrainer(
        engine,
        schedules,
        data.source(augmentation(args, settings, norm), accelerator),
        loop_settings(args, settings, output_dir, accelerator.mixed_precision),
        evaluate=None if knn is None else evaluate,
        snapshot=take_snapshot if settings.reduction_layers else None,
        snapshot_steps=frozenset(moment_steps(settings.total_steps)),
        describe_window=window_description(args, settings),
        after_save=publish_step if repo_id is not None and args.hub_strategy == "every_save" else None,
    )
    if args.resume_from_checkpoint is not None:
        say(f"resumed from {trainer.resume(args.resume_from_checkpoint)} at step {trainer.step}")

    # every rank has checked the folder; from here on it is this run's
    with engine.whole_networks():
        notes = on_main(accelerator, lambda: _prepare_folder(args, settings, output_dir, model, trainer.step, lock))
    for note in notes:
        say(note)
    start_trackers(
        accelerator, output_dir / TRACKERS, _tracker_config(args), args.run_name, output_dir.resolve().name,
        trainer.step,
    )  # fmt: skip

    def write_result() -> None:
        with result_folder(output_dir) as folder:
            export_model(folder, model, processor)
            records = read_metrics(output_dir / "metrics.jsonl")
            draw_pictures(records, folder, output_dir / SNAPSHOTS, settings, norm)
            model_class = model.teacher.backbone._stock_class.__name__
            seen = settings.total_steps * settings.global_batch
            precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
            about = {"processes": accelerator.num_processes, "precision": precision}
            if trainer.bad_indices:
                about["unreadable images"] = listed_images(trainer.bad_indices)
            write_card(records, folder, args, settings, model_class, seen, about, data.evaluated_on, repo_id)
        _update_run_file(output_dir, finished=True, step=trainer.step, bad_images=sorted(trainer.bad_indices))

    try:
        trainer.train()
        with engine.whole_networks():
            on_main(accelerator, lambda: _complete(write_result, output_dir, trainer.step))
        if accelerator.is_main_process:
            if trainer.bad_indices:
                say(f"images that could not be read and were replaced: {listed_images(trainer.bad_indices)}")
            say(f"done in {time.time() - started:.0f} s: {output_dir} holds the model, its card and pictures")
            if repo_id is not None:
                upload_run(output_dir, repo_id, "DINO pretraining with hf-simprune", args.token)
                say(f"uploaded to {repo_id}")
    finally:
        _end(accelerator, engine)


def build_accelerator(args: DinoArguments) -> Accelerator:
    """The precision is the flag's, or accelerate's own where there is no flag; they must not contradict.

    Raises:
        InputError: a precision that cannot be had, or processes that would not know of each other.
    """
    timeout = timedelta(seconds=args.ddp_timeout)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise InputError(
            f"{launched} processes were launched, but without GPUs each would train alone: launch one process, or set "
            "ACCELERATE_USE_CPU=true to train on the CPU in all of them"
        )
    device_type = state.device.type
    precision = check_precision(args, os.environ.get("ACCELERATE_MIXED_PRECISION"), device_type)
    return Accelerator(
        mixed_precision=precision,
        log_with=tracker_names(args.report_to) or None,
        project_dir=str(Path(args.output_dir) / "logs"),
    )


def loop_settings(args: DinoArguments, settings: ResolvedSettings, output_dir: Path, precision: str) -> LoopSettings:
    return LoopSettings(
        output_dir=output_dir,
        images_per_step=settings.global_batch,
        steps_per_epoch=settings.steps_per_epoch,
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        knn_every=args.knn_every,
        disable_tqdm=args.disable_tqdm,
        allow_schedule_change=args.allow_schedule_change,
        identity={
            "global batch": settings.global_batch,
            "number of images": settings.num_images,
            **{f"--{name}": value for name, value in asdict(args).items() if name in UNCHANGED_ON_RESUME},
            "reduction layers": list(settings.reduction_layers),
            "learning rate": settings.learning_rate,
            "precision": precision,
        },
    )


def window_description(args: DinoArguments, settings: ResolvedSettings) -> Callable[[StepValues], dict[str, float]]:
    """The curriculum's window in the first stage of a global crop, in tokens, for the log."""
    counts = settings.geometry.global_counts
    if args.token_reduction not in ("simprune", "simprune_dynamic") or len(counts) < 2:
        return lambda values: {}
    # the dynamic variant's window holds what its gates may not touch, half of the tokens
    size = counts[1] if args.token_reduction == "simprune" else counts[0] - counts[0] // 2

    def describe_window(values: StepValues) -> dict[str, float]:
        progress = torch.tensor(values.window_progress, dtype=torch.float32)
        offset = window_offset(progress, counts[0], size).item()
        return {"window_progress": values.window_progress, "window_offset": offset}

    return describe_window


def _create_repo(args: DinoArguments, accelerator: Accelerator) -> str | None:
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    return create_repo_early(hub_model_id(args), args.hub_private_repo, args.token)


def _prepare_folder(
    args: DinoArguments, settings: ResolvedSettings, output_dir: Path, model: DualBranch, step: int, lock: FolderLock
) -> list[str]:
    """Make the folder one of a run that goes on from `step`, and this run's alone; returns lines to print."""
    resumed = args.resume_from_checkpoint is not None
    try:
        unlocked = lock.take(output_dir)
        if args.overwrite_output_dir:
            clear_previous_run(output_dir)
        tidy_up(output_dir)
        moved = set_aside_later(output_dir, step) if resumed else []
        _write_run_files(args, settings, output_dir)
        if not resumed:
            save_initial(output_dir, model)
    except STORAGE_ERRORS as error:
        raise InputError(f"--output_dir {output_dir}: it cannot be written: {reason(error)}") from None
    notes = [f"set aside {path}: this run goes on from step {step}" for path in moved]
    return notes if unlocked is None else [unlocked, *notes]


def _complete(write_result: Callable[[], None], output_dir: Path, step: int) -> None:
    try:
        write_result()
    except STORAGE_ERRORS as error:
        raise TrainingError(
            f"the result could not be written to {output_dir} ({reason(error)}); the training is complete and safe in "
            f"checkpoint-{step}: mend that, then run the same command with --resume_from_checkpoint latest, which "
            "writes the result only"
        ) from error


def _write_run_files(args: DinoArguments, settings: ResolvedSettings, output_dir: Path) -> None:
    resolved = {key: value for key, value in asdict(settings).items() if key != "notes"}
    about = {"hardware": hardware(), "versions": versions()}
    # first of all, because it marks the folder as a run's, which --overwrite_output_dir may clear
    write_json(output_dir / RUN_FILE, {"pid": os.getpid(), "finished": False, **about, "settings": resolved})
    plain = {key: value for key, value in asdict(args).items() if key != "token"}
    write_text(output_dir / TRAINING / "arguments.yaml", yaml.safe_dump(plain, sort_keys=False))


def _end(accelerator: Accelerator, engine: DinoEngine) -> None:
    """Close trackers and leave the process group.

    The data-parallel wrapper goes first: if it outlived the group, its end would be the group's, with Python's lock
    held, and would wait for ever for a thread of gloo that needs the lock to finish its last reduction.
    """
    engine.model = engine.dual
    accelerator.free_memory()
    for warning in end_trackers(accelerator.trackers):
        accelerator.print(warning)
    accelerator.trackers.clear()
    accelerator.end_training()


def _update_run_file(output_dir: Path, **changes: Any) -> None:
    path = output_dir / RUN_FILE
    write_json(path, json.loads(path.read_text()) | changes)


def _tracker_config(args: DinoArguments) -> dict[str, Any]:
    """Options as trackers accept them: tensorboard takes nothing but plain values."""
    plain = {key: value for key, value in asdict(args).items() if key != "token"}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in plain.items()}
