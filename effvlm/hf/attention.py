"""An attention function that listens, under transformers' registry of attention functions: scores, keys and proportional attention.

A vision tower uses it only while :func:`listening` runs; models elsewhere never see it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

NAME = "effvlm"


class Listener(Protocol):
    """What an attention module of a tower tells on every call."""

    def bias(self, query: torch.Tensor) -> torch.Tensor | None:
        """What to add to the logits of every key, broadcast to (B, H, L, S), or None."""

    def heard(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, **more: Any) -> None:
        """(B, H, L, D) queries and keys, and (B, H, L) log-sum-exp of the rows where it is at hand."""


_LISTENERS: WeakKeyDictionary[torch.nn.Module, Listener] = WeakKeyDictionary()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    listener = _LISTENERS.get(module)
    if listener is None or kwargs.get("is_causal"):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    bias = listener.bias(query)
    mask = attention_mask
    if bias is not None:
        mask = bias.to(query.dtype) if mask is None else torch.where(mask, bias, -torch.inf).to(query.dtype)
    out, lse = _with_lse(query, key, value, mask, scaling)
    listener.heard(module, query, key, lse, mask=attention_mask, scaling=scaling)
    return out.transpose(1, 2), None


def _with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, H, L, D) attention, and the rows' log-sum-exp where torch's kernel hands it out for nothing."""
    if query.device.type == "cpu" and query.shape[1] == key.shape[1] and not torch.is_grad_enabled():
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scaling)
        return out, lse
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling), None


def register() -> None:
    """Make the function and its mask known to transformers, under :data:`NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, masks would silently be left out


def attention_modules(tower: torch.nn.Module) -> list[torch.nn.Module]:
    """The self-attention of each layer of a vision tower, in order.

    Raises:
        ValueError: the tower has no list of layers with one attention module each.
    """
    for layers in tower.modules():
        if isinstance(layers, torch.nn.ModuleList) and len(layers):
            found = [[m for m in layer.modules() if type(m).__name__.endswith("Attention")] for layer in layers]
            if all(len(f) == 1 and hasattr(f[0], "config") for f in found):
                return [f[0] for f in found]
    raise ValueError(f"reduce: expected a vision tower whose layers have one attention each, got {type(tower).__name__}")


@contextlib.contextmanager
def listening(tower: torch.nn.Module, listener: Listener) -> Iterator[None]:
    """Inside the block, ``listener`` hears every self-attention of ``tower``; the configuration is put back afterwards."""
    register()
    modules = attention_modules(tower)
    configs = {id(m.config): m.config for m in modules}  # a tower's modules share one
    before = {i: c._attn_implementation for i, c in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        for module in modules:
            _LISTENERS[module] = listener
        yield
    finally:
        for module in modules:
            _LISTENERS.pop(module, None)
        for i, config in configs.items():
            config._attn_implementation = before[i]
