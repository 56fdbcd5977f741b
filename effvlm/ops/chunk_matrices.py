"""``chunk_scan`` in chunks of PyTorch's matrices: what its gradients go through, many times faster than step by step."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from effvlm._library import Tensors

_CHUNK = 64


def chunk_matrices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    gain: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> Tensors:
    """The recurrence of :func:`effvlm.chunk_scan` with one decay per head, for q and k of as many heads as v.

    Inside a chunk, with a the cumulative log decay from its start: writes D are the rows of V times their gain, or, for the delta
    rule, the solution of (I + tril(β·KKᵀ∘Γ, −1)) D = β (V − exp(a) K S); out = exp(a) Q S + (QKᵀ∘Γ) D; S ← exp(a_end) S +
    (exp(a_end − a) K)ᵀ D, with Γ[l, s] = exp(a_l − a_s) for s <= l.

    Args:
        q, k: (B, L, H, K); v: (B, L, H, V); log_decay, gain, beta: (B, L, H); initial_state: (B, H, K, V) or None.

    Returns:
        (B, L, H, V) and the last state (B, H, K, V).
    """
    B, L, H, V = v.shape
    more = -L % _CHUNK
    q, k, v = (pad(x, (0, 0, 0, 0, 0, more)).unflatten(1, (-1, _CHUNK)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    strength = gain if beta is None else beta
    weight = v.new_ones(()) if strength is None else _by_chunk(strength, more)[..., None]
    a = _by_chunk(log_decay.clamp_min(-1e4).double(), more).cumsum(-1)
    upper = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=v.device).triu(1)
    pairs = (a[..., :, None] - a[..., None, :]).masked_fill(upper, -torch.inf).exp().to(v.dtype)
    since, until = a.exp().to(v.dtype)[..., None], (a[..., -1:] - a).exp().to(v.dtype)[..., None]
    scores, queries, keys = q @ k.mT * pairs, since * q, until * k
    writes, read = weight * v, torch.zeros_like(k)
    if beta is not None:
        system = weight * (k @ k.mT) * pairs  # its diagonal is taken for ones
        writes, read = (
            torch.linalg.solve_triangular(system, x, upper=False, unitriangular=True) for x in (writes, weight * since * k)
        )
    S = v.new_zeros(B, H, k.shape[-1], V) if initial_state is None else initial_state
    outs = [v[:, :, :0].flatten(2, 3)]
    for c in range(v.shape[2]):
        D = writes[:, :, c] if beta is None else writes[:, :, c] - read[:, :, c] @ S
        outs.append(queries[:, :, c] @ S + scores[:, :, c] @ D)
        S = since[:, :, c, -1:] * S + keys[:, :, c].mT @ D
    return torch.cat(outs, 2)[:, :, :L].transpose(1, 2), S


def _by_chunk(x: torch.Tensor, more: int) -> torch.Tensor:
    """(B, L, H) → (B, H, chunks, Q); what is added decays by nothing and writes nothing."""
    chunks: torch.Tensor = pad(x, (0, 0, 0, more)).unflatten(1, (-1, _CHUNK))
    return chunks.permute(0, 3, 1, 2)
