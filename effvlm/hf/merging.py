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
        self.groups: list[torch.Tensor] = []  # (B, N) int32 per layer
        self.cluster: torch.Tensor | None = None  # (B, N) int64, the same number for places that share a token
        self._size: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
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
            self.groups, self._size, self.cluster = [], None, None
            self._pairs = self.how.schedule(self.layers, hidden_states.shape[1] - self.prefix)
        if attention_mask is not None:
            raise ValueError("reduce: expected images without padding to merge tokens in the vision tower; use at='projector'")
        attended, _ = block.self_attn(hidden_states=block.layer_norm1(hidden_states), attention_mask=None, **kwargs)
        hidden_states = hidden_states + attended
        if index < self.layers and self._pairs[index]:
            hidden_states = self._merge(hidden_states, self._pairs[index])
        mixed: torch.Tensor = hidden_states + block.mlp(block.layer_norm2(hidden_states))
        return mixed

    def _merge(self, x: torch.Tensor, r: int) -> torch.Tensor:
        assert self._keys is not None
        keys = self._keys.mean(1)[:, self.prefix :]
        group = token_match(keys, r, metric=self.how.metric).group
        self.groups.append(group)
        if self.prefix:  # prefix tokens are groups of their own
            own = torch.arange(self.prefix, dtype=torch.int32, device=group.device).expand(len(group), -1)
            group = torch.cat([own, group + self.prefix], dim=1)
        out, size = token_merge(x, group, x.shape[1] - r, weight=self._size if self.how.weighted else None)
        self._size = size if self.how.weighted else None
        return out

    def _restore(self, tower: torch.nn.Module, args: Any, output: Any) -> Any:
        """What follows the tower expects whole grids: every place gets the features of the token that it was merged into."""
        if not self.groups:
            return output
        member = self.groups[0].long()
        for group in self.groups[1:]:
            member = group.long().gather(1, member)
        merged = int(self.groups[-1].max()) + 1
        self.cluster = member + torch.arange(len(member), device=member.device)[:, None] * merged
        prefix = torch.arange(self.prefix, device=member.device).expand(len(member), -1)
        index = torch.cat([prefix, member + self.prefix], dim=1)

        def whole(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] != merged + self.prefix:
                return x
            return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

        output.last_hidden_state = whole(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(whole(x) for x in output.hidden_states)
        return output
