# SPDX-License-Identifier: Apache-2.0
"""What the analysis asks of a model family: where the blocks are, how a block splits and what the output is.

Shapes: images (B, C, H, W), tokens (B, T, D) with the prefix tokens (CLS, registers) first. Blocks are counted from 0;
`hidden_states[i]` is the input of block i, before any final norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import InputError


BOTH_HALVES = ("attention", "mlp")


class Adapter(ABC):
    """A model in eval mode, opened into embedding, blocks, halves of blocks and output.

    What a half *writes* is what it adds to the residual stream, LayerScale included. Raises `InputError` for a model
    in training mode: dropout and stochastic depth would make every activation random.
    """

    family: ClassVar[str]
    classes: ClassVar[tuple[type[PreTrainedModel], ...]]  # the kinds of model it takes, and what is derived from them
    # Modules of a block around a half, by the half's name, in the families whose blocks this package can replace.
    norms: ClassVar[dict[str, str]] = {}
    scales: ClassVar[dict[str, str]] = {}  # LayerScale

    def __init__(self, model: PreTrainedModel) -> None:
        if model.training:
            raise InputError(f"model is a {type(model).__name__} in training mode: call model.eval() first")
        self.model = model

    # --- what there is

    @property
    @abstractmethod
    def tower(self) -> Any:
        """The module that holds embeddings, blocks and final norm: the backbone or the vision tower."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The blocks, in the model itself."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens; 0 where there is no CLS."""

    @property
    @abstractmethod
    def head(self) -> str:
        """What `output` gives: "classifier" (logits), "projection" (an image embedding) or "none" (the feature)."""

    @property
    def output_tokens(self) -> int | None:
        """How many of the first tokens `output` and `features` need; None where they need all."""
        return self.num_prefix_tokens

    @property
    def depth(self) -> int:
        """Number of blocks that are there, map modules of a compressed model included."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """D, the size of a token."""
        return self.tower.config.hidden_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) the model is configured for."""
        return pair(self.tower.config.image_size)

    def halves(self, b: int) -> tuple[str, ...]:
        """The halves of block `b` that are there in full, of ("attention", "mlp"); () for a map module."""
        return BOTH_HALVES

    def layer(self, b: int) -> Any:
        """Block `b` as the module it is, whose parts each family names in its own way."""
        return self.layers[b]

    def is_block(self, b: int) -> bool:
        """Whether block `b` has two halves, full or replaced, so that the four functions of halves work on it."""
        return True

    # --- the forward pass, in pieces

    @abstractmethod
    def embed(self, pixel_values: Tensor) -> tuple[Tensor, Any]:
        """Images to `hidden_states[0]` and what the blocks need beside it (rotary positions, …), in any dtype.

        Where the family can, positions are interpolated for images of another size than `image_size`.
        """

    def block(self, b: int, h: Tensor, context: Any) -> Tensor:
        """`hidden_states[b]` to `hidden_states[b + 1]`, by the block itself: bit-equal to the model's own forward."""
        return self.layer(b)(h, None)

    @abstractmethod
    def attention_input(self, b: int, h: Tensor) -> Tensor:
        """What the attention of block `b` reads: the normed tokens."""

    @abstractmethod
    def attention_write(self, b: int, x: Tensor, context: Any, queries: int | None = None) -> Tensor:
        """What attention adds to the stream, from `attention_input`.

        With `queries` for that many first tokens only, (B, queries, D): they still see all tokens, at a fraction of
        the cost.
        """

    @abstractmethod
    def mlp_input(self, b: int, y: Tensor) -> Tensor:
        """What the MLP of block `b` reads, from the stream after attention."""

    @abstractmethod
    def mlp_write(self, b: int, x: Tensor) -> Tensor:
        """What the MLP adds to the stream, from `mlp_input`."""

    def last_block(self, h: Tensor, context: Any) -> Tensor:
        """The last block, for the first `output_tokens` tokens only: (B, T, D) to (B, output_tokens, D)."""
        last = self.depth - 1
        if self.output_tokens is None:
            return self.block(last, h, context)
        if not self.is_block(last):
            return self.block(last, h[:, : self.output_tokens], context)
        write = self.attention_write(last, self.attention_input(last, h), context, self.output_tokens)
        y = h[:, : self.output_tokens] + write
        return y + self.mlp_write(last, self.mlp_input(last, y))

    # --- what comes out; h is hidden_states[depth]

    @abstractmethod
    def features(self, h: Tensor) -> Tensor:
        """(B, F), the frozen feature for probes and nearest neighbours, from at least the first `output_tokens`."""

    @abstractmethod
    def dense(self, h: Tensor) -> Tensor:
        """(B, N, D), the patch tokens after the final norm."""

    @abstractmethod
    def output(self, h: Tensor) -> Tensor:
        """(B, C), what the model is for: logits, image embedding or final feature; see `head`."""

    # --- what conversion changes

    def blocks_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The part of a configuration of this kind of model that says how many blocks there are."""
        return config

    def init_arguments(self) -> dict[str, Any]:
        """What the model's class takes beside a configuration to build another such model."""
        return {}

    @abstractmethod
    def mlp_output(self, b: int) -> nn.Linear:
        """The last linear layer of block `b`'s MLP: the one that takes a fold in."""

    def mlp_scale(self, b: int) -> nn.Parameter | None:
        """LayerScale (D,) on what `mlp_output` gives, None where the family has none."""
        return None


def module_forward(adapter: Adapter, pixel_values: Tensor) -> Tensor:
    """`output` after all blocks, every block called as the model calls it."""
    h, context = adapter.embed(pixel_values)
    for b in range(adapter.depth):
        h = adapter.block(b, h, context)
    return adapter.output(h)


def attend_first(
    attention: Any,
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    x: Tensor,
    queries: int,
    scaling: float,
    eager: Callable[..., Any],
    rotate_keys: Callable[[Tensor], Tensor] = lambda key: key,
) -> Tensor:
    """What multi-head attention gives to the first `queries` tokens, which see all: (B, T, D) to (B, queries, D).

    `projections` are those of query, key, value and output; `eager` is the attention function of the family's own
    file, used where the model asks for no other; `rotate_keys` puts rotary positions on the keys.
    """
    query, key, value = (
        projection(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection, tokens in zip(projections, (x[:, :queries], x, x))
    )
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    mixed, _ = attend(attention, query, rotate_keys(key), value, None, dropout=0.0, scaling=scaling)
    return projections[3](mixed.flatten(2))


def pair(size: Any) -> tuple[int, int]:
    """An image or patch size of a configuration, which may be one number or two, as (H, W)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def differs(pixel_values: Tensor, size: tuple[int, int]) -> bool:
    """Whether the images are of another size than (H, W)."""
    return tuple(pixel_values.shape[-2:]) != size


def classifier_head(model: PreTrainedModel, classes: tuple[type, ...]) -> str:
    """The `head` of a family whose only head is a classifier, present where there are labels."""
    return "classifier" if isinstance(model, classes) and (model.config.num_labels or 0) > 0 else "none"
