# SPDX-License-Identifier: Apache-2.0
"""What a saved model is: its blocks, what was done to them, its cost and origin, from its small files alone."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoConfig, PreTrainedConfig

from .. import models  # noqa: F401  (makes the Auto classes know this package's models)
from ..errors import InputError
from ..models.untrusted import check_values, reading
from ..rba.adapters.base import pair
from ..rba.checkpoint import loader_of
from ..rba.plan import CompressionPlan
from ..rba.report import block_range
from .model_cost import macs
from .model_files import ModelFiles
from .outputs import Network


@dataclass(frozen=True)
class Description:
    """What `hf-simprune info` says.

    Attributes:
        model: as it was given; `commit` of a Hub model.
        architecture: class that was saved; `model_type` of its configuration.
        needs_code: loads without this package under `trust_remote_code=True` only.
        blocks: modules in the stack, maps included; `original_blocks` of the model it was made from, if it was.
        kept: blocks of the original that are left in full or in half.
        removed: of the original's blocks, in words such as "5" or "3-4", by the map that stands in for them.
        replaced_halves: in words such as "mlp of block 3", by the map.
        token_reduction: method and settings; None where all tokens stay.
        image_size, patch_size: (height, width) in pixels.
        width, heads, classes: of tokens and attention; classes None without a head.
        parameters: stored; `dtypes` how many of each precision.
        flops: of one image; None where they cannot be counted, for `flops_missing`.
        weight_bytes: size of the weight files.
        made_by: "compressed", "pretrained" or "" where nothing says.
        made_from: the model it was made from.
        datasets: named by its card or its record.
        command: that made it.
    """

    model: str
    commit: str | None
    architecture: str
    model_type: str
    needs_code: bool
    blocks: int
    original_blocks: int
    kept: int
    removed: dict[str, str]
    replaced_halves: dict[str, str]
    token_reduction: dict[str, Any] | None
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    heads: int
    classes: int | None
    parameters: int
    dtypes: dict[str, int]
    flops: int | None
    flops_missing: str
    weight_bytes: int
    made_by: str
    made_from: str | None
    datasets: tuple[str, ...]
    command: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for the terminal."""
        height, width = self.image_size
        patch = "x".join(str(side) for side in dict.fromkeys(self.patch_size))
        loads = "trust_remote_code=True, or import hf_simprune.models" if self.needs_code else "transformers alone"
        table = [
            ("class", f"{self.architecture} ({self.model_type})"),
            ("loads with", loads),
            ("input", f"{height}x{width} pixels, patches of {patch}"),
            ("blocks", self._blocks()),
            *((f"  {what}", f"replaced by {kind}") for what, kind in self._replaced()),
            ("tokens", self._tokens()),
            ("width, heads", f"{self.width}, {self.heads}"),
            ("classes", "none" if self.classes is None else str(self.classes)),
            ("parameters, M", f"{self.parameters / 1e6:.4g} ({', '.join(self.dtypes)})"),
            ("FLOPs an image, G", f"- ({self.flops_missing})" if self.flops is None else f"{self.flops / 1e9:.4g}"),
            ("weights, MB", f"{self.weight_bytes / 1e6:.4g}"),
            ("made", self.made_by or "nothing says how"),
        ]
        origin = (("from", self.made_from), ("with", ", ".join(self.datasets)), ("by", self.command))
        return [*table, *((f"  {word}", value) for word, value in origin if value)]

    def _replaced(self) -> list[tuple[str, str]]:
        return [
            *((f"{'blocks' if '-' in blocks else 'block'} {blocks}", kind) for blocks, kind in self.removed.items()),
            *self.replaced_halves.items(),
        ]

    def _blocks(self) -> str:
        if self.original_blocks == self.blocks and not self._replaced():
            return f"{self.blocks}"
        return f"{self.kept} of {self.original_blocks} kept"

    def _tokens(self) -> str:
        if self.token_reduction is None:
            return "all stay"
        settings = [f"{name} {value}" for name, value in self.token_reduction.items() if name != "method"]
        return ", ".join([str(self.token_reduction["method"]), *settings])


