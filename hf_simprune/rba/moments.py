# SPDX-License-Identifier: Apache-2.0
"""Second moments of a network's activations, and the pass that accumulates them in one go over the images.

Memory does not depend on the number of images, so that no activations need be kept (`MomentAccumulator`); every map
and every measure of redundancy follows from the result (`Moments`).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from ..errors import InputError
from .activations import Activations
from .moment_layout import MomentLayout, moment_layout, variable_index, variable_kind


_DESCRIPTIONS = {
    "an": "layernormed attention input of block {}",
    "a": "attention output of block {}",
    "mn": "layernormed MLP input of block {}",
    "m": "MLP output of block {}",
}


@dataclass(frozen=True)
class _Sums:
    """Sums over the images of one parity, fp64. With V variables, all about the pilot means.

    counts: (2,) tokens and images. values: (V*D,). products: one (D, range*D) for each of the layout's.
    pairs: (3, L+1, L+1) for CLS squared difference (mean over dimensions), CLS cosine, cosine of all tokens.
    """

    counts: Tensor
    values: Tensor
    products: tuple[Tensor, ...]
    pairs: Tensor

    @classmethod
    def zeros(cls, layout: MomentLayout, device: torch.device | str) -> "_Sums":
        width, states = layout.width, layout.depth + 1

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        products = tuple(new(width, (product.stop - product.first) * width) for product in layout.products)
        return cls(new(2), new(len(layout.names) * width), products, new(3, states, states))

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.counts, self.values, self.pairs)
        yield from self.products

    def rebuilt(self, tensors: Sequence[Tensor]) -> "_Sums":
        """The same structure around other tensors, given in the order of `tensors()`."""
        counts, values, pairs, *products = tensors
        return _Sums(counts, values, tuple(products), pairs)

    def about(self, shift: Tensor, layout: MomentLayout) -> "_Sums":
        """The sums of the same data about means that are smaller by `shift` (V*D,)."""
        tokens, width = self.counts[0], layout.width
        products = []
        for product, total in zip(layout.products, self.products, strict=True):
            left = slice(product.left * width, (product.left + 1) * width)
            right = slice(product.first * width, product.stop * width)
            moved = torch.outer(self.values[left] + tokens * shift[left], shift[right])
            products.append(total + moved + torch.outer(shift[left], self.values[right]))
        return _Sums(self.counts, self.values + tokens * shift, tuple(products), self.pairs)


def added_up(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    return cast(Tensor, sum(tensors))


class Moments:
    """Means and second moments of the variables of one network, in fp64, of even and odd images apart.

    Variables: "h{i}", i = 0..depth; with fold or halves "m{b}"; with halves "an{b}", "a{b}", "mn{b}" (see
    `Activations`). Products: (h_i, h_j) for all i, j; for fold (m_b, m_b) and (m_b, h_k), k = b+1..b+1+max_span; for
    halves (an_b, an_b), (an_b, a_b), (mn_b, mn_b), (mn_b, m_b). A pair may be asked for in either order.
    """

    def __init__(self, layout: MomentLayout, pilot: Tensor, parts: Sequence[_Sums]):
        self._layout = layout
        self._pilot = pilot
        self._parts = tuple(parts)
        self._counts = added_up(part.counts for part in self._parts)
        self._values = added_up(part.values for part in self._parts)
        self._pairs = added_up(part.pairs for part in self._parts)

    @property
    def depth(self) -> int:
        """L, the number of blocks."""
        return self._layout.depth

    @property
    def width(self) -> int:
        """D, the number of features of a token."""
        return self._layout.width

    @property
    def names(self) -> tuple[str, ...]:
        """The variables."""
        return self._layout.names

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self._counts[0])

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self._counts[1])

    def mean(self, name: str) -> Tensor:
        """(D,) fp64 mean over tokens. KeyError for a variable that was not accumulated."""
        columns = self._columns(name)
        return self._pilot[columns] + self._values[columns] / self._counts[0]

    def cov(self, a: str, b: str) -> Tensor:
        """(D, D) fp64 centred covariance, divided by `count`. KeyError for a pair that was not accumulated."""
        if (a, b) not in self._layout.place:
            return self._cov(b, a).mT
        return self._cov(a, b)

    def second(self, a: str, b: str) -> Tensor:
        """(D, D) fp64 uncentred second moment, divided by `count`. KeyError as in `cov`."""
        return self.cov(a, b) + torch.outer(self.mean(a), self.mean(b))

    def has(self, a: str, b: str) -> bool:
        """Whether the product of the two variables was accumulated."""
        return (a, b) in self._layout.place or (b, a) in self._layout.place

    @property
    def cls_squared_difference(self) -> Tensor:
        """(L+1, L+1) fp64: mean over images and dimensions of (h_j - h_i)^2 on CLS (see `MomentAccumulator`)."""
        return self._pairs[0] / self._counts[1]

    @property
    def cls_cosine(self) -> Tensor:
        """(L+1, L+1) fp64: mean over images of cosine(h_i, h_j) on CLS."""
        return self._pairs[1] / self._counts[1]

    @property
    def token_cosine(self) -> Tensor:
        """(L+1, L+1) fp64: mean over all tokens of cosine(h_i, h_j)."""
        return self._pairs[2] / self._counts[0]

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the images of both. ValueError where depth, width, variables or parities differ."""
        if self._layout != other._layout or len(self._parts) != len(other._parts):
            raise ValueError("moments of other variables, another depth, width or choice of parities cannot be merged")
        shift = other._pilot - self._pilot
        parts = []
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            if shift.any():
                theirs = theirs.about(shift, self._layout)
            parts.append(mine.rebuilt([a + b for a, b in zip(mine.tensors(), theirs.tensors(), strict=True)]))
        return Moments(self._layout, self._pilot, parts)

    def subset(self, parity: int) -> "Moments":
        """Moments of the images of one parity, 0 (even) or 1 (odd). ValueError for what is a subset already."""
        if len(self._parts) != 2:
            raise ValueError("these are the moments of one parity already")
        return Moments(self._layout, self._pilot, [self._parts[parity]])

    @property
    def halved(self) -> tuple["Moments", "Moments"]:
        """Moments of the even images and of the odd ones."""
        return self.subset(0), self.subset(1)

    def check_finite(self) -> None:
        """InputError naming the first variable, in network order, that holds NaN or infinity."""
        for name in self._layout.network_order:
            finite = self._values[self._columns(name)].isfinite().all()
            if finite and (name, name) in self._layout.place:
                finite = self._cov(name, name).diagonal().isfinite().all()
            if not finite:
                raise InputError(
                    f"non-finite activations: the {self._describe(name)} ({name}) holds NaN or infinity; "
                    "accepted is a model that gives finite numbers on these images"
                )

    def _columns(self, name: str) -> slice:
        first = self._layout.column[name] * self.width
        return slice(first, first + self.width)

    def _cov(self, a: str, b: str) -> Tensor:
        number, position = self._layout.place[a, b]
        columns = slice(position * self.width, (position + 1) * self.width)
        products = added_up(part.products[number][:, columns] for part in self._parts)
        tokens = self._counts[0]
        return products / tokens - torch.outer(
            self._values[self._columns(a)] / tokens, self._values[self._columns(b)] / tokens
        )

    def _describe(self, name: str) -> str:
        index, kind = variable_index(name), variable_kind(name)
        if kind == "h":
            return f"output of block {index - 1}" if index else "input of block 0"
        return _DESCRIPTIONS[kind].format(index)


