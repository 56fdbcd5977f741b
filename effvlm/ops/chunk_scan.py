"""``chunk_scan``: the recurrence of a matrix state per head, scalar decay (SSD, retention, mLSTM) or delta rule (GDN, KDA)."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor
from effvlm.ops.chunk_matrices import chunk_matrices

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? gain, Tensor? beta, Tensor? skip, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool l2norm) -> (Tensor, Tensor)"
)
_SEGMENT = 64  # steps whose states the backward of the reference keeps at a time


class ChunkScan(NamedTuple):
    """What :func:`chunk_scan` returns.

    Attributes:
        out: (B, L, H, V) in the dtype of ``v``.
        final_state: (S, H, K, V) float32, one per sequence.
    """

    out: torch.Tensor
    final_state: torch.Tensor


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    skip: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    l2norm: bool,
) -> None:
    name = "chunk_scan"
    require_tensor(name, "v", v, dims="BLHV", dtypes=FLOATS)
    require_tensor(name, "q", q, dims="BLGK", dtypes=(v.dtype,))
    require_tensor(name, "k", k, dims="BLGK", dtypes=(v.dtype,))
    B, L, H, V = v.shape
    G, K = q.shape[2:]
    if q.shape[:2] != (B, L) or k.shape != q.shape:
        raise ValueError(
            f"{name}: expected q and k of shape (B, L, G, K) = ({B}, {L}, G, K), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if (G == 0 and H > 0) or (G > 0 and H % G):
        raise ValueError(f"{name}: expected H, the heads of v, to be a multiple of G, those of q and k, got H = {H} and G = {G}")
    if not 1 <= K <= 256 or not 1 <= V <= 512:
        raise ValueError(f"{name}: expected 1 <= K <= 256 and 1 <= V <= 512, got K = {K} and V = {V}")
    if gain is not None and beta is not None:
        raise ValueError(f"{name}: expected gain or beta, got both: the strength of the delta rule is beta")
    _check_cu_seqlens(cu_seqlens, B, L)
    decay = ("BLHK", (B, L, H, K)) if isinstance(log_decay, torch.Tensor) and log_decay.dim() == 4 else ("BLH", (B, L, H))
    _expect(v, "log_decay", log_decay, *decay)
    _expect(v, "gain", gain, "BLH", (B, L, H))
    _expect(v, "beta", beta, "BLH", (B, L, H))
    _expect(v, "skip", skip, "H", (H,))
    _expect(v, "initial_state", initial_state, "SHKV", (_sequences(v, cu_seqlens), H, K, V))
    for what, x in (("q", q), ("k", k), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != v.device:
            raise TypeError(f"{name}: expected {what} on the device of v, {v.device}, got {x.device}")


def _expect(v: torch.Tensor, what: str, x: torch.Tensor | None, dims: str, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` is absent, or float32, of that shape and where ``v`` is."""
    if x is None:
        return
    require_tensor("chunk_scan", what, x, dims=dims, dtypes=(torch.float32,))
    if x.shape != shape:
        raise ValueError(f"chunk_scan: expected {what} of shape ({', '.join(dims)}) = {shape}, got {tuple(x.shape)}")
    if x.device != v.device:
        raise TypeError(f"chunk_scan: expected {what} on the device of v, {v.device}, got {x.device}")


def _check_cu_seqlens(cu_seqlens: torch.Tensor | None, B: int, L: int) -> None:
    if cu_seqlens is None:
        return
    require_tensor("chunk_scan", "cu_seqlens", cu_seqlens, dims="S", dtypes=(torch.int32,))
    if B != 1 or len(cu_seqlens) < 1 or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"chunk_scan: expected packed sequences in a batch of 1 with contiguous cu_seqlens, got B = {B} and "
            f"cu_seqlens of shape {tuple(cu_seqlens.shape)}"
        )
    if DEBUG and cu_seqlens.is_cuda:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != L or bounds != sorted(bounds):
            raise ValueError(f"chunk_scan: expected cu_seqlens to ascend from 0 to L = {L}, got {bounds}")


def _sequences(v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return len(v) if cu_seqlens is None else len(cu_seqlens) - 1


def allocate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    skip: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    l2norm: bool,
) -> Tensors:
    state = v.new_empty((_sequences(v, cu_seqlens), v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), state


def _steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: torch.Tensor, w: torch.Tensor, S: torch.Tensor, delta: bool
) -> Tensors:
    """The recurrence over (B, L, H, …) on a state (B, H, K, V)."""
    out = []
    for t in range(v.shape[1]):
        S = S * d[:, t].exp()[..., None]
        write = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]) if delta else v[:, t]
        S = S + (w[:, t, :, None] * k[:, t])[..., None] * write[:, :, None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1) if out else torch.zeros_like(v), S


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    skip: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    l2norm: bool,
) -> Tensors:
    qs, ks, vs = _per_head(q, k, v, l2norm)
    wide, H, V, K = vs.dtype, v.shape[2], v.shape[3], q.shape[3]
    d = log_decay.to(wide) if log_decay.dim() == 4 else log_decay.to(wide)[..., None]
    strength = beta if beta is not None else gain
    w = torch.ones_like(vs[..., 0]) if strength is None else strength.to(wide)
    bounds = [(b, 0, v.shape[1]) for b in range(len(v))]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        bounds = [(0, *pair) for pair in pairwise(ends)]
    starts = vs.new_zeros((len(bounds), H, K, V)) if initial_state is None else initial_state.to(wide)
    outs, states = [vs.new_zeros((0, H, V))], []
    run = partial(checkpoint, _steps, use_reentrant=False) if torch.is_grad_enabled() else _steps
    for (b, first, end), S in zip(bounds, starts, strict=True):
        S = S[None]
        for t in range(first, end, _SEGMENT):
            q_, k_, v_, d_, w_ = (x[b : b + 1, t : min(t + _SEGMENT, end)] for x in (qs, ks, vs, d, w))
            out, S = run(q_, k_, v_, d_, w_, S, beta is not None)
            outs.append(out[0])
        states.append(S)
    out = scale * torch.cat(outs).reshape(v.shape)
    if skip is not None:
        out = out + skip.to(wide)[:, None] * vs
    return out.to(v.dtype), torch.cat(states) if states else starts


