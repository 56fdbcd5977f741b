"""``attention_to_ssm``: a Mamba-2-type layer in an attention layer's place, seeded with its trained Q, K, V and O."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from effvlm.nn.ssm_mixer import SSMMixer


class SSMAttention(nn.Module):
    """An attention layer with :class:`effvlm.nn.SSMMixer` for its softmax; :func:`attention_to_ssm` makes it.

    The projections are the attention layer's own modules: queries serve as C, keys as B, values as x. Called as the layer it
    stands for; caches hold a state of constant size. Norms of queries and keys (``q_norm``, ``k_norm``) and rotary embeddings
    stay.
    """

    def __init__(self, attention: Any, *, unit_decay: bool, norm: bool) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._rotary = _rotary_of(attention)
        weight = self.q_proj.weight
        heads = weight.shape[0] // self.head_dim
        scale = float(getattr(attention, "scaling", self.head_dim**-0.5))
        self.mixer = SSMMixer(weight.shape[1], heads, self.head_dim, scale=scale, unit_decay=unit_decay, norm=norm)
        self.mixer.to(weight.device, weight.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, L, C) → (B, L, C) and None, as there are no attention weights."""
        B, L, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(B, L, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
        if position_embeddings is not None:
            if self._rotary is None:
                raise TypeError(
                    "effvlm: this attention layer gets rotary embeddings, but no apply_rotary_pos_emb was found to apply them"
                )
            q, k = (t.transpose(1, 2) for t in self._rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings))
        layer = None
        if past_key_values is not None:
            from effvlm.convert.cache import state_layer

            layer = state_layer(past_key_values, self.layer_idx)
        kept = _kept(attention_mask, L)
        out, state = self.mixer(hidden_states, q, k, v, state=None if layer is None else layer.state, kept=kept)
        if layer is not None:
            layer.advance(state, L)
        return self.o_proj(out), None


def _kept(mask: torch.Tensor | None, L: int) -> torch.Tensor | None:
    """(B, L): which of the current tokens are not padding, from whichever mask the attention function would have got."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -L:].bool()
    seen = mask[:, 0, -1, -L:]  # the last token sees all that are not padding
    return seen if seen.dtype == torch.bool else seen == 0


def _rotary_of(attention: Any) -> Callable[..., Any] | None:
    """The function that the layer's forward applies rotary embeddings with; the name is the same in all of transformers."""
    found: Callable[..., Any] | None = inspect.unwrap(type(attention).forward).__globals__.get("apply_rotary_pos_emb")
    return found


def _is_attention(module: nn.Module) -> bool:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return (
        all(isinstance(getattr(module, n, None), nn.Linear) for n in names) and hasattr(module, "layer_idx") and _is_plain(module)
    )


def _is_plain(module: Any) -> bool:
    """Whether queries are as wide as heads say: not where a gate comes out of the same projection (Qwen3-Next)."""
    return hasattr(module, "head_dim") and module.q_proj.out_features == module.o_proj.in_features


def attention_to_ssm(
    model: nn.Module, layers: Sequence[int] | None = None, *, unit_decay: bool = False, norm: bool = True
) -> nn.Module:
    """Replace softmax attention by a state of constant size, starting from the trained projections (mmMamba's seeding).

    A converted layer costs the same per token however long the sequence, and keeps (heads, head size, head size) numbers
    instead of all keys and values. What it computes is not what was trained: expect to :func:`effvlm.convert.distill`.

    ::

        model = effvlm.convert.attention_to_ssm(model, layers=range(0, 24, 2))   # every other layer: a hybrid
        effvlm.convert.distill(model, teacher, batches)

    Args:
        model: a Hugging Face model, whose attention layers are replaced in place; or one attention layer.
        layers: which, by ``layer_idx``; default all. Layers without a causal mask, such as those of vision towers, stay.
        unit_decay: start with decays of exactly 1: then, with ``norm=False``, a seeded layer is linear attention.
        norm: normalise what each head returns, as Mamba-2 does; needed for anything but that comparison.

    Returns:
        The model, or for one attention layer the :class:`SSMAttention` in its place.

    Raises:
        ValueError: no attention layer with q_proj, k_proj, v_proj and o_proj of its own is there, or none of a number in
            ``layers``.

    Source: Liao et al. 2025 (mmMamba).
    """
    if _is_attention(model):
        return SSMAttention(model, unit_decay=unit_decay, norm=norm)
    found = {name: m for name, m in model.named_modules() if _is_attention(m) and getattr(m, "is_causal", True)}
    there = {m.layer_idx for m in found.values()}
    wanted = there if layers is None else set(layers)
    if not found or not wanted <= there:
        raise ValueError(
            f"attention_to_ssm: expected layers among those with q_proj, k_proj, v_proj and o_proj, {sorted(there)}, got "
            f"{'all' if layers is None else sorted(wanted)}"
        )
    for name, module in found.items():
        if module.layer_idx in wanted:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, SSMAttention(module, unit_decay=unit_decay, norm=norm))
    return model
