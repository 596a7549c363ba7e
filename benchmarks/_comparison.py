# SPDX-License-Identifier: Apache-2.0
"""What a comparison trains: its settings, the variants it compares, and the command line of every run."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from hf_simprune.dino.argument_parsing import TRAINING_OPTIONS
from hf_simprune.dino.arguments import DinoArguments
from hf_simprune.dino.validation import validate
from hf_simprune.errors import InputError
from hf_simprune.options.fields import option, values
from hf_simprune.options.parsing import Options
from hf_simprune.reduction import METHODS, method_options


ROOT = Path(__file__).parents[1]
CPU_METHODS = ("none", "random", "simprune", "evit", "tome")
CPU_SEEDS, GPU_SEEDS = (0,), (0, 1, 2)
# What the comparison sets itself, in every run.
_OWN = ("output_dir", "dataset_name_or_path", "seed", "token_reduction", "reduction_options")


@dataclass(kw_only=True)
class ComparisonArguments:
    """Every option of a comparison, on the command line or in its YAML file."""

    _argument_group_name = "comparison"

    recipe: str = option("recipes/cifar10_vit_micro.yaml", "Settings of all runs, a YAML file for train_dino.py.")
    options: list[str] | None = option(None, "Further settings of all runs, name=value; they win over the recipe.")
    # not None by default: in a list that may be empty, the word none would mean that it is
    methods: list[str] = values(
        (),
        "What to compare: NAME, or NAME:option=value,…, where the options are those of the method or of the training "
        "and a|b makes a variant of each (none, random, simprune, evit, tome on a CPU; all there are on a GPU).",
    )
    seeds: list[int] | None = option(None, "A run of every method for each seed (0 on a CPU; 0 1 2 on a GPU).")
    train: str | None = option(None, "Parquet file of training images with labels.")
    test: str | None = option(None, "Parquet file of test images with labels.")
    output_dir: str = option("outputs/comparison", "Folder of the runs and of the tables.")
    workers: int = option(1, "Runs at a time; times are then not those of a run alone.")
    table_only: bool = option(False, "Train nothing: the table of what has finished.")


COMPARISON_OPTIONS = Options(
    kind=ComparisonArguments,
    groups=(ComparisonArguments,),
    description="Train every method under the same seeds, order and crops, and compare what was learned.",
    prog="compare_reduction.py",
)


@dataclass(frozen=True)
class Variant:
    """A method with its options. label: what tables call it; settings: training options that are the variant's own."""

    label: str
    method: str
    settings: dict[str, str]

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return self.label.replace(":", "-").replace(",", "-").replace("=", "_")


@dataclass(frozen=True)
class Run:
    """One training run. argv: the options for train_dino.py; args: the same, parsed."""

    variant: Variant
    seed: int
    folder: Path
    argv: tuple[str, ...]
    args: DinoArguments

    @property
    def name(self) -> str:
        return self.folder.name


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """`simprune:curriculum=easy|hard,keep_rate=0.8` as variants, here two; `none`, the reference, comes first.

    Raises:
        InputError: an unknown method or option, a variant named twice, or no `none`.
    """
    variants: list[Variant] = []
    for text in texts:
        method, colon, options = text.partition(":")
        if method != "none" and method not in METHODS:
            raise InputError(f"methods {text}: {method} is unknown; choose from none, {', '.join(METHODS)}")
        pairs = [_option(text, method, entry) for entry in options.split(",")] if colon else []
        if len({name for name, _ in pairs}) < len(pairs):
            raise InputError(f"methods {text}: an option is given twice")
        for choice in itertools.product(*(value.split("|") for _, value in pairs)):
            chosen = {name: value.strip() for (name, _), value in zip(pairs, choice)}
            label = method + (":" + ",".join(f"{name}={value}" for name, value in chosen.items()) if chosen else "")
            variants.append(Variant(label, method, chosen))
    labels = [variant.label for variant in variants]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise InputError(f"methods: {repeated[0]} is named twice")
    if "none" not in labels:
        raise InputError(
            f"methods {' '.join(texts)}: none must be among them, the dense run that all are compared with"
        )
    return sorted(variants, key=lambda variant: variant.label != "none")


def _option(text: str, method: str, entry: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in entry.partition("="))
    if not equals or not value:
        raise InputError(f"methods {text}: {entry!r} is not of the form name=value")
    of_method = method_options(method) if method in METHODS else {}
    if name in _OWN or (name not in of_method and not _one_value(name)):
        own = ", ".join(of_method) or "none of its own"
        raise InputError(
            f"methods {text}: {name} is no option that a variant can have; {method} has {own}, and training options "
            "with one value, such as keep_rate and curriculum, work too"
        )
    return name, value


def _one_value(name: str) -> bool:
    hint: Any = TRAINING_OPTIONS.hints.get(name)
    return hint is not None and not any(get_origin(kind) is list for kind in (hint, *get_args(hint)))


def plan_runs(args: ComparisonArguments, gpu: bool) -> list[Run]:
    """All runs, seed by seed, the dense one first; everything that can be wrong with their options is said now."""
    if args.train is None or args.test is None:
        raise InputError("--train and --test are required: give them on the command line or in the YAML file")
    methods = args.methods or (["none", *METHODS] if gpu else [m for m in CPU_METHODS if m in ("none", *METHODS)])
    variants = parse_variants(methods)
    seeds = list(GPU_SEEDS if gpu else CPU_SEEDS) if args.seeds is None else args.seeds
    if len(set(seeds)) < len(seeds) or not seeds:
        raise InputError(f"seeds {seeds}: give each seed once")
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: must be at least 1")
    return [_run(args, variant, seed) for seed in seeds for variant in variants]


def find_recipe(recipe: str) -> Path:
    """The file from here, or from the root of the repository."""
    for path in (Path(recipe), ROOT / recipe):
        if path.is_file():
            return path
    raise InputError(f"recipe {recipe}: there is no such file, from here or from the root of the repository")


def _run(args: ComparisonArguments, variant: Variant, seed: int) -> Run:
    folder = Path(args.output_dir) / f"{variant.folder}-seed{seed}"
    training = {name: value for name, value in variant.settings.items() if name in TRAINING_OPTIONS.hints}
    own = {name: value for name, value in variant.settings.items() if name not in training}
    argv = ["--config", str(find_recipe(args.recipe)), "--dataset_name_or_path", str(args.train)]
    argv += ["--output_dir", str(folder), "--seed", str(seed), "--token_reduction", variant.method]
    for entry in args.options or []:
        name, equals, value = entry.partition("=")
        if not equals or name in _OWN:
            raise InputError(f"options {entry!r}: name=value of a training option is needed, but not of {_OWN}")
        argv += [f"--{name}", *value.split()]
    for name, value in training.items():
        argv += [f"--{name}", value]
    # whatever the recipe says of them belongs to its own method
    argv += ["--reduction_options", ",".join(f"{name}={value}" for name, value in own.items()) or "none"]
    try:
        parsed = TRAINING_OPTIONS.parse(argv)
        validate(parsed)
    except InputError as error:
        raise InputError(f"{variant.label}: {error}") from None
    return Run(variant, seed, folder, tuple(argv), parsed)


def without_place(args: DinoArguments) -> dict[str, Any]:
    """What decides the result of a run: its options without where it reads and writes, and how it goes on."""
    bare = replace(args, output_dir="", resume_from_checkpoint=None, overwrite_output_dir=False)
    values = {name: value for name, value in vars(bare).items() if name != "token"}
    return values | {"dataset_name_or_path": Path(args.dataset_name_or_path).name}
