"""QMoE's grid (Frantar and Alistarh, arXiv 2310.16795): each row's least weight, zero, and its greatest; inside GPTQ."""

from __future__ import annotations

import torch

from effvlm.quant.gptq import Factor, gptq
from effvlm.quant.gptq import factor as factor_of


def minmax_grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., C) weights → (...,) lower and upper levels of each row, ≤ 0 and ≥ 0."""
    return weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)


def minmax(weight: torch.Tensor, factor: Factor, block: int = 128) -> torch.Tensor:
    """Trits on that grid, thresholds halfway.

    Args:
        weight: (B, R, C) floating point.
        factor: of the (B, C, C) Hessians.
        block: columns per matrix product.

    Returns:
        (B, R, C) int8; −1 stands for the lower level, 1 for the upper.
    """
    low, high = minmax_grid(weight.float())
    zero = torch.zeros_like(low)

    def rule(w: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.where(w > high / 2, high, torch.where(w < low / 2, low, zero))

    rounded = gptq(weight.float().mT.contiguous(), factor, rule, block)
    return rounded.sign().to(torch.int8).mT.contiguous()


def minmax_factor(hessian: torch.Tensor, damp: float) -> Factor:
    """Of (B, C, C) Hessians with ``damp`` times the mean of their diagonals added to these, as QMoE does."""
    damped = hessian.float().clone()
    own = damped.diagonal(dim1=1, dim2=2)
    own += damp * own.mean(1, keepdim=True)
    return factor_of(damped)
