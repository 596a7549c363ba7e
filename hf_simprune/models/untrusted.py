# SPDX-License-Identifier: Apache-2.0
"""Folders of models that someone else wrote: what is wrong with one is said in a line, whatever libraries raise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import InputError


_MOST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_channels": 2**12,
    "image_size": 2**16,
    "patch_size": 2**16,
    "mlp_ratio": 2**10,
    "vocab_size": 2**24,
    "num_labels": 2**20,
}
_LONGEST = 300  # characters of a message
_CONVERT = (
    " (if it has pickled weights only: they are not read, as they can hold code. If you trust them, convert them with "
    "`AutoModel.from_pretrained(NAME, use_safetensors=False).save_pretrained(FOLDER)`, with the class the model has)"
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around the libraries' reading of a model folder: its errors become an InputError that begins with `what`.

    On an unsound file they raise nearly anything: a RecursionError for a configuration nested without end, a
    ZeroDivisionError for a network without heads.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        pickled = _CONVERT if "file named model.safetensors" in str(error) else ""
        raise InputError(f"{what}: {in_one_line(error)}{pickled}") from error


def in_one_line(error: Exception) -> str:
    """An error of the libraries, which like to add paragraphs, cut to its first sentences."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " …"


def check_config(name_or_path: str, **hub: str | bool | None) -> None:
    """Refuse a configuration with what no network has, before a machine tries to build it, or that names code.

    Some classes make lists as long as a size while they are built, so the file is judged before its class.

    Raises:
        OSError, ValueError: there is no such file, or it names the setting.
    """
    check_values(PreTrainedConfig.get_config_dict(name_or_path, **hub)[0])


def check_values(values: dict[str, Any]) -> None:
    """`check_config` for a configuration at hand. Raises ValueError, which names the setting."""
    for name in ("attn_implementation", "_attn_implementation"):
        if isinstance(values.get(name), str) and "/" in values[name]:
            raise ValueError(f"{name} {values[name][:80]!r} is code on the Hub, which a configuration may not ask for")
    for value in values.values():  # towers, and what else has a configuration of its own
        if isinstance(value, dict):
            check_values(value)
    for name, most in _MOST.items():
        found = values.get(name)
        for size in found if isinstance(found, (list, tuple)) else (found,):
            least = 0 if name == "num_labels" else 1
            if isinstance(size, (int, float)) and not least <= size <= most:
                raise ValueError(f"{name} must be from {least} to {most}, and is {str(found)[:20]}")
