# SPDX-License-Identifier: Apache-2.0
"""What every token-reduction method costs, counted from shapes: no network runs.

For each method and keep rate: patch tokens after every stage; the forward of the backbone over that of the dense one;
the method's own work (evidence, matching, merging, gates, reconstruction) in the same percent, as it is in a training
step (three student forwards and one of the teacher on two views, with matching across views where there is any).

    python benchmarks/flop_shares.py
    python benchmarks/flop_shares.py --architecture deit_base --keep_rate 0.9 0.5 --json shares.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_simprune.errors import InputError
from hf_simprune.evaluation.profile import BackboneSpec, backbone_macs, training_step_macs
from hf_simprune.models import SimPruneDeiTConfig, SimPruneViTConfig
from hf_simprune.models.architectures import ARCHITECTURES, MLP_RATIO
from hf_simprune.reduction import METHODS, ReductionSetting, build_reducer, default_reduction_layers


IMAGE_SIZE = 224
# Beside every method with its own defaults: what the papers have.
PUBLISHED: tuple[tuple[str, dict[str, Any], tuple[float, ...] | None], ...] = (
    ("evit", {"fuse": False}, None),
    ("tome", {"schedule": "every_layer", "r": 8}, (0.8,)),
    ("tome", {"schedule": "every_layer", "r": 11}, (0.7,)),
    ("expedit", {"schedule": "published"}, None),
)


def spec_and_setting(architecture: str, image_size: int = IMAGE_SIZE) -> tuple[BackboneSpec, ReductionSetting]:
    """The sizes of a network of `ARCHITECTURES`, and what reducers for it are built for."""
    sizes = ARCHITECTURES[architecture]
    config_class = SimPruneDeiTConfig if architecture.startswith("deit") else SimPruneViTConfig
    spec = BackboneSpec.from_config(config_class(**sizes, intermediate_size=MLP_RATIO * sizes["hidden_size"]))
    layers = default_reduction_layers(spec.depth)
    return spec, spec.setting(layers, sizes["num_attention_heads"], image_size)


def shares(spec: BackboneSpec, setting: ReductionSetting, keep_rates: list[float]) -> list[dict[str, Any]]:
    """One row for each method, set of options and keep rate; what a method refuses is left out."""
    cases = [(name, {}, None) for name in METHODS] + list(PUBLISHED)
    rows = []
    for name, options, only in sorted(cases, key=lambda case: list(METHODS).index(case[0])):
        for keep_rate in keep_rates:
            if only is None or keep_rate in only:
                try:
                    rows.append(share(spec, setting, name, keep_rate, options))
                except InputError as error:
                    print(f"{name} at {keep_rate:g}: {error}")
    return rows


def share(
    spec: BackboneSpec, setting: ReductionSetting, name: str, keep_rate: float, options: dict[str, Any]
) -> dict[str, Any]:
    """One row; shares in percent of the dense network."""
    reducer, grid = build_reducer(name, keep_rate, setting, options), setting.grids[0]
    dense = backbone_macs(spec, grid)
    step = training_step_macs(spec, grid, reducer)
    return {
        "method": name,
        "options": options,
        "keep_rate": keep_rate,
        "patch_tokens": list(reducer.counts(grid)),
        "backbone_percent": 100 * backbone_macs(spec, grid, reducer) / dense,
        "own_percent": 100 * step.matching / (2 * (3 + 1) * dense),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_small", choices=list(ARCHITECTURES), help="vit_small is DeiT-S")
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--keep_rate", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--json", help="file to write the rows to")
    return parser.parse_args()


def main() -> None:
    args = parse()
    rows = shares(*spec_and_setting(args.architecture, args.image_size), args.keep_rate)
    print("| method | keep | backbone | own work | patch tokens |\n|---|---|---|---|---|")
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        name = f"{row['method']} ({options})" if options else row["method"]
        counts = row["patch_tokens"]
        shown = " → ".join(map(str, counts if len(counts) < 6 else [*counts[:3], "…", counts[-1]]))
        percent = f"{row['backbone_percent']:.1f} % | {row['own_percent']:.2f} %"
        print(f"| {name} | {row['keep_rate']:g} | {percent} | {shown} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
