"""An attention function that listens, under transformers' registry of attention functions: scores, keys and proportional
attention.

Modules use it only while :func:`listening` runs for them; models elsewhere never see it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

NAME = "effvlm"


class Listener(Protocol):
    """What an attention module asks and tells on every call."""

    def bias(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, 1, S) float32, what to add to the logits of every key, or None."""

    @property
    def hears(self) -> bool:
        """Whether it wants to be told."""

    def heard(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None, **more: Any
    ) -> None:
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
    bias = listener.bias(query, key) if listener else None
    if listener is None or (bias is None and not listener.hears):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            "reduce: this model's attention caps its logits or has sinks, which proportional attention does not know"
        )
    mask = attention_mask
    if mask is None and query.shape[2] > 1 and kwargs.get("is_causal", getattr(module, "is_causal", False)):
        mask = torch.ones((query.shape[2], key.shape[2]), dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
    if bias is not None:
        seen = bias if mask is None else torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
        mask = seen.to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out, lse = _with_lse(query, key, value, mask, scaling)
    if listener.hears:
        listener.heard(module, query, key, lse, mask=attention_mask, scaling=scaling)
    return out.transpose(1, 2), None


def _with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, H, L, D) attention, and the rows' log-sum-exp where torch's kernel hands it out for nothing."""
    if query.device.type == "cpu" and not torch.is_grad_enabled():
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
            mask = mask.expand(*mask.shape[:2], query.shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scaling)
        return out, lse
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling), None


def register() -> None:
    """Make the function and its mask known to transformers, under :data:`NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, masks would silently be left out


def attention_modules(tower: torch.nn.Module) -> list[Any]:
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


def prefix_tokens(tower: torch.nn.Module) -> int:
    """How many tokens stand before the patches: 1 in towers with a CLS token, else 0."""
    return int(any(n.endswith(("class_embedding", "cls_token")) for n, _ in tower.named_parameters()))


def language_attention(model: Any) -> list[Any]:
    """The self-attention modules of a model's language model."""
    kind = type(model.config.get_text_config())
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention") and type(getattr(m, "config", None)) is kind]
    if not found:
        raise ValueError(f"reduce: expected a language model with attention in {type(model).__name__}, found none")
    return found


@contextlib.contextmanager
def listening(modules: list[Any], listener: Listener) -> Iterator[None]:
    """Inside the block, ``listener`` hears every call of these modules; their configuration is put back afterwards."""
    register()
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
