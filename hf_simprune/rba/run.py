# SPDX-License-Identifier: Apache-2.0
"""`analyze` and `compress` from options to the finished folder; read it top to bottom."""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..errors import InputError
from ..evaluation.model_cost import PieceCosts, file_size
from ..hub.publish import create_repo_early, repository_name, upload_run
from ..pictures_rba import plot_redundancy
from ..terminal import highlighted
from .adapters import Adapter, adapter_for
from .advice import network_notes, result_notes
from .analysis import Analysis, analyze, check_finite_weights
from .arguments import AnalyzeArguments, CompressArguments, parse_limit, validate_analysis, validate_compression
from .candidates import TRAINED_MAPS
from .card import benchmark_notes, missing_accuracies, write_card
from .checkpoint import Checkpoint, load_checkpoint, loader_of
from .choice import measure_choice, refit_choice
from .comparison import Comparison, compare
from .converter import can_hold_maps, convert
from .heal import heal
from .limits import blank_pieces, budget_of, check_reachable
from .output import PICTURE, RECORD, REPORT, building, check_output_dir, write_json
from .plan import STOCK_MAPS, CompressionPlan
from .records import Outcome, Result, compression_record
from .replay import check_plan
from .report import text_table
from .run_images import RunImages, open_images
from .saving import check_reload, is_stock, save_model, weight_bytes
from .search import choose


_ANALYZED_MAPS = ["fold", "linear"]
_COMPRESSED_MAPS = ["fold"]
_RANK_SHARE = 8  # of the width


@dataclass(frozen=True)
class _Start:
    """Everything opened and checked; nothing computed yet."""

    checkpoint: Checkpoint
    adapter: Adapter
    images: RunImages
    accelerator: Accelerator
    say: Callable[[str], None]


def run_analyze(args: AnalyzeArguments) -> None:
    """Measure redundancy and costs, print the table, write redundancy.json and redundancy.png.

    Raises:
        InputError: bad input, before the analysis starts.
    """
    validate_analysis(args)
    args.map = args.map or list(_ANALYZED_MAPS)
    check_output_dir(args.output_dir, args.overwrite_output_dir)
    start = _start(args)
    analysis = _analyse(args, start)
    if start.accelerator.is_main_process:
        with building(args.output_dir) as folder:
            _write_report(analysis, folder, None)
        start.say(analysis.report.table())
        for note in network_notes(analysis.report):
            start.say(f"\n{note}")
        start.say(f"\n{args.output_dir} holds {REPORT} and {PICTURE}")
    start.accelerator.end_training()


def run_compress(args: CompressArguments) -> None:
    """Analyse, plan, convert, evaluate and save, as `args` say.

    Raises:
        InputError: bad input, before the analysis starts where that can be known.
        TrainingError: the saved folder does not load as it should, or the upload failed.
    """
    validate_compression(args)
    plan = None if args.plan is None else CompressionPlan.load(args.plan)
    args.map = args.map or _maps_of(plan) or list(_COMPRESSED_MAPS)
    check_output_dir(args.output_dir, args.overwrite_output_dir)
    start = _start(args)
    _check_own_maps(args, plan, start.adapter)
    trained = [kind for kind in args.map if kind in TRAINED_MAPS]
    if trained and start.accelerator.num_processes > 1:
        raise InputError(f"--map {' '.join(trained)}: maps are trained by one process: run without accelerate launch")
    pieces = _pieces(start)
    budget = None
    if plan is None:
        budget = budget_of(args, pieces.total)
        check_reachable(args, start.adapter, budget, pieces)
    else:
        check_plan(start.adapter, plan)
    repo_id = None
    if args.push_to_hub and start.accelerator.is_main_process:
        name = repository_name(args.hub_model_id, args.output_dir)
        repo_id = create_repo_early(name, args.hub_private_repo, args.token)

    analysis = _analyse(args, start)
    start.say(analysis.report.table())
    clock = _Clock()
    if plan is None:
        assert budget is not None  # made above
        choice = choose(
            analysis,
            budget,
            kinds=args.map,
            granularity=args.granularity,
            strategy=args.strategy,
            pieces=pieces,
            seed=args.seed,
        )
    else:
        choice = measure_choice(analysis, plan, pieces=pieces, seed=args.seed)
    clock.lap("planning")
    refit_cost = None
    if args.refit:
        choice, refit_cost = refit_choice(analysis, choice)
        clock.lap("refit")
    start.say(f"\nplan: {choice.plan}\nmeasured cost on the selection images: {choice.cost:.4g}")
    model = convert(start.checkpoint.model, choice.plan, choice.maps)
    clock.lap("conversion")
    healed = _heal(args, start, model, choice.plan)
    if start.accelerator.is_main_process:
        clock.lap("healing")
        _finish(args, start, analysis, Outcome(choice, budget, refit_cost, model, healed), clock, repo_id)
    start.accelerator.wait_for_everyone()
    start.accelerator.end_training()


