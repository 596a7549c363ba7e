# SPDX-License-Identifier: Apache-2.0
"""Which variables and products the moment pass keeps, and where they lie in its buffer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from .plan import HALVES


PASS_KINDS = ("linear", "fold")


@dataclass(frozen=True)
class Product:
    """The product of one left variable with a contiguous range of variables; all are column numbers."""

    left: int
    first: int
    stop: int


@dataclass(frozen=True)
class MomentLayout:
    """Columns of the buffer, one a variable, and the products of them.

    `names[c]` is the variable in column c. The hidden states come first and next to each other, each half's input
    lies beside its write, so that every product is one left column times a contiguous range.
    """

    depth: int
    width: int
    names: tuple[str, ...]
    products: tuple[Product, ...]

    @cached_property
    def column(self) -> dict[str, int]:
        """Variable -> column."""
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def place(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(left, right) variables -> (number of the product, position of the right one within its range)."""
        return {
            (self.names[product.left], self.names[right]): (number, right - product.first)
            for number, product in enumerate(self.products)
            for right in range(product.first, product.stop)
        }

    @property
    def network_order(self) -> list[str]:
        """The variables in the order in which the network computes them."""
        within_block = ("h", "an", "a", "mn", "m")
        return sorted(self.names, key=lambda name: (variable_index(name), within_block.index(variable_kind(name))))


def variable_kind(name: str) -> str:
    """ "h" of "h3"."""
    return name.rstrip("0123456789")


def variable_index(name: str) -> int:
    """3 of "h3"."""
    return int(name[len(variable_kind(name)) :])


def moment_layout(
    depth: int,
    width: int,
    max_span: int | None,
    kinds: Collection[str],
    halves: bool,
    full_halves: Sequence[Collection[str]] | None = None,
) -> MomentLayout:
    """The layout for a network of `depth` blocks; arguments as in `MomentAccumulator`. ValueError for bad ones."""
    unknown = set(kinds) - set(PASS_KINDS)
    if unknown:
        raise ValueError(f"kinds: {sorted(unknown)} unknown, accepted are {PASS_KINDS}")
    if max_span is not None and max_span < 1:
        raise ValueError(f"max_span: {max_span}, accepted is a whole number of at least 1 or None")
    full = [HALVES] * depth if full_halves is None else list(full_halves)
    if len(full) != depth:
        raise ValueError(f"full_halves: {len(full)} entries for {depth} blocks")
    fold = "fold" in kinds
    names = [f"h{i}" for i in range(depth + 1)]
    products = [Product(i, i, depth + 1) for i in range(depth + 1)]
    for b in range(depth):
        if halves and "attention" in full[b]:
            products.append(Product(len(names), len(names), len(names) + 2))
            names += [f"an{b}", f"a{b}"]
        if "mlp" not in full[b]:
            continue
        if halves:
            products.append(Product(len(names), len(names), len(names) + 2))
            names.append(f"mn{b}")
        if halves or fold:
            names.append(f"m{b}")
        if fold:
            m = len(names) - 1
            last = depth if max_span is None else min(depth, b + 1 + max_span)
            products += [Product(m, m, m + 1), Product(m, b + 1, last + 1)]
    return MomentLayout(depth, width, tuple(names), tuple(products))
