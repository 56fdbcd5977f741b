"""Rounding to nearest without calibration: thresholds and a level per row, at a price per non-zero that meets the rate."""

from __future__ import annotations

import torch

from effvlm.quant.rate import code_rate, overhead
from effvlm.quant.search import PriceSearch

AT_ONCE = 1 << 17  # weights rounded together: what stays in a cache
SAMPLE = 128  # rows that the price is sought on
LOOKED_AT = 256  # weights of a row that its level is sought on, at least
ROUNDS = 3
FIRST_LEVEL = (1.6, 1.0)  # a of Gaussian rows of unit variance near 0.8 bits per weight, by three and five levels
TOLERANCE = 0.008
TINY = 1e-30


def row_levels(weight: torch.Tensor, price: torch.Tensor, top: int, cost: torch.Tensor | None = None) -> torch.Tensor:
    """A level for each row: trits for it, then least squares for them, in turn (Lloyd, 1957, with a price on non-zeros).

    Args:
        weight: (..., C) float32, a row each.
        price: broadcasts to (..., 1), λ of Σ h_j (w_j − a t_j)² + λ · (non-zeros of t).
        top: 1 for three levels, 2 for five.
        cost: broadcasts to ``weight``, h; None for 1.

    Returns:
        (..., 1) float32.
    """
    size = weight.abs()
    h = torch.ones_like(size[..., :1]) if cost is None else cost.clamp(min=TINY)
    power = (h * size.square()).sum(-1, keepdim=True) / h.expand_as(size).sum(-1, keepdim=True)
    level = power.sqrt().clamp(min=TINY) * FIRST_LEVEL[top - 1]
    for _ in range(ROUNDS):
        taken = [(size > bar).to(size.dtype) for bar in thresholds(level, price / h, top)]
        trits = torch.stack(taken).sum(0) if top > 1 else taken[0]
        weighted = trits * h
        energy = (weighted * trits).sum(-1, keepdim=True)
        cross = (weighted * size).sum(-1, keepdim=True)
        level = torch.where(energy > 0, cross / energy.clamp(min=TINY), level)
    return level


def thresholds(level: torch.Tensor, price: torch.Tensor, top: int) -> list[torch.Tensor]:
    """Where t grows by one as |w| grows, for t of least (w − at)² + λ · (t ≠ 0); ascending, like ``level`` each."""
    first = (level + price / level) / 2
    if top == 1:
        return [first]
    second = torch.maximum(1.5 * level, level + price / (4 * level))  # above 1.5 a where a price skips t = 1
    return [torch.minimum(first, second), second]


def rtn(weight: torch.Tensor, target: float, top: int) -> torch.Tensor:
    """Round one matrix at ``target`` bits per weight, within 1 % if that can be.

    The price is sought on 128 rows, and corrected by what all rows then cost.

    Args:
        weight: (R, C) floating point.
        target: bits per weight, scales and directory included.
        top: 1 for three levels, 2 for five.

    Returns:
        (R, C) int8 trits.
    """
    R, C = weight.shape
    sample = weight[torch.linspace(0, R - 1, min(R, SAMPLE), device=weight.device).round().long()]
    power = sample.float().square().mean().clamp(min=TINY)
    search = PriceSearch(weight.new_tensor([target - overhead(R, C)], dtype=torch.float32))
    for rows, tries in ((sample, 6), (weight, 4)):
        search.renew()
        for _ in range(tries):
            trits = _rounded(rows, search.price * power, top)
            search.saw(code_rate(trits[None]))
            if bool(search.met(TOLERANCE)):
                break
    return trits


def _rounded(weight: torch.Tensor, price: torch.Tensor, top: int) -> torch.Tensor:
    trits = torch.empty_like(weight, dtype=torch.int8)
    rows = max(1, AT_ONCE // weight.shape[1])
    for some, out in zip(weight.split(rows), trits.split(rows), strict=True):
        some = some.float()
        bars = thresholds(row_levels(some[:, :: max(1, weight.shape[1] // LOOKED_AT)], price, top), price, top)
        torch.sub((some > bars[0]).view(torch.int8), (some < -bars[0]).view(torch.int8), out=out)
        for bar in bars[1:]:
            out += (some > bar).view(torch.int8) - (some < -bar).view(torch.int8)
    return trits