def _shows_progress(args: AnalyzeArguments | CompressArguments) -> bool:
    """Bars are for terminals: in a file they would be thousands of lines."""
    return not args.disable_tqdm and sys.stderr.isatty()


def _start(args: AnalyzeArguments | CompressArguments) -> _Start:
    """Open model and images and check them; the heavy work comes later."""
    assert args.model_name_or_path is not None and args.map is not None  # validated, and chosen by the caller
    if not _shows_progress(args):
        datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # loading and saving take moments
    accelerator = Accelerator()
    checkpoint = load_checkpoint(args.model_name_or_path, args.model_revision, args.token)
    adapter = adapter_for(checkpoint.model)
    check_finite_weights(checkpoint.model)
    if "low_rank" in args.map and args.rank is None:
        args.rank = max(1, adapter.width // _RANK_SHARE)
    images = open_images(args, checkpoint.processor)
    for note in images.notes:
        accelerator.print(note)
    checkpoint.model.to(accelerator.device)
    return _Start(checkpoint, adapter, images, accelerator, lambda text: accelerator.print(highlighted(text)))


def _analyse(args: AnalyzeArguments | CompressArguments, start: _Start) -> Analysis:
    assert args.map is not None
    return analyze(
        start.checkpoint.model,
        start.images.calibration,
        kinds=args.map,
        granularity=args.granularity,
        max_span=args.max_span,
        cost_images=args.cost_images,
        ridge=args.ridge,
        bias=args.bias,
        rank=args.rank,
        seed=args.seed,
        chunk_size=args.batch_size,
        first_block=args.first_block,
        accelerator=start.accelerator,
        progress=_shows_progress(args),
    )


def _heal(
    args: CompressArguments, start: _Start, model: PreTrainedModel, plan: CompressionPlan
) -> tuple[PreTrainedModel, list[float]] | None:
    """A distilled copy of the compressed network and the losses, None where it was not asked for."""
    if not args.heal_steps:
        return None
    student = copy.deepcopy(model)
    losses = heal(
        student,
        start.checkpoint.model,
        start.images.calibration,
        args.heal_steps,
        plan=plan,
        batch_size=args.batch_size,
        seed=args.seed,
        accelerator=start.accelerator,
        progress=_shows_progress(args),
    )
    return student, losses


def _finish(
    args: CompressArguments,
    start: _Start,
    analysis: Analysis,
    outcome: Outcome,
    clock: "_Clock",
    repo_id: str | None,
) -> None:
    """Evaluate, save, tell. On the main process only."""
    assert args.model_name_or_path is not None
    name = args.model_name_or_path
    with building(args.output_dir) as folder:

        def evaluated(model: PreTrainedModel) -> Comparison:
            save_model(model, start.checkpoint.processor, name, folder, args.token)
            found = _compare(args, start, analysis, model, folder)
            clock.lap("evaluation")
            return found

        # what is saved last stays
        comparison = evaluated(outcome.model)
        healed = None if outcome.healed is None else evaluated(outcome.healed[0])
        model = outcome.model if outcome.healed is None else outcome.healed[0]
        chunk = next(start.images.evaluation.reader.chunks(start.images.evaluation.rows, 4))
        check_reload(model, folder, chunk.pixel_values.to(model.device, model.dtype))
        clock.lap("reloading")
        notes = network_notes(analysis.report) + result_notes(comparison, healed, _latency_share(args, comparison))
        notes += benchmark_notes(args, healed or comparison)
        result = Result(outcome, comparison, healed, tuple(notes), clock.seconds)
        _write_report(analysis, folder, outcome.choice.plan)
        write_json(folder / RECORD, compression_record(args, start.images, analysis, result))
        write_card(folder, args, model, start.adapter, start.images, result, repo_id)
    _tell(args, start.say, result)
    if repo_id is not None:
        upload_run(args.output_dir, repo_id, "Compressed with hf-simprune", args.token)
        start.say(f"uploaded to {repo_id}")


def _compare(
    args: CompressArguments, start: _Start, analysis: Analysis, model: PreTrainedModel, folder: Path
) -> Comparison:
    return compare(
        start.adapter,
        adapter_for(model),
        analysis.bench.cost,
        start.images.evaluation,
        start.images.training,
        args.batch_size,
        args.seed,
        progress=_shows_progress(args),
        file_bytes=(weight_bytes(start.checkpoint.model), file_size(folder)),
    )


def _pieces(start: _Start) -> PieceCosts:
    """Costs of the network's pieces, timed by the main process and the same on all."""
    found = [blank_pieces(start.adapter, start.images.calibration.reader)]
    if start.accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _maps_of(plan: CompressionPlan | None) -> list[str]:
    """Kinds of span map in a plan, so that an analysis for it measures these."""
    return sorted({span.map for span in plan.spans}) if plan is not None else []


def _check_own_maps(args: CompressArguments, plan: CompressionPlan | None, adapter: Adapter) -> None:
    """Refuse, before any work, maps and halves that the model's class cannot be saved with."""
    if can_hold_maps(adapter.model):
        return
    kinds = [kind for kind in args.map or [] if kind not in STOCK_MAPS]
    name = type(adapter.model).__name__
    if kinds:
        raise InputError(f"--map {' '.join(kinds)}: a {name} can have {' and '.join(STOCK_MAPS)} only")
    if args.granularity == "half" or (plan is not None and plan.halves):
        option = "--granularity half" if plan is None else "--plan"
        raise InputError(
            f"{option}: halves of a {name} cannot be replaced, only whole blocks: use --granularity block"
        )


def _latency_share(args: CompressArguments, comparison: Comparison) -> float | None:
    """The largest ratio to the original's latency that was asked for."""
    if args.max_latency is None:
        return None
    milliseconds = 1e3 * comparison.seconds[0]
    return parse_limit("max_latency", args.max_latency).remaining(milliseconds) / milliseconds


def _write_report(analysis: Analysis, folder: Path, plan: CompressionPlan | None) -> None:
    analysis.report.save(folder / REPORT)
    plot_redundancy(analysis.report, folder / PICTURE, plan)


def _tell(args: CompressArguments, say: Callable[[str], None], result: Result) -> None:
    header = ["", "original", "compressed", "change"]
    title = f"On {result.comparison.images} evaluation images, training-free"
    say("\n" + text_table(header, result.comparison.rows(), title))
    for reason in missing_accuracies(result.comparison):
        say(reason)
    if result.healed is not None:
        say("\n" + text_table(header, result.healed.rows(), f"After {args.heal_steps} steps of distillation"))
    for note in result.notes:
        say(f"\n{note}")
    model = result.outcome.model
    loader = loader_of(type(model).__name__).__name__
    trust = "" if is_stock(model) else ", trust_remote_code=True"
    say(
        f"\n{args.output_dir} holds the compressed model, its card, {RECORD}, {REPORT} and {PICTURE}. Load it with "
        f"{loader}.from_pretrained({args.output_dir!r}{trust})"
    )


class _Clock:
    """Wall clock of one part after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
