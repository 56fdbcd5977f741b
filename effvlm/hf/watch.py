"""Listening to a vision tower while it encodes: the signals that methods ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from effvlm.hf.attention import attention_modules, listening, prefix_tokens
from effvlm.hf.layouts import Layout
from effvlm.ops.token_score import token_score
from effvlm.tokens.signals import Attention, Keys, Pixels, Signal


class Watch:
    """Records what ``signals`` ask for, per patch of the tower, in the order of the tower's calls.

    Raises:
        ValueError: a layer that the tower has not.
    """

    def __init__(self, tower: torch.nn.Module, signals: Sequence[Signal]) -> None:
        self.tower: Any = tower
        self.signals = [s for s in signals if isinstance(s, (Attention, Keys))]
        self.pixels = any(isinstance(s, Pixels) for s in signals)
        self._found: dict[Signal, list[torch.Tensor]] = {s: [] for s in self.signals}
        self._pixels: list[torch.Tensor] = []
        self._wanted: dict[int, list[Attention | Keys]] = {}
        self.prefix = prefix_tokens(tower)
        self._modules: list[Any] = attention_modules(tower) if self.signals else []
        for s in self.signals:
            self._wanted.setdefault(id(self._modules[layer_index(s.layer, len(self._modules))]), []).append(s)

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """The tower runs inside this block."""
        with contextlib.ExitStack() as stack:
            if self.signals:
                stack.enter_context(listening(self._modules, self))
            if self.pixels:
                hook = self.tower.register_forward_pre_hook(self._see, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    hears = True

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Nothing is added to the attention."""

    def heard(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, **more: Any
    ) -> None:
        for s in self._wanted.get(id(module), ()):
            if isinstance(s, Keys):
                found = key.mean(1) if s.heads == "mean" else key.transpose(1, 2).flatten(2)
            else:
                found = self._score(s, query, key, lse, **more)
            self._found[s].append(found[:, self.prefix :].flatten(0, 1))

    def _score(
        self, s: Attention, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, mask: Any, scaling: float | None
    ) -> torch.Tensor:
        """(B, S) attention received, (B, S, H) with all heads."""
        rows, weight = query.shape[2], None
        if s.rows == "cls" and self.prefix:
            query, lse, rows = query[:, :, :1], None if lse is None else lse[:, :, :1], 1
        elif mask is not None:
            weight = (mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0).float().expand(len(query), -1)
            rows = weight.sum(1, keepdim=True)
        score = token_score(query, key, lse=lse, weight=weight, scale=scaling, heads=s.heads)
        if s.heads == "none":
            return score.transpose(1, 2) / (rows if isinstance(rows, int) else rows[..., None])
        return score / rows

    def _see(self, tower: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        if pixels.dim() == 4:  # (B, 3, H, W): cut into patches, as the tower will
            size = self.tower.config.patch_size
            size = size if isinstance(size, int) else size[0]
            pixels = torch.nn.functional.unfold(pixels, size, stride=size).transpose(1, 2)
        self._pixels.append(pixels.flatten(0, -2))

    def read(self, layouts: Sequence[Layout], order: torch.Tensor | None) -> dict[Any, torch.Tensor]:
        """Signals per token: means over its patches, 0 where it has none.

        Args:
            layouts: of all images, in order.
            order: where the tower works on another order of patches: the patch at each of its places.
        """
        patches = [layout.patches for layout in layouts]
        found: dict[Any, torch.Tensor] = {}
        for s, parts in self._found.items():
            values = torch.cat(parts)
            if order is not None:
                values = torch.empty_like(values).index_copy_(0, order.to(values.device), values)
            found[s] = torch.cat([_mean(values, p.to(values.device)) for p in patches])
        if self.pixels:
            pixels = torch.cat(self._pixels)
            found[Pixels()] = torch.cat([_contrast(pixels, layout) for layout in layouts])
        return found


def layer_index(layer: int | float, layers: int) -> int:
    """The index of a layer: negative from the end, a float as a share of the depth."""
    index = int(layer * layers) if isinstance(layer, float) else layer
    if not -layers <= index < layers:
        raise ValueError(f"reduce: expected a layer of the vision tower, which has {layers}, got {layer}")
    return index % layers


def _mean(values: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    there = patches >= 0
    total = values[patches.clamp_min(0)] * there.view(*patches.shape, *(1,) * (values.dim() - 1))
    return total.sum(1) / there.sum(1).clamp_min(1).view(-1, *(1,) * (values.dim() - 1))


def _contrast(pixels: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(N,) largest difference to the left neighbour, in the first column to the upper one; Inf where there is none."""
    place, device = layout.place.long(), pixels.device
    width = int(place[:, 1:].max()) + 2
    key = (place[:, 0] * width + place[:, 1]) * width + place[:, 2]
    wanted = torch.where(place[:, 2] > 0, key - 1, torch.where(place[:, 1] > 0, key - width, -1))
    order = key.argsort()
    at = order[torch.searchsorted(key[order], wanted).clamp_max(len(key) - 1)]
    there = (key[at] == wanted) & (place[:, 1] >= 0)
    mine = pixels[layout.patches.clamp_min(0).to(device)]
    difference = (mine - mine[at.to(device)]).abs().flatten(1).amax(1).float()
    return difference.masked_fill(~there.to(device), torch.inf)