class MomentAccumulator:
    """Accumulates the moments of chunks of images.

    Rows are centred about pilot means and multiplied in fp32 chunk by chunk; sums over chunks are kept in fp64.

    Args:
        depth, width: of the network (L blocks, D features).
        max_span: longest span a fold is wanted for, None for any. (h_i, h_j) is kept for all pairs in any case.
        kinds: {"linear"}, {"fold"} or both: "fold" adds the MLP writes and their products.
        halves: adds the products that the halves' maps need.
        prefix_tokens: tokens before the patches. With 0 the mean over tokens stands in for CLS, which is token 0.
        full_halves: for each block the halves that are there in full (`Adapter.halves`); None: all of them.
        device: where sums are kept during the pass (it must know fp64).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        max_span: int | None = None,
        kinds: Collection[str] = ("linear", "fold"),
        halves: bool = False,
        *,
        prefix_tokens: int = 1,
        full_halves: Sequence[Collection[str]] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.layout = moment_layout(depth, width, max_span, kinds, halves, full_halves)
        self.prefix_tokens = prefix_tokens
        self.device = torch.device(device)
        self._pilot: Tensor | None = None
        self._parts = tuple(_Sums.zeros(self.layout, self.device) for _ in range(2))
        self._buffer: Tensor | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_pilot(self, chunk: Activations | None, accelerator: Accelerator | None = None) -> None:
        """Fixes the pilot means (those of `chunk`) about which everything is centred.

        With several ranks every rank calls this once before its first `update`: the main one with chunk 0, which it
        then also gives to `update`; the others with None, they receive its means. With one rank it may be left out:
        the first chunk given to `update` is the pilot.
        """
        self._pilot = torch.zeros(len(self.layout.names) * self.layout.width, device=self.device)
        if chunk is not None:
            means = [values.float().mean((0, 1)) for values in self._columns_of(chunk)]
            self._pilot.copy_(torch.cat(means))
        if accelerator is not None and accelerator.num_processes > 1:
            self._pilot = broadcast(self._pilot, from_process=0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, chunk: Activations, parity: Tensor) -> None:
        """Adds a chunk; `parity` (images,), 0 or 1, is the parity of each image's index in the data set.

        Fastest when the images of the chunk come sorted by parity. ValueError for shapes that do not fit.
        """
        variables = self._columns_of(chunk)
        images, tokens, width = variables[0].shape
        if parity.shape != (images,):
            raise ValueError(f"parity has shape {tuple(parity.shape)}, the chunk holds {images} images")
        if self._pilot is None:
            self.set_pilot(chunk)
        assert self._pilot is not None
        by_parity = torch.argsort(parity, stable=True)
        is_sorted = torch.equal(by_parity, torch.arange(images, device=by_parity.device))
        order = None if is_sorted else by_parity.to(variables[0].device)
        even = images - int(parity.sum())

        with _exact_products(variables[0].device.type):
            rows = self._rows(images * tokens, variables[0].device)
            pilot = self._pilot.to(rows.device)
            for number, values in enumerate(variables):
                columns = slice(number * width, (number + 1) * width)
                values = values if order is None else values.index_select(0, order)
                torch.sub(values, pilot[columns], out=rows[:, columns].unflatten(0, (images, tokens)))
            for part, first, stop in zip(self._parts, (0, even), (even, images), strict=True):
                if stop > first:
                    self._add_products(part, rows[first * tokens : stop * tokens])
                    part.counts.add_(torch.tensor([(stop - first) * tokens, stop - first], device=self.device))
            pairs = self._pairs(variables[: self.layout.depth + 1], rows)
            for number, part in enumerate(self._parts):
                part.pairs.add_(pairs[:, parity.to(pairs.device) == number].sum(1))

    def reduce(self, accelerator: Accelerator | None) -> None:
        """Sums over all ranks, in fp64; every rank then holds the same. Nothing to do for None or one process."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        for part in self._parts:
            for total in part.tensors():
                total.copy_(accelerator.reduce(total, reduction="sum"))

    def finish(self) -> Moments:
        """The moments, on the CPU. InputError for non-finite activations, naming the variable, or for no images."""
        if self._pilot is None or not added_up(part.counts for part in self._parts)[1]:
            raise InputError("calibration_images: no image was read; accepted is at least one readable image")
        parts = [part.rebuilt([total.cpu() for total in part.tensors()]) for part in self._parts]
        moments = Moments(self.layout, self._pilot.double().cpu(), parts)
        moments.check_finite()
        return moments

    def _columns_of(self, chunk: Activations) -> list[Tensor]:
        """The chunk's tensors in the order of the buffer's columns."""
        lists = {"h": chunk.hidden, "m": chunk.m, "an": chunk.an, "a": chunk.a, "mn": chunk.mn}
        variables = []
        for name in self.layout.names:
            entries = lists[variable_kind(name)]
            values = None if entries is None else entries[variable_index(name)]
            if values is None:
                raise ValueError(f"the chunk's activations lack {name}")
            if values.ndim != 3 or values.shape[2] != self.layout.width or values.shape != chunk.hidden[0].shape:
                raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {tuple(chunk.hidden[0].shape)}")
            variables.append(values)
        return variables

    def _rows(self, count: int, device: torch.device) -> Tensor:
        """(count, V*D) fp32, the start of one buffer that is used for every chunk."""
        columns = len(self.layout.names) * self.layout.width
        if self._buffer is None or self._buffer.shape[0] < count or self._buffer.device != device:
            self._buffer = torch.empty(count, columns, device=device)
        return self._buffer[:count]

    def _add_products(self, part: _Sums, rows: Tensor) -> None:
        width = self.layout.width
        part.values.add_(rows.sum(0).to(self.device))
        for product, total in zip(self.layout.products, part.products, strict=True):
            left = rows[:, product.left * width : (product.left + 1) * width]
            right = rows[:, product.first * width : product.stop * width]
            total.add_(torch.mm(left.mT, right).to(self.device))

    def _pairs(self, hidden: list[Tensor], rows: Tensor) -> Tensor:
        """(3, images, L+1, L+1) fp64; see `_Sums.pairs`. Overwrites the buffer, whose products have been taken."""
        images, tokens, width = hidden[0].shape
        if self.prefix_tokens:
            cls = torch.stack([values[:, 0] for values in hidden], 1).to(self.device).double()
        else:
            cls = torch.stack([values.float().mean(1) for values in hidden], 1).to(self.device).double()
        gram = cls @ cls.mT
        squares = gram.diagonal(dim1=1, dim2=2)
        difference = (squares[:, :, None] + squares[:, None, :] - 2 * gram).clamp_min_(0) / width
        norms = squares.sqrt().clamp_min(_SMALLEST_NORM)
        cosine = gram / (norms[:, :, None] * norms[:, None, :])
        # Unit tokens of one image, end to end, in one row a hidden state: the sum of cosines is a product of rows.
        unit = rows.view(-1)[: images * len(hidden) * tokens * width].view(images, len(hidden), tokens, width)
        for number, values in enumerate(hidden):
            norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
            torch.div(values, norm.clamp_min_(_SMALLEST_NORM), out=unit[:, number])
        unit = unit.flatten(2)
        return torch.stack([difference, cosine, torch.bmm(unit, unit.mT).to(self.device).double()])


_SMALLEST_NORM = 1e-12  # a token of zeros has cosine 0 with everything


@contextmanager
def _exact_products(device_type: str) -> Iterator[None]:
    """Matrix products in full fp32, whatever the caller has chosen: no autocast, no TF32, no bf16."""
    # torch.get_float32_matmul_precision() raises once a precision was set for one backend alone, so where backends
    # have a precision of their own (torch 2.9 and later), that is what is set and put back.
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        mkldnn: Any = torch.backends.mkldnn  # torch declares no `matmul` of it, nor the setting of either
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
        before: Any = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        backends, before = (), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if backends:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)