def describe(files: ModelFiles) -> Description:
    """Read what the files say; nothing is downloaded and no weight read.

    Raises:
        InputError: the configuration is none, or of something else than a vision transformer.
    """
    where = f"--model_name_or_path {files.place}"
    values = files.json("config.json")
    config = _config(files, where)
    vision = getattr(config, "vision_config", config)
    for name in ("num_hidden_layers", "hidden_size", "image_size", "patch_size"):
        if not hasattr(vision, name):
            raise InputError(f"{where}: a {config.model_type} is no vision transformer: it has no {name}")
    architecture = _architecture(values, where)
    plan = _plan(files, where)
    blocks = vision.num_hidden_layers
    maps = getattr(config, "block_maps", None) or {}
    flops, missing = _flops(config, architecture)
    made_by, made_from, datasets, command = _origin(files)
    reduction = getattr(config, "token_reduction", None)
    return Description(
        model=files.place,
        commit=files.commit,
        architecture=architecture or type(config).__name__.replace("Config", "Model"),
        model_type=config.model_type,
        needs_code="auto_map" in values,
        blocks=blocks,
        original_blocks=blocks if plan is None else plan.depth,
        kept=blocks - _whole_maps(maps) if plan is None else plan.depth - len(plan.removed_blocks),
        removed=_maps_in_place(maps) if plan is None else {block_range(s.start, s.end): s.map for s in plan.spans},
        replaced_halves=_halves_in_place(maps)
        if plan is None
        else {f"{half.half} of block {half.block}": half.map for half in plan.halves},
        token_reduction=None
        if reduction is None
        else {
            "method": reduction,
            "keep_rate": config.keep_rate,
            "layers": config.reduction_layers,
            **(config.reduction_options or {}),
        },
        image_size=pair(vision.image_size),
        patch_size=pair(vision.patch_size),
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        classes=config.num_labels if "ForImageClassification" in architecture else None,
        parameters=sum(files.parameters.values()),
        dtypes=files.parameters,
        flops=flops,
        flops_missing=missing,
        weight_bytes=files.weight_bytes,
        made_by=made_by,
        made_from=made_from,
        datasets=datasets,
        command=command,
    )


def _config(files: ModelFiles, where: str) -> PreTrainedConfig:
    values = files.json("config.json")
    with reading(f"{where}: its configuration is none of a model that is known here"):
        check_values(values)
        return AutoConfig.for_model(**{key: value for key, value in values.items() if key != "auto_map"})


def _architecture(values: dict[str, Any], where: str) -> str:
    named = values.get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise InputError(f"{where}: config.json: architectures {named!r:.80}: a list of class names is accepted")
    return named[0]


def _flops(config: PreTrainedConfig, architecture: str) -> tuple[int | None, str]:
    """FLOPs of one image, counted while the network runs on tensors that have shapes and no values."""
    try:
        with torch.device("meta"):
            model = loader_of(architecture).from_config(config).eval()
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = Network(model.to_empty(device="cpu"))
            vision = getattr(config, "vision_config", config)
            return 2 * macs(network.forward, torch.empty(1, vision.num_channels, *network.image_size)), ""
    except InputError as error:
        return None, str(error)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None, "they depend on the image"


def _plan(files: ModelFiles, where: str) -> CompressionPlan | None:
    record = files.json("compression.json")
    if "plan" not in record:
        return None
    try:
        return CompressionPlan.from_dict(record["plan"])
    except InputError as error:
        raise InputError(f"{where}: compression.json: {error}") from None


def _whole_maps(maps: dict[str, Any]) -> int:
    return sum(entry["kind"] != "block" for entry in maps.values())


def _maps_in_place(maps: dict[str, Any]) -> dict[str, str]:
    return {number: entry["kind"] for number, entry in maps.items() if entry["kind"] != "block"}


def _halves_in_place(maps: dict[str, Any]) -> dict[str, str]:
    return {
        f"{half} of block {number}": entry[half]
        for number, entry in maps.items()
        if entry["kind"] == "block"
        for half in ("attention", "mlp")
        if entry[half] != "full"
    }


def _origin(files: ModelFiles) -> tuple[str, str | None, tuple[str, ...], str | None]:
    """How it was made, from what, on which data, and by which command."""
    card = _card(files)
    base, named = card.get("base_model"), card.get("datasets")
    base = _text(base[0] if isinstance(base, list) and base else base)
    data = tuple(map(str, named)) if isinstance(named, list) else _present(named)
    record = files.json("compression.json")
    if record:
        data = data or _present(_dict(record.get("data")).get("dataset"))
        return "compressed", _text(record.get("model")) or base, data, _text(record.get("command"))
    if "training/arguments.yaml" in files.texts:
        options = _mapping(files.texts["training/arguments.yaml"])
        data = data or _present(options.get("dataset_name_or_path"))
        return "pretrained", _text(options.get("model_name_or_path")) or base, data, None
    return "", base, data, None


def _card(files: ModelFiles) -> dict[str, Any]:
    """The card's metadata; a card that is broken or has none says nothing."""
    text = files.texts.get("README.md", "")
    if not text.startswith("---"):
        return {}
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return _dict(found)


def _dict(value: Any) -> dict[str, Any]:
    """What files of others hold may be of any type; what is not what it should be says nothing."""
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _present(name: Any) -> tuple[str, ...]:
    return (name,) if _text(name) else ()
