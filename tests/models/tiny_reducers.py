"""Reducers of a few lines, one for each thing a block can be asked, and a pass through a network in plain loops."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_simprune.reduction import BranchReducer, Kept, Merged, Seen, TokenMap, keep_count


def strongest(scores: Tensor, keep_rate: float) -> Kept:
    keep = keep_count(scores.shape[1], keep_rate)
    return Kept(scores.argsort(descending=True, stable=True)[:, :keep].sort().values, scores.shape[1])


class CountedReducer(BranchReducer):
    """Counts how often it decides."""

    decisions = 0

    def decide(self, seen: Seen) -> TokenMap:
        assert not torch.is_grad_enabled() and not seen.patches.requires_grad
        assert seen.attention is None or not seen.attention.requires_grad
        self.decisions += 1
        return self.choose(seen)


class KeepLarge(CountedReducer):
    name = "large"

    def choose(self, seen: Seen) -> TokenMap:
        return strongest(seen.patches.float().norm(dim=-1), self.keep_rate)


class KeepLargeAfter(KeepLarge):
    name = "large_after"
    site = "after"


class KeepAttended(CountedReducer):
    name = "attended"
    needs = "cls_attention"

    def choose(self, seen: Seen) -> TokenMap:
        assert seen.attention.dtype == torch.float32
        return strongest(seen.attention, self.keep_rate)


class KeepLongKeys(CountedReducer):
    name = "long_keys"
    needs = "keys"
    site = "after"

    def choose(self, seen: Seen) -> TokenMap:
        assert seen.attention.dtype == torch.float32
        return strongest(seen.attention.norm(dim=-1), self.keep_rate)


class MergeInside(CountedReducer):
    """The least attended tokens go into the most attended one, which counts for more from then on."""

    name = "merged_inside"
    site = "attention"
    weighs_sizes = True

    def choose(self, seen: Seen) -> TokenMap:
        assert seen.attention.dtype == torch.float32
        importance = seen.attention.mean(1)[:, seen.prefix :]
        keep = keep_count(importance.shape[1], self.keep_rate)
        order = importance.argsort(descending=True, stable=True)
        stay = order[:, :keep].sort().values
        places = torch.arange(keep).expand(len(stay), -1)
        first = (stay == order[:, :1]).int().argmax(1, keepdim=True)
        groups = first.repeat(1, importance.shape[1]).scatter(1, stay, places)
        sizes = torch.ones_like(importance) if seen.sizes is None else seen.sizes
        totals = torch.zeros(len(stay), keep).scatter_add(1, groups, sizes)
        return Merged(groups, sizes / totals.gather(1, groups), keep)


class MergeKeys(MergeInside):
    """The same between attention and MLP, by the length of the keys."""

    name = "merged_keys"
    site = "middle"
    needs = "keys"

    def choose(self, seen: Seen) -> TokenMap:
        lengths = seen.attention.norm(dim=-1)
        map_like = lengths.new_zeros(len(lengths), 1, seen.prefix + lengths.shape[1])
        map_like[:, 0, seen.prefix :] = lengths
        return super().choose(seen._replace(attention=map_like))


class MergeAttended(MergeKeys):
    """The same by the attention of CLS, which counts a merged token by its size."""

    name = "merged_attended"
    needs = "cls_attention"

    def choose(self, seen: Seen) -> TokenMap:
        padded = torch.nn.functional.pad(seen.attention, (seen.prefix, 0))
        return MergeInside.choose(self, seen._replace(attention=padded.unsqueeze(1)))


TINY_REDUCERS = (KeepLarge, KeepLargeAfter, KeepAttended, KeepLongKeys, MergeInside, MergeKeys, MergeAttended)

# What goes into each output token: lists of indices into the patch tokens there are.
Groups = list[list[int]]


def naive_groups(name: str, keep_rate: float, patches: Tensor, weights: Tensor, keys: Tensor, prefix: int) -> Groups:
    """The decision for one image from its patches (n, D), attention (heads, T, T) and keys (heads, T, width)."""
    scores = {
        "large": [patch.norm().item() for patch in patches],
        "attended": weights.mean(0)[0, prefix:].tolist(),
        "long_keys": keys.mean(0)[prefix:].norm(dim=-1).tolist(),
        "merged_inside": weights.mean(0).mean(0)[prefix:].tolist(),
    }
    same = {"large_after": "large", "merged_keys": "long_keys", "merged_attended": "attended"}
    scores = scores[same.get(name, name)]
    best_first = sorted(range(len(patches)), key=lambda token: -scores[token])
    keep = math.ceil(keep_rate * len(patches) - 1e-9)
    groups = [[token] for token in sorted(best_first[:keep])]
    if name.startswith("merged"):
        next(group for group in groups if group == [best_first[0]]).extend(best_first[keep:])
    return groups


def naive_pass(
    layers, tokens: Tensor, reducer: BranchReducer, prefix: int, heads: int
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """One image (T, D) after every block, the restored tokens (T, D), and every block's attention, on loops.

    Without stochastic depth and dropout; in whatever precision the network has.
    """
    states, maps, undo = [], [], []
    sizes = [1.0] * len(tokens)
    for index, layer in enumerate(layers):
        stage = index in reducer.layers
        normed = layer.layernorm_before(tokens)
        q, k, v = (getattr(layer.attention, f"{name}_proj")(normed).chunk(heads, -1) for name in "qkv")
        bias = torch.tensor([math.log(size) if reducer.weighs_sizes else 0.0 for size in sizes], dtype=tokens.dtype)
        attention = torch.stack([torch.softmax(a @ b.T / a.shape[-1] ** 0.5 + bias, -1) for a, b in zip(q, k)])
        maps.append(attention)

        def choose(patches: Tensor, attention: Tensor = attention, keys=k) -> Groups:
            return naive_groups(reducer.name, reducer.keep_rate, patches, attention, torch.stack(keys), prefix)

        def mean(group: list[int], rows: Tensor, sizes: list[float] = sizes) -> Tensor:
            total = sum(sizes[prefix + token] for token in group)
            return sum(rows[prefix + token] * sizes[prefix + token] / total for token in group)

        def pool(rows: Tensor, groups: Groups, mean: Callable = mean) -> Tensor:
            return torch.stack([*rows[:prefix], *(mean(group, rows) for group in groups)])

        def leave(rows: Tensor, groups: Groups, sizes: list[float] = sizes) -> tuple[Tensor, list[float]]:
            undo.append((groups, rows))
            return pool(rows, groups), sizes[:prefix] + [
                sum(sizes[prefix + token] for token in group) for group in groups
            ]

        if stage and reducer.site == "attention":
            groups = choose(tokens[prefix:])
            mixed = []
            for head in range(heads):
                pooled = pool(attention[head], groups)
                columns = [pooled[:, key] for key in range(prefix)]
                columns += [sum(pooled[:, prefix + token] for token in group) for group in groups]
                mixed.append(torch.stack(columns, 1) @ pool(v[head], groups))
            tokens, sizes = leave(tokens, groups)
        else:
            mixed = [a @ b for a, b in zip(attention, v)]
        tokens = tokens + layer.attention.o_proj(torch.cat(mixed, -1))
        if stage and reducer.site == "middle":
            tokens, sizes = leave(tokens, choose(tokens[prefix:]))
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
        if stage and reducer.site == "after":
            tokens, sizes = leave(tokens, choose(tokens[prefix:]))
        states.append(tokens)
    for groups, before in reversed(undo):
        restored = before.clone()
        restored[:prefix] = tokens[:prefix]
        for place, group in enumerate(groups):
            for token in group:
                restored[prefix + token] = tokens[prefix + place]
        tokens = restored
    return states, tokens, maps
