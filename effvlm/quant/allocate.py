"""Bits shared out among matrices, so that together they lose least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from effvlm.quant.base import BITS_MAX, BITS_MIN, TernaryRecipe
from effvlm.quant.quantizer import quantize

PROBES = (0.5, 0.8, 1.2)  # bits per weight
ROWS = 64
FLATTEST = 0.1  # of −d ln(error) / d bits; 6 dB per bit are 1.39
ROUNDS = 200


def probe(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    recipe: TernaryRecipe,
    tokens: torch.Tensor | None = None,
    rates: Sequence[float] = PROBES,
) -> torch.Tensor:
    """Measure quickly what B matrices lose at a few rates: on 64 rows, by GPTQ and one descent.

    Args:
        weight: (B, R, C), like the next two as for :func:`~effvlm.quant.quantize`.
        hessian: (B, C, C) or None.
        recipe: whose method, levels and damping count.
        tokens: (B,) or None.
        rates: K of them, bits per weight.

    Returns:
        (B, K) float64 shares of the outputs' energy.
    """
    places = torch.linspace(0, weight.shape[1] - 1, min(ROWS, weight.shape[1]), device=weight.device).round().long()
    quick = replace(recipe, sweeps=0, iterations=1)
    targets = (torch.full((len(weight),), rate, dtype=torch.float64) for rate in rates)
    return torch.stack([quantize(weight[:, places], hessian, quick, bits, tokens).error for bits in targets], 1)


def allocate(
    error: torch.Tensor,
    weight: torch.Tensor,
    target_bits: float,
    size: torch.Tensor | None = None,
    rates: Sequence[float] = PROBES,
) -> torch.Tensor:
    """Bits for each of M matrices that minimise Σ weight · error at a mean of ``target_bits``.

    A matrix's error is taken to fall as c · exp(−s · bits), c and s fitted to its probes. The optimum then gives every matrix the
    same fall of weight · error per bit stored (Shoham and Gersho, 1988), but for those at a bound; found by bisection.

    Args:
        error: (M, K) from :func:`probe`.
        weight: (M,) ≥ 0, what an error there costs: for an expert the sum of its routing weights (see
            :func:`effvlm.experts.usage`); 0 for one without tokens, which gets the least.
        target_bits: of all matrices together, per weight, in [0.4, 1.6].
        size: (M,) numbers of weights; None for equal ones.
        rates: (K,) at which errors were measured, two or more different ones.

    Returns:
        (M,) float64 in [0.4, 1.6], with mean ``target_bits`` over all weights.

    Raises:
        ValueError: shapes that do not fit, a target out of range, negative weights or errors that are not finite.
    """
    M = len(error)
    sizes = torch.ones(M, dtype=torch.float64) if size is None else size.double().cpu()
    _check(error, weight, target_bits, sizes, rates)
    at = torch.tensor(list(rates), dtype=torch.float64)
    logs = error.double().cpu().clamp(min=1e-300).log()
    away = at - at.mean()
    slope = (-(logs * away).sum(1) / away.square().sum()).clamp(min=FLATTEST)
    # ln(weight · c · s / size): the fall per bit stored, at no bits
    start = weight.double().cpu().log() + logs.mean(1) + slope * at.mean() + slope.log() - sizes.log()
    least, most = torch.full_like(start, BITS_MIN), torch.full_like(start, BITS_MAX)

    def shared(level: float) -> torch.Tensor:
        return torch.minimum(torch.maximum((start - level) / slope, least), most)

    known = start[torch.isfinite(start)]
    if not len(known):  # nothing weighs anything
        return torch.full_like(start, target_bits)
    low, high = float((known - slope.max() * BITS_MAX).min()) - 1, float(known.max()) + 1
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        spent = float((shared(middle) * sizes).sum() / sizes.sum())
        low, high = (middle, high) if spent > target_bits else (low, middle)
    return shared(high)


def _check(error: torch.Tensor, weight: torch.Tensor, target_bits: float, size: torch.Tensor, rates: Sequence[float]) -> None:
    M = len(error)
    if error.dim() != 2 or error.shape[1] != len(rates) or len(set(rates)) < 2:
        raise ValueError(f"allocate: expected errors of shape (M, {len(rates)}) at two or more rates, got {tuple(error.shape)}")
    if tuple(weight.shape) != (M,) or tuple(size.shape) != (M,):
        raise ValueError(f"allocate: expected weight and size of shape {(M,)}, got {tuple(weight.shape)} and {tuple(size.shape)}")
    if not BITS_MIN <= target_bits <= BITS_MAX:
        raise ValueError(f"allocate: expected target_bits in [{BITS_MIN}, {BITS_MAX}], got {target_bits}")
    if not bool(torch.isfinite(error).all()) or not bool((weight >= 0).all()) or not bool((size > 0).all()):
        raise ValueError("allocate: expected finite errors, weights ≥ 0 and sizes > 0")
