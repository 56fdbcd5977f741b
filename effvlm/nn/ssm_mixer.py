"""``SSMMixer``: a Mamba-2-type layer with the projections of an attention layer, which can take over trained ones (mmMamba)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import rms_norm, softplus

from effvlm.ops.chunk_scan import chunk_scan


class Mixed(NamedTuple):
    """What :class:`SSMMixer` returns.

    Attributes:
        out: (B, L, heads · V).
        state: (B, heads, K, V) float32, which continues the sequence.
    """

    out: torch.Tensor
    state: torch.Tensor


class SSMMixer(nn.Module):
    """``S ← exp(-exp(A_log)·Δ) S + Δ k vᵀ``, ``out = scale·Sᵀ q + D v``, ``Δ = softplus(x W_dt + dt_bias)`` per head.

    The part of a Mamba-2 layer between its projections, with queries for C, keys for B and values for x. Fresh, it decays as
    retention does and Δ is 1 everywhere, so that it is what its projections make of it; with ``unit_decay`` it is exactly
    (causal, unnormalised) linear attention.

    Args:
        dim: C, channels that Δ is computed from.
        heads: of queries; keys and values may have fewer.
        head_dim: V, of the values.
        scale: of the queries, attention's.
        unit_decay: start with decays of 1: nothing is ever forgotten.
        norm: divide what each head returns by its root mean square, times a learned weight: the sums of linear attention grow
            with their length, and softmax attention's do not.

    Sources: Dao and Gu 2024 (Mamba-2), Liao et al. 2025 (mmMamba).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, scale: float, unit_decay: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.scale = scale
        decay = torch.tensor(
            [-math.log1p(-(2.0 ** (-5 - 5 * h / max(heads - 1, 1)))) for h in range(heads)]
        )  # of 31/32 … 1023/1024
        self.A_log = nn.Parameter(torch.full((heads,), -math.inf) if unit_decay else decay.log())
        self.dt_proj = nn.Linear(dim, heads, bias=False)
        nn.init.zeros_(self.dt_proj.weight)
        self.dt_bias = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus of it is 1
        self.D = nn.Parameter(torch.zeros(heads))
        self.norm_weight = nn.Parameter(torch.ones(heads, head_dim)) if norm else None

    def forward(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        state: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> Mixed:
        """Mix tokens.

        Args:
            x: (B, L, C), what Δ is computed from.
            q: (B, L, heads, K).
            k: (B, L, G, K), G dividing heads.
            v: (B, L, G, V).
            state: (B, heads, K, V) float32 of the sequence so far; left alone.
            kept: (B, L) bool, False for padding, which neither writes to the state nor lets it decay.
        """
        heads = q.shape[2]
        k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
        dt = softplus(self.dt_proj(x).float() + self.dt_bias.float())
        if kept is not None:
            dt = dt * kept[..., None]
        decay = -self.A_log.float().exp() * dt
        out, state = chunk_scan(q, k, v, decay, gain=dt, skip=self.D.float(), scale=self.scale, initial_state=state)
        if self.norm_weight is not None:
            out = rms_norm(out, out.shape[-1:], eps=1e-6) * self.norm_weight.to(out.dtype)
        return Mixed(out.flatten(2), state)
