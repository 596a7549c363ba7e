# SPDX-License-Identifier: Apache-2.0
"""What do SimPrune's learned gates do in a training: tokens each stage keeps, the compute target, and chance as rival?

Trains a tiny network with simprune_dynamic from several starts of the gates; then, for each start, again with random
gates that keep exactly as many tokens in every step, stage and crop size as the learned ones did; and with simprune
at the keep rate that sets the target. Seed, images and crops are the same for all. The k-NN is of the teacher without
pruning. Runs of a few minutes do not separate accuracies of a point or two: several `--seeds` show the spread.

    python benchmarks/dynamic_gates.py --dataset images.parquet --json gates.json
"""

import argparse
import os
import statistics


# Idle threads must sleep: a spinning one would be counted as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from _measure import emit, header  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_simprune.dino.arguments import DinoArguments  # noqa: E402
from hf_simprune.dino.build import (  # noqa: E402
    augmentation,
    build_dual_branch,
    build_schedules,
    image_processor,
    normalisation,
)
from hf_simprune.dino.engine import DinoEngine  # noqa: E402
from hf_simprune.dino.resolve import resolve  # noqa: E402
from hf_simprune.dino.run_data import open_data  # noqa: E402
from hf_simprune.dino.trainer import step_seed  # noqa: E402
from hf_simprune.reduction import SimPruneDynamicReducer, token_counts  # noqa: E402
from hf_simprune.reduction.simprune_dynamic import pass_share  # noqa: E402


Counts = list[list[int]]  # patch tokens before the first stage and after each; of global crops, then of local ones


class RandomGate(nn.Module):
    """As many logits as there are tokens, by chance."""

    def forward(self, patches: Tensor) -> Tensor:
        return torch.randn(patches.shape[:2], device=patches.device)


