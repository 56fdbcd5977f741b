"""Merging tokens inside a vision tower, between attention and MLP of every layer: for the duration of one encoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from effvlm.hf.attention import attention_modules, listening, prefix_tokens
from effvlm.ops.token_match import token_match
from effvlm.ops.token_merge import token_merge
from effvlm.tokens.merges import Bipartite

_PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")


class Merging:
    """One encoding by a pre-norm tower (CLIP, SigLIP), with one round of matching per layer.

    Args:
        tower: the vision tower.
        how: the matching and its schedule.
        layers: how many layers the model reads features after.

    Raises:
        ValueError: the tower's layers are not made of the parts that this has to step between.
    """

    def __init__(self, tower: torch.nn.Module, how: Bipartite, layers: int) -> None:
        self.tower, self.how, self.layers = tower, how, layers
        self.prefix = prefix_tokens(tower)
        self._modules = modules = attention_modules(tower)
        owners = {id(m): layer for layer in tower.modules() for m in (getattr(layer, "self_attn", None),) if m is not None}
        self._blocks = [owners.get(id(m)) for m in modules]
        for block in self._blocks:
            if block is None or any(not hasattr(block, part) for part in _PARTS):
                raise ValueError(
                    f"reduce: expected a vision tower with layers of {', '.join(_PARTS)} to merge tokens in, "
                    f"got {type(tower).__name__}; use at='projector'"
                )
        self.groups: list[torch.Tensor] = []  # (B, prefix + N) int32 per layer
        self.cluster: torch.Tensor | None = None  # (B, N) int64, the same number for places that share a token
        self._size: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._role: torch.Tensor | None = None  # (prefix + N,): of prefix tokens 0, of others 1 and 2 in turn
        self._pairs: list[int] = []

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """The tower runs inside this block."""
        hook = self.tower.register_forward_hook(self._restore)
        try:
            for index, block in enumerate(self._blocks):
                block.forward = partial(self._forward, block, index)  # type: ignore[union-attr]
            with listening(self._modules, self):
                yield
        finally:
            hook.remove()
            for block in self._blocks:
                vars(block).pop("forward", None)

    hears = True

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Proportional attention: a key that stands for s tokens counts s times."""
        if self._size is None or not self.how.proportional:
            return None
        return self._size.log()[:, None, None, :]

    def heard(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, **more: Any
    ) -> None:
        self._keys = key

    def _forward(
        self, block: Any, index: int, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if index == 0:
            self._start(hidden_states)
        if attention_mask is not None:
            raise ValueError("reduce: expected images without padding to merge tokens in the vision tower; use at='projector'")
        attended, _ = block.self_attn(hidden_states=block.layer_norm1(hidden_states), attention_mask=None, **kwargs)
        hidden_states = hidden_states + attended
        if index < self.layers and self._pairs[index]:
            hidden_states = self._merge(hidden_states, self._pairs[index])
        mixed: torch.Tensor = hidden_states + block.mlp(block.layer_norm2(hidden_states))
        return mixed

    def _start(self, x: torch.Tensor) -> None:
        self.groups, self._size, self.cluster, self._role = [], None, None, None
        self._pairs = self.how.schedule(self.layers, x.shape[1] - self.prefix)
        if self.prefix:
            place = torch.arange(x.shape[1], device=x.device) - self.prefix
            self._role = torch.where(place < 0, 0, 1 + place % 2).to(torch.uint8)

    def _merge(self, x: torch.Tensor, r: int) -> torch.Tensor:
        assert self._keys is not None
        keys = self._keys.sum(1, dtype=torch.float32)  # the mean but for a factor, which changes no match
        role = None if self._role is None else self._role[: x.shape[1]]
        group = token_match(keys, r, metric=self.how.metric, role=role).group
        self.groups.append(group)
        out, size = token_merge(x, group, x.shape[1] - r, weight=self._size if self.how.weighted else None)
        self._size = size if self.how.weighted else None
        return out

    def _restore(self, tower: torch.nn.Module, args: Any, output: Any) -> Any:
        """What follows the tower expects whole grids: every place gets the features of the token that it was merged into."""
        if not self.groups:
            return output
        index = self.groups[0].long()
        for group in self.groups[1:]:
            index = group.long().gather(1, index)
        merged = int(self.groups[-1].max()) + 1
        index = index + torch.arange(len(index), device=index.device)[:, None] * merged
        self.cluster = index[:, self.prefix :]

        def whole(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] != merged:
                return x
            return x.flatten(0, 1)[index]

        output.last_hidden_state = whole(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(whole(x) for x in output.hidden_states)
        return output
