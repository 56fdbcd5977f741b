"""``mlstm``: the matrix memory of xLSTM, with its normaliser, by :func:`effvlm.chunk_scan`."""

from __future__ import annotations

import torch

from effvlm.ops.chunk_scan import chunk_scan


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``C = f C + i k vᵀ``, ``n = f n + i k``, ``out = Cᵀ q / max(|n·q|, 1)`` with ``f = sigmoid``, ``i = exp`` of the gates.

    The normaliser is one more column of the memory: the one that ones are written to. Beck et al. keep a running maximum m of the
    gates' logarithms and divide by ``max(|n·q|, exp(-m))``; that is this formula with both sides multiplied by exp(-m), which
    float32 does not need for input gates below 60 (xLSTM caps them at 15).

    Args:
        q: (B, L, G, K), scaled by the caller (xLSTM: by ``K ** -0.5``).
        k: (B, L, G, K).
        v: (B, L, H, V), V below 512.
        input_gate: (B, L, H), before its exponential; at most 60.
        forget_gate: (B, L, H), before its sigmoid.
        initial_state: (B, H, K, V + 1) float32, as returned.

    Returns:
        (B, L, H, V) in the dtype of ``v`` and the state (B, H, K, V + 1) float32, whose last column is n.

    Source: Beck et al. 2024 (xLSTM), equations 19 to 27.
    """
    ones = v.new_ones(()).expand(*v.shape[:-1], 1)
    decay = torch.nn.functional.logsigmoid(forget_gate.float())
    out, state = chunk_scan(q, k, torch.cat([v, ones], -1), decay, gain=input_gate.float().exp(), initial_state=initial_state)
    return out[..., :-1] / out[..., -1:].abs().clamp_min(1), state