class RandomGates(SimPruneDynamicReducer):
    """Gates by chance, which keep as many tokens as was recorded: `recorded` has the counts of every step."""

    recorded: list[Counts]

    def build_learned(self) -> nn.Module:
        gates = nn.Module()
        gates.gates = nn.ModuleList(RandomGate() for _ in self.layers)
        return gates

    def before_pass(self, global_crops: Tensor, dual: nn.Module) -> None:
        """Line up what this pass is to keep: all stages of the global crops come before those of the local ones."""
        self._keeps = iter([keep for counts in next(self._steps) for keep in counts[1:]])

    def replay(self, recorded: list[Counts]) -> None:
        self._steps = iter(recorded)

    def _agree(self, *args: object) -> int:
        return next(self._keeps)

    def take_auxiliary_loss(self) -> None:
        self._forget()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="parquet file, folder or Hub name of images, with labels")
    parser.add_argument("--eval_dataset", help="images that the k-NN classifies; held out of --dataset if not given")
    parser.add_argument("--keep_rate", type=float, default=0.8, help="the target is SimPrune's compute at this rate")
    parser.add_argument("--gate_init", type=float, nargs="+", default=[-2.0, 2.0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="file to write all numbers to")
    return parser.parse_args()


def arguments(args: argparse.Namespace, seed: int, method: str, gate_init: float | None) -> DinoArguments:
    return DinoArguments(
        output_dir="unused",
        dataset_name_or_path=args.dataset,
        eval_dataset_name_or_path=args.eval_dataset,
        architecture="vit_micro",
        config_overrides=f"hidden_size={args.width},num_hidden_layers={args.depth},num_attention_heads=4,"
        f"intermediate_size={4 * args.width}",
        image_size=32,
        patch_size=4,
        local_crops_number=2,
        local_crop_size=16,
        global_crops_scale=[0.4, 1.0],
        local_crops_scale=[0.15, 0.4],
        out_dim=1024,
        head_hidden_dim=256,
        head_bottleneck_dim=64,
        momentum_teacher=0.99,
        drop_path_rate=0.0,
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
        freeze_last_layer_steps=args.steps // 10,
        token_reduction=method,
        keep_rate=args.keep_rate,
        reduction_options=None if gate_init is None else f"gate_init={gate_init}",
        seed=seed,
        disable_tqdm=True,
    )


def train(args: DinoArguments, device: str, replayed: list[Counts] | None = None) -> dict[str, object]:
    """Train as asked, or with random gates that keep the counts of `replayed`."""
    accelerator = Accelerator(cpu=device == "cpu")
    data = open_data(args)
    settings = resolve(args, data.num_images, 1)
    norm = normalisation(args)
    model = build_dual_branch(args, settings)
    if replayed is not None:
        chance = RandomGates(args.keep_rate, model.reducer.setting, matching=args.matching)
        chance.replay(replayed)
        model.reducer = chance
        for branch in (model.student, model.teacher):
            branch.reduction = chance.build_learned()
    engine = DinoEngine(model, accelerator)
    schedules = build_schedules(args, settings)
    recorded: list[Counts] = []
    model.register_forward_hook(lambda module, inputs, output: recorded.append(kept_counts(output.maps)))
    batches = data.source(augmentation(args, settings, norm), accelerator)
    stream, losses = batches.batches(0), []
    for step in range(settings.total_steps):
        torch.manual_seed(step_seed(args.seed, step, 0))
        views = [batches.views(batch) for batch in next(stream)]
        engine.before_step(step, settings.steps_per_epoch, views)
        losses.append(engine.step(views, schedules.at(step)).loss)
    knn = data.online_knn(model.teacher.backbone, image_processor(settings, norm), accelerator)
    late = max(1, len(losses) // 5)
    result = {"loss": statistics.fmean(losses[-late:]), "counts": recorded}
    if knn is not None:
        result |= knn(settings.total_steps)
    return result | gates_report(recorded, model.reducer.setting, args.keep_rate, args.local_crops_number, late)


def kept_counts(maps: tuple) -> Counts:
    student, local = ([stage[which] for stage in maps] for which in (0, 2))
    return [[crops[0].count, *(kept.indices.shape[1] for kept in crops)] for crops in (student, local)]


def gates_report(
    counts: list[Counts], setting: object, keep_rate: float, locals_: int, late: int
) -> dict[str, object]:
    """Shares of compute, of the first step, by fifths of the training, and the target; kept share of every stage."""
    rows = (2, locals_)
    shares = [pass_share(step, rows, setting) for step in counts]
    stages = len(counts[0][0]) - 1
    wanted = [token_counts(crops[0], keep_rate, stages) for crops in counts[0]]
    fifths = [statistics.fmean(shares[start : start + late]) for start in range(0, len(shares) - late + 1, late)]
    kept = [
        [statistics.fmean(step[crop][s + 1] / step[crop][s] for step in counts[-late:]) for s in range(stages)]
        for crop in (0, 1)
    ]
    return {
        "target": pass_share(wanted, rows, setting),
        "first_share": shares[0],
        "share_by_fifths": fifths,
        "late_share_sd": statistics.pstdev(shares[-late:]),
        "kept_global": kept[0],
        "kept_local": kept[1],
    }


def show(name: str, run: dict[str, object]) -> None:
    def words(values: list[float]) -> str:
        return " ".join(f"{value:.3f}" for value in values)

    gap = 100 * (run["share_by_fifths"][-1] - run["target"])
    print(f"{name}: loss {run['loss']:.3f}" + (f", k-NN {run['knn_accuracy']:.4f}" if "knn_accuracy" in run else ""))
    print(f"  compute {run['first_share']:.3f} at first, by fifths {words(run['share_by_fifths'])}; "
          f"target {run['target']:.3f}, gap at the end {gap:+.2f} points")  # fmt: skip
    print(f"  kept of each stage: global {words(run['kept_global'])}, local {words(run['kept_local'])}", flush=True)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    report = header(torch.device(args.device), args.seeds[0]) | {"settings": vars(args)}
    for key in ("command", "processor", "date"):
        print(f"{key}: {report[key]}")
    runs: list[dict[str, object]] = []
    for seed in args.seeds:
        for init in args.gate_init:
            options = arguments(args, seed, "simprune_dynamic", init)
            learned = train(options, args.device)
            chance = train(options, args.device, replayed=learned["counts"])
            for name, run in (("learned gates", learned), ("random gates, as many tokens", chance)):
                show(f"seed {seed}, start {init:+g}, {name}", run)
                runs.append({"seed": seed, "gate_init": init, "gates": name, **run, "counts": None})
        plain = train(arguments(args, seed, "simprune", None), args.device)
        show(f"seed {seed}, simprune", plain)
        runs.append({"seed": seed, "gate_init": None, "gates": "simprune", **plain, "counts": None})
    if all("knn_accuracy" in run for run in runs):
        gaps = [100 * (a["knn_accuracy"] - b["knn_accuracy"]) for a, b in zip(runs, runs[1:], strict=False)
                if (a["gates"], b["gates"]) == ("learned gates", "random gates, as many tokens")]  # fmt: skip
        spread = f" ± {statistics.stdev(gaps):.2f} (sd)" if len(gaps) > 1 else ""
        print(f"k-NN, learned - random gates: {statistics.fmean(gaps):+.2f}{spread} points over {len(gaps)} pairs")
        report["knn_learned_minus_random"] = gaps
    emit(report | {"runs": [{k: v for k, v in run.items() if k != "counts"} for run in runs]}, args.json)


if __name__ == "__main__":
    main()