def _per_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, l2norm: bool) -> Tensors:
    """Queries, keys and values in float32 or wider, all of as many heads."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // max(x.shape[2], 1), 2) for x in (q, k))
    return q, k, v


def _differentiable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    skip: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    l2norm: bool,
) -> Tensors:
    """What backward goes through: chunks of matrices, or the reference for the kinds that have none."""
    if log_decay.dim() == 4 or cu_seqlens is not None:
        return reference(q, k, v, log_decay, gain, beta, skip, initial_state, cu_seqlens, scale, l2norm)
    qs, ks, vs = _per_head(q, k, v, l2norm)
    d, g, b, start = (None if x is None else x.to(vs.dtype) for x in (log_decay, gain, beta, initial_state))
    assert d is not None
    out, final = chunk_matrices(qs, ks, vs, d, g, b, start)
    out = scale * out if skip is None else scale * out + skip.to(vs.dtype)[:, None] * vs
    return out.to(v.dtype), final


_op = register("chunk_scan", SCHEMA, check=check, allocate=allocate, reference=reference, differentiable=_differentiable)


def chunk_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    scale: float = 1.0,
    l2norm: bool = False,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> ChunkScan:
    """Linear attention with a decaying matrix state, by chunks: SSD, retention, mLSTM, gated delta rule, KDA.

    Equivalent to, for every head and step: ``S = exp(log_decay[t]) * S``; ``S += gain[t] * outer(k[t], v[t])``, or with ``beta``
    ``S += beta[t] * outer(k[t], v[t] - S.T @ k[t])``; ``out[t] = scale * S.T @ q[t] + skip * v[t]``.

    Args:
        q: (B, L, G, K) float32, float16 or bfloat16, any strides: queries (Mamba-2's C). 1 <= K <= 256.
        k: (B, L, G, K) in the dtype of ``v``: keys (Mamba-2's B). G divides H; heads of a group share queries and keys.
        v: (B, L, H, V): values (Mamba-2's x). 1 <= V <= 512.
        log_decay: (B, L, H) float32, at most 0, or (B, L, H, K) for one per channel of the state.
        gain: (B, L, H) float32, the strength of each write (Mamba-2's Δ, mLSTM's input gate); default 1.
        beta: (B, L, H) float32, the strength of the delta rule, which corrects what the state already predicts.
        skip: (H,) float32, how much of ``v`` goes directly to ``out`` (Mamba-2's D).
        scale: of the queries; attention's is ``K ** -0.5``.
        l2norm: normalise q and k over K first (as the gated delta rule does).
        initial_state: (S, H, K, V) float32; default zeros. S is B, or the number of packed sequences.
        cu_seqlens: (S + 1,) int32, the bounds of sequences packed one after the other in a batch of one.

    Returns:
        ``ChunkScan(out, final_state)``: (B, L, H, V) in the dtype of ``v``, and (S, H, K, V) float32.

    Raises:
        ValueError: wrong rank, shape or bounds, or both gain and beta.
        TypeError: wrong dtype, or tensors on different devices.

    The kernel has gradients, which go through the PyTorch reference. Sources: Dao and Gu 2024 (SSD), Sun et al. 2023 (retention),
    Beck et al. 2024 (mLSTM), Yang et al. 2024 (gated delta rule), Kimi Team 2025 (KDA).
    """
    return ChunkScan(*_op(q, k, v, log_decay, gain, beta, skip, initial_state, cu_seqlens, scale, l2norm))


def discretize(
    dt: torch.Tensor,
    A: torch.Tensor,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's Δ as (log_decay, gain) of :func:`chunk_scan`: Δ = clamp(softplus(dt + dt_bias)), log_decay = Δ·A, gain = Δ.

    Args:
        dt: (B, L, H), any floating-point dtype.
        A: (H,), at most 0.
        dt_bias: (H,).
        dt_softplus: apply softplus.
        dt_limit: bounds of Δ.

    Returns:
        Two float32 tensors (B, L, H).
    """
    step = dt.float()
    if dt_bias is not None:
        step = step + dt_bias.float()
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    low, high = dt_limit
    if dt_limit != (0.0, math.inf) or not dt_softplus:  # softplus is inside these limits by itself
        step = step.clamp(low, high)
    return step * A.float(), step
