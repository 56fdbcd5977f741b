"""What a converted layer keeps in a Hugging Face cache: a state of constant size, and how many tokens it has seen."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class StateLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a ``DynamicCache`` that holds ``state`` (B, heads, K, V) instead of keys and values, which it never gets."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: torch.Tensor | None = None
        self.seen = 0

    def advance(self, state: torch.Tensor, tokens: int) -> None:
        """Keep the state after ``tokens`` more."""
        self.state, self.seen, self.device = state, self.seen + tokens, state.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def _rows(self, index: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.index_select(0, index.to(self.state.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, 0)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("effvlm: a layer converted by attention_to_ssm forgets as it goes and cannot give tokens back")

    def offload(self) -> None:
        self.state = None if self.state is None else self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        self.state = None if self.state is None else self.state.to(self.device, non_blocking=True)


def state_layer(cache: Any, index: int) -> StateLayer:
    """The layer of a cache that a converted attention layer keeps its state in; an untouched one of keys and values is replaced.

    Raises:
        TypeError: the cache's layer is of a kind that is laid out before the model runs (static, quantised), or has tokens in it.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
        raise TypeError(
            "effvlm: expected a fresh DynamicCache for a model with layers converted by attention_to_ssm, got "
            f"{type(layer).__name__} with {layer.get_seq_length()} tokens at layer {index}"
        )
    made = cache.layers[index] = StateLayer()
    return made
