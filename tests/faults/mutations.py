"""Seeded changes to JSON texts and to safetensors files: what a careless or hostile author of a folder may write."""

import json
import random
import struct
from typing import Any


DEEP = 100_000
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, -1, -8, 0.5, -0.1, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**9,
    10**18, 10**400, "", "0", "gelu", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a\u0000b", "\ud800", "x.y",
    [], [0], [None], [[[[]]]], {}, {"": 0}, {"kind": "linear"}, list(range(2000)),
)  # fmt: skip
# Keys that libraries act on, wherever they came from.
_KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": ({"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}, "evil", 3),
    "model_type": ("vit", "deit", "dinov2", "clip", "bert", "simprune_vit", "simprune_dinov2", "", None, [1]),
    "architectures": (["ViTModel"], ["ViTForImageClassification"], ["Evil"], "ViTModel", [None], [], None),
    "torch_dtype": ("float16", "float64", "nothing", "os.system", 3, None),
    "dtype": ("bfloat16", "int8", "nothing", 3),
    "quantization_config": ({}, {"quant_method": "bitsandbytes"}, {"quant_method": "nothing"}, 3),
    "transformers_weights": ("../model.safetensors", "evil.bin", "x.safetensors"),
    "attn_implementation": ("flash_attention_9", "eager", "kernels-community/evil"),
    "_attn_implementation": ("flash_attention_9", "evil/evil"),
    "num_hidden_layers": (0, 1, 2, 5, 10**7, -3, "3"),
    "hidden_size": (0, 1, 10**6, -16),
    "intermediate_size": (0, 10**7, -1),
    "num_attention_heads": (0, -2, 3, 10**6),
    "patch_size": (0, -4, 3, 10**6, [4, 4], [0, 0]),
    "image_size": (0, -16, 15, 10**6, [16, 16], [16, 8]),
    "num_channels": (0, 1, 10**6, -3),
    "hidden_act": ("relu", "os.system", "", 3),
    "num_labels": (0, 10**7, -1),
    "id2label": ({}, {"0": "a"}, {"x": "a"}, {str(i): "a" for i in range(3000)}, []),
    "problem_type": ("x",),
    "block_maps": ({"0": {"kind": "linear"}}, {"1": {"kind": "low_rank", "rank": 10**9}}, {"x": 3}, [], {"0": None}),
    "token_reduction": ("tome", "evit", "nothing", 3, ["tome"]),
    "keep_rate": (0, 0.5, 1, 2, -1, float("nan")),
    "reduction_layers": ([], [0], [10**9], [-1], [1, 1], "1"),
    "reduction_options": ({}, {"r": 10**9}, {"x": 1}, []),
    "mlp_ratio": (0, 10**6, -1, 1.5),
    "pruned_heads": ({"0": [0, 1]}, {"x": 1}),
    "size": (0, -1, 10**9, {"height": 10**9, "width": 1}, {"x": 1}),
    "image_processor_type": ("ViTImageProcessor", "Evil", "os.system", 3),
    "image_mean": ([], [0], "x", [1, 2, 3, 4]),
    "image_std": ([0, 0, 0], None, "x"),
}


def mutated_text(text: str, chance: random.Random, depth_too: bool = True) -> tuple[str, str]:
    """The text of a JSON object with one to three changes, and what they were."""
    kind = chance.random()
    if kind < 0.2:
        return _mutated_characters(text, chance)
    if kind < 0.23 and depth_too:
        return chance.choice(("[", '{"a":', '{"depth": [')) * DEEP, "nested endlessly"
    tree = json.loads(text)
    done = [_mutate_tree(tree, chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    changed = json.dumps(tree)
    if kind < 0.26:  # an object may hold a key twice
        changed = changed[:-1] + "," + changed[1:]
        done.append("every key twice")
    return changed, "; ".join(done)


def _mutated_characters(text: str, chance: random.Random) -> tuple[str, str]:
    place = chance.randrange(len(text))
    kind = chance.choice(("cut", "drop", "insert", "flip"))
    if kind == "cut":
        return text[:place], f"cut at {place}"
    if kind == "drop":
        return text[:place] + text[place + chance.randrange(1, 20) :], f"dropped at {place}"
    if kind == "insert":
        new = chance.choice(("\0", "\ufeff", "}", "]", ",", "-", "9" * 5000, "e99", '"', "NaN"))
        return text[:place] + new + text[place:], f"{new[:9]!r} at {place}"
    return text[:place] + chr(ord(text[place]) ^ 1 << chance.randrange(5)) + text[place + 1 :], f"flip at {place}"


def _mutate_tree(tree: Any, chance: random.Random) -> str:
    node, where = tree, ""
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = chance.choice(keys)
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.7:
            node, where = inner, f"{where}/{key}"
            continue
        break
    else:
        return "nothing to change"
    kind = chance.random()
    if kind < 0.15:
        del node[key]
        return f"without {where}/{key}"
    if kind < 0.4 and isinstance(node, dict):
        key = chance.choice(list(_KEYS))
        node[key] = chance.choice(_KEYS[key])
    elif kind < 0.55 and key in _KEYS:
        node[key] = chance.choice(_KEYS[key])
    elif kind < 0.6 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
        return f"{where}/{key} renamed"
    else:
        node[key] = chance.choice(_VALUES)
    return f"{where}/{key} = {str(node[key])[:40]!r}"


def mutated_safetensors(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header, header length or end."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = chance.random()
    if kind < 0.15:
        length = chance.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + header + body, f"header of {length} bytes"
    if kind < 0.25:
        end = chance.randrange(len(data))
        return data[:end], f"cut at {end}"
    if kind < 0.35:
        place = 8 + chance.randrange(len(header))
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :], f"flip at {place}"
    if kind < 0.45:
        text, done = mutated_text(header.decode(), chance)
    else:
        tree = json.loads(header)
        done = _mutate_header(tree, chance)
        text = json.dumps(tree)
    new = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + body, done


def _mutate_header(tree: dict[str, Any], chance: random.Random) -> str:
    name = chance.choice([key for key in tree if key != "__metadata__"])
    entry = tree[name]
    kind = chance.choice(("dtype", "shape", "offsets", "name", "alias", "metadata", "drop", "add", "value"))
    if kind == "dtype":
        entry["dtype"] = chance.choice(("F64", "I8", "BOOL", "F8_E4M3", "BF16", "C64", "X", "", 3, None))
    elif kind == "shape":
        entry["shape"] = chance.choice(
            ([], [0], [-1], [2**32, 2**32], [2**63], entry["shape"][::-1], [1.5], "x", None)
        )
    elif kind == "offsets":
        low, high = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            ([high, low], [low, high + 4], [low + 1, high + 1], [0, 2**63], [-4, 0], [2**64, 2**64], [low], [], None)
        )
    elif kind == "name":
        tree[chance.choice(("../x", "/etc/passwd", "", "layers.9.x", "a" * 9000))] = tree.pop(name)
    elif kind == "alias":
        tree["layers.0.alias"] = dict(entry)
    elif kind == "metadata":
        tree["__metadata__"] = chance.choice(({"format": "np"}, {"format": 3}, {}, [], "x", {"format": "x" * 9999}))
    elif kind == "drop":
        del tree[name]
    elif kind == "add":
        tree["layers.7.x"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    else:
        tree[name] = chance.choice(_VALUES)
    return f"{kind} of {name}"
