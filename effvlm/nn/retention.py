"""``Retention``: attention without softmax whose scores fade with distance (RetNet; ViR in vision)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

from effvlm.ops.chunk_scan import chunk_scan
from effvlm.ops.state_update import state_update


class Retained(NamedTuple):
    """What :class:`Retention` returns when it is asked for its state.

    Attributes:
        out: (B, L, C).
        state: (B, heads, head size, head size) float32, which continues the sequence.
    """

    out: torch.Tensor
    state: torch.Tensor


class Retention(nn.Module):
    """``y = GroupNorm((Q Kᵀ ∘ D) V) W``, with ``D[i, j] = decay ** (i - j)`` for ``i >= j`` and 0 above, in O(L).

    The parallel form is this product; the recurrent form is one step on a state, with ``state=`` of the step before; chunks of
    both are what runs (:func:`effvlm.chunk_scan`).

    Args:
        dim: C, channels.
        heads: of which ``dim`` is a multiple; each has a decay of its own.
        bias: of the projections.
        gated: multiply by ``silu(x W_g)`` before the last projection, as RetNet does; ViR does not.
        decays: (heads,) in (0, 1]; default ``1 - 2 ** (-5 - h)``, RetNet's.
        eps: of the norm of each head.

    Sources: Sun et al. 2023 (RetNet, without its rotary embedding), Hatamizadeh et al. 2023 (ViR).
    """

    log_decay: torch.Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = False,
        gated: bool = False,
        decays: Sequence[float] | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"Retention: expected dim to be a multiple of heads, got dim = {dim} and heads = {heads}")
        gammas = torch.as_tensor(
            decays if decays is not None else [1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=torch.float64
        )
        if gammas.shape != (heads,) or not ((gammas > 0) & (gammas <= 1)).all():
            raise ValueError(f"Retention: expected {heads} decays in (0, 1], got {decays}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.gate = nn.Linear(dim, dim, bias=bias) if gated else None
        self.norm = nn.GroupNorm(heads, dim, eps=eps, affine=False)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.register_buffer("log_decay", gammas.log().float(), persistent=False)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, *, return_state: bool = False
    ) -> torch.Tensor | Retained:
        """(B, L, C) → (B, L, C), after the sequence that ``state`` (B, heads, head size, head size) has seen.

        A state that is passed in is left alone. With ``return_state``, :class:`Retained`.
        """
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).unbind(2)
        scale = (C // self.heads) ** -0.5
        if L == 1 and state is not None:
            out, state = self._step(q, k, v, state, scale)
        else:
            decay = self.log_decay.float().expand(B, L, self.heads)
            out, state = chunk_scan(q, k, v, decay, scale=scale, initial_state=state)
        y = self.norm(out.reshape(B * L, C)).view(B, L, C)
        y = self.proj(y if self.gate is None else y * silu(self.gate(x)))
        return Retained(y, state) if return_state else y

    def _step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = state.clone()
        _, H, K, V = state.shape
        decay = self.log_decay.float()[:, None, None].expand(H, V, K)
        ones = v.new_ones(()).expand(len(v), H, V)
        # A Δ of 1: the decay is exp(1·log_decay), the strength of the write 1.
        out = state_update(state.mT, v[:, 0], ones, decay, k[:, 0], q[:, 0] * scale)
        return out[:, None], state
