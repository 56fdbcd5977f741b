"""The scales and the error of given trits, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

AT_ONCE = 1 << 17  # weights looked at together: what stays in a cache
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """(B, R) float32 bfloat16-valued ``scales``; (B,) float64 ``error`` under the Hessian, and ``weight_error`` without."""

    scales: torch.Tensor
    error: torch.Tensor
    weight_error: torch.Tensor


def fit(weight: torch.Tensor, trits: torch.Tensor, hessian: torch.Tensor | None = None, *, calibrated: bool = True) -> Fit:
    """The best scale of each row, and what is then lost.

    The scale is least squares, a = tᵀHw / tᵀHt, rounded to bfloat16; 0 for a row without trits. Errors are of the rounded scales:
    wᵀHw − 2a tᵀHw + a² tᵀHt summed over rows, by the sum of wᵀHw. A Hessian under which the weights have no energy counts as
    none.

    Args:
        weight: (B, R, C) floating point.
        trits: (B, R, C) int8.
        hessian: (B, C, C) float32, undamped; None for the identity.
        calibrated: whether scales are fitted under the Hessian too, not only measured.
    """
    parts = [_fit(weight[b], trits[b], None if hessian is None else hessian[b], calibrated) for b in range(len(weight))]
    scales, error, weight_error = (torch.stack(each) for each in zip(*parts, strict=True))
    return Fit(scales, error, weight_error)


def _fit(weight: torch.Tensor, trits: torch.Tensor, hessian: torch.Tensor | None, calibrated: bool) -> tuple[torch.Tensor, ...]:
    plain = _sums(weight, trits)
    scaled = plain
    if hessian is not None:
        w, t, h = weight.double(), trits.double(), hessian.double()
        product = w @ h
        scaled = ((w * product).sum(1), (t * product).sum(1), ((t @ h) * t).sum(1))
        if not bool(scaled[0].sum() > 0):
            scaled = plain
    _, cross, energy = scaled if calibrated else plain
    scale = torch.where(energy > 0, cross / energy.clamp(min=1e-300), 0).clamp(min=0)
    scales = scale.to(torch.bfloat16).float()
    lost = [_lost(sums, scales.double()) for sums in (scaled, plain)]
    return scales, lost[0], lost[1]


def _sums(weight: torch.Tensor, trits: torch.Tensor) -> Sums:
    """wᵀw, tᵀw and tᵀt of each row: products in float32, of which those with a trit are exact; sums in float64."""
    rows = max(1, AT_ONCE // weight.shape[1])
    parts = []
    for w, t in zip(weight.split(rows), trits.split(rows), strict=True):
        w, t = w.float(), t.float()
        parts.append([(a * b).sum(1, dtype=torch.float64) for a, b in ((w, w), (t, w), (t, t))])
    own, cross, energy = (torch.cat(each) for each in zip(*parts, strict=True))
    return own, cross, energy


def _lost(sums: Sums, scale: torch.Tensor) -> torch.Tensor:
    own, cross, energy = sums
    lost = (own - 2 * scale * cross + scale * scale * energy).sum().clamp(min=0)
    return torch.where(own.sum() > 0, lost / own.sum().clamp(min=1e-300), lost * 0)
