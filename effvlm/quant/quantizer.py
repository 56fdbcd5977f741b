"""Matrices of weights to trits, by a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.quant.base import BITS_MAX, BITS_MIN, Quantized, TernaryRecipe
from effvlm.quant.measure import fit
from effvlm.quant.minmax import minmax, minmax_factor
from effvlm.quant.problem import Problem
from effvlm.quant.rate import bits_per_weight, overhead
from effvlm.quant.rtn import rtn
from effvlm.quant.target import pilot, reach, scout

AT_ONCE = 1 << 24  # weights under way together; they take about 30 bytes each
FIVE_FROM = 1.1  # bits per weight from which rounding to nearest tries five levels too
FIVE_LEAST = 0.5  # bits per weight; five-level tiles cannot skip rows without non-zeros, of which there are many below
NEAR = 1.15  # QMoE's grid is run on all rows if on a few it errs at most this much more than ours
LEAST = 0.1  # of the target, that is left for trits where scales and directory take more
OFF = 0.01  # of the target, that is worth a note


@torch.no_grad()
def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    recipe: TernaryRecipe,
    target_bits: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> Quantized:
    """Quantise B matrices, each by itself.

    ``"gptq"`` puts a price λ on every non-zero: GPTQ over columns, then mean-field annealing and coordinate descent over all
    trits, then least-squares scales; λ is found on 64 rows of each matrix, so that the measured rate is the target. Where
    QMoE's grid errs less at no more bits, its trits are taken. Matrices whose Hessian has no Cholesky factor or stands for too
    few tokens are rounded to nearest; ``notes`` says so.

    Args:
        weight: (B, R, C) floating point, R outputs by C inputs.
        hessian: (B, C, C), sums of x xᵀ over inputs x (see :class:`~effvlm.quant.Gram`); None rounds to nearest.
        recipe: how.
        target_bits: (B,) bits per weight instead of the recipe's, in [0.4, 1.6] each.
        tokens: (B,) how many tokens each Hessian stands for; None for enough.

    Returns:
        Trits, scales and measured errors, on the device of ``weight``.

    Raises:
        ValueError: shapes that do not fit, targets out of range, NaN or Inf.
    """
    _check(weight, hessian, target_bits, tokens)
    B, R, C = weight.shape
    target = [recipe.target_bits] * B if target_bits is None else target_bits.tolist()
    counts = None if tokens is None else tokens.tolist()
    at_once = max(1, AT_ONCE // (R * C))
    reasons = [_why_not(hessian, counts, recipe, b) for b in range(B)]
    found: dict[int, _Found] = {}
    ready = [b for b in range(B) if reasons[b] is None]
    for some in (ready[i : i + at_once] for i in range(0, len(ready), at_once)):
        damp = [recipe.damp * (1 + (recipe.shrink * C / counts[b] if counts else 0)) for b in some]
        assert hessian is not None  # or nothing would be ready
        made = _calibrated(weight[some], hessian[some], recipe, [target[b] for b in some], damp)
        found |= {b: one for b, one in zip(some, made, strict=True) if one is not None}
    for b in (b for b in range(B) if b not in found):
        reason = "the Hessian has no Cholesky factor" if reasons[b] is None else str(reasons[b])
        found[b] = _nearest(weight[b], recipe, target[b], reason)
    return _measured(weight, hessian, [found[b] for b in range(B)], target, recipe)


@dataclass(frozen=True)
class _Found:
    """(R, C) int8 trits, whose they are, what went otherwise than asked."""

    trits: torch.Tensor
    method: str
    note: str = ""


def _why_not(hessian: torch.Tensor | None, tokens: list[int] | None, recipe: TernaryRecipe, b: int) -> str | None:
    """Why matrix b is rounded to nearest; None if it is not."""
    if recipe.method == "rtn":
        return ""
    if hessian is None:
        return "no Hessian was given"
    if tokens is not None and tokens[b] < recipe.min_tokens:
        return f"{tokens[b]} tokens, fewer than {recipe.min_tokens}"
    return None if bool(hessian[b].diagonal().sum() > 0) else "the Hessian is zero"


def _calibrated(
    weight: torch.Tensor, hessian: torch.Tensor, recipe: TernaryRecipe, target: list[float], damp: list[float]
) -> list[_Found | None]:
    """Trits under Hessians that are not zero; None for those without a factor."""
    if recipe.method == "minmax":
        factor = minmax_factor(hessian, recipe.damp)
        trits = minmax(weight, factor, recipe.block)
        return [None if bad else _Found(t, "minmax") for t, bad in zip(trits, factor.failed.tolist(), strict=True)]
    problem = Problem.of(weight, hessian, torch.tensor(damp, device=weight.device))
    places = (~problem.factor.failed).nonzero()[:, 0].tolist()
    found: list[_Found | None] = [None] * len(weight)
    if places:
        problem = problem.take(~problem.factor.failed)
        made = _gptq(problem, recipe, [target[b] for b in places])
        rivals = _rivals(weight[places], hessian[places], problem, made, [target[b] for b in places], recipe)
        for b, ours, rival in zip(places, made, rivals, strict=True):
            found[b] = ours if rival is None else _better(weight[b], hessian[b], ours, rival)
    return found


def _gptq(problem: Problem, recipe: TernaryRecipe, target: list[float]) -> list[_Found]:
    """Ours, by three or five levels: what was asked for, or whichever err less on a few rows."""
    bits = torch.tensor(target, dtype=torch.float64, device=problem.weight.device)
    rate = torch.maximum(bits - overhead(*problem.weight.mT.shape[1:]), LEAST * bits).float()
    five = (bits >= FIVE_LEAST) & (recipe.levels != 3)
    few, _ = problem.rows()
    scouts = {2: scout(few, rate, 2, recipe)} if bool(five.any()) else {}
    if recipe.levels != 5 or not bool(five.all()):
        scouts[1] = scout(few, rate, 1, recipe)
        five &= (scouts[2][1] < scouts[1][1]) | (recipe.levels == 5) if 2 in scouts else five
    trits = torch.empty(problem.weight.mT.shape, dtype=torch.int8, device=bits.device)
    for top in (2, 1):
        which = five if top == 2 else ~five
        if bool(which.any()):
            search = scouts[top][0] if top in scouts else scout(few, rate, top, recipe)[0]
            told = pilot(few.take(which), rate[which], top, search.take(which), recipe)
            trits[which] = reach(problem.take(which), rate[which], told, top, recipe)
        if top == 2:  # not where rows without non-zeros made bit maps of tiles
            five &= bits_per_weight(trits) < bits * (1 + 2 * OFF)
    return [_Found(one, "gptq") for one in trits]


def _rivals(
    weight: torch.Tensor, hessian: torch.Tensor, problem: Problem, ours: list[_Found], target: list[float], recipe: TernaryRecipe
) -> list[torch.Tensor | None]:
    """Trits on QMoE's grid of the matrices that a few rows say they might suit, at no more bits than the target."""
    few, places = problem.rows()
    lost = few.share_lost(minmax(weight[:, places], problem.factor, recipe.block))
    near = lost < NEAR * few.share_lost(torch.stack([one.trits[places] for one in ours]))
    rivals: list[torch.Tensor | None] = [None] * len(weight)
    for i in near.nonzero()[:, 0].tolist():
        factor = minmax_factor(hessian[i : i + 1], recipe.damp)
        trits = minmax(weight[i : i + 1], factor, recipe.block)
        if not bool(factor.failed) and float(bits_per_weight(trits)) <= target[i]:
            rivals[i] = trits[0]
    return rivals


def _better(weight: torch.Tensor, hessian: torch.Tensor, ours: _Found, rival: torch.Tensor) -> _Found:
    both = fit(weight.expand(2, -1, -1), torch.stack((ours.trits, rival)), hessian.expand(2, -1, -1))
    return _Found(rival, "minmax") if bool(both.error[1] < both.error[0]) else ours


def _nearest(weight: torch.Tensor, recipe: TernaryRecipe, target: float, reason: str) -> _Found:
    trits = rtn(weight, target, 2 if recipe.levels == 5 and target >= FIVE_LEAST else 1)
    if recipe.levels == "auto" and target > FIVE_FROM:
        other = rtn(weight, target, 2)
        both = fit(weight.expand(2, -1, -1), torch.stack((trits, other)))
        trits = other if bool(both.error[1] < both.error[0]) else trits
    return _Found(trits, "rtn", reason and f"rounded to nearest: {reason}")


def _measured(
    weight: torch.Tensor, hessian: torch.Tensor | None, found: list[_Found], target: list[float], recipe: TernaryRecipe
) -> Quantized:
    trits = torch.stack([one.trits for one in found])
    bits = bits_per_weight(trits)
    fits = [
        fit(weight[b : b + 1], trits[b : b + 1], None if hessian is None else hessian[b : b + 1], calibrated=one.method != "rtn")
        for b, one in enumerate(found)
    ]
    notes = []
    for one, got, wanted in zip(found, bits.tolist(), target, strict=True):
        off = recipe.method != "minmax" and one.method != "minmax" and abs(got / wanted - 1) > OFF
        notes.append("; ".join(part for part in (one.note, _rate_note(got, wanted, one.trits) if off else "") if part))
    return Quantized(
        trits,
        torch.cat([f.scales for f in fits]),
        bits,
        torch.cat([f.error for f in fits]),
        torch.cat([f.weight_error for f in fits]),
        tuple(one.method for one in found),
        tuple(notes),
    )


def _rate_note(bits: float, target: float, trits: torch.Tensor) -> str:
    share = f"{bits:.3f} bits per weight instead of {target:.3f}"
    if bits < target:
        return f"{share}: {5 if int(trits.abs().max()) > 1 else 3} levels hold no more that lowers the error"
    fixed = overhead(*trits.shape)
    return f"{share}: scales and tile directory alone take {fixed:.3f}" if fixed > 0.9 * target else f"{share}: found no nearer"


def _check(
    weight: torch.Tensor, hessian: torch.Tensor | None, target_bits: torch.Tensor | None, tokens: torch.Tensor | None
) -> None:
    if weight.dim() != 3 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"quantize: expected floating-point weights of shape (B, R, C), got {tuple(weight.shape)} {weight.dtype}"
        )
    B, _, C = weight.shape
    if hessian is not None and tuple(hessian.shape) != (B, C, C):
        raise ValueError(f"quantize: expected Hessians of shape {(B, C, C)}, got {tuple(hessian.shape)}")
    for name, each in (("weights", weight), ("Hessians", hessian)):
        for b in range(B if each is not None else 0):
            if not bool(torch.isfinite(each[b]).all()):  # type: ignore[index]
                raise ValueError(f"quantize: expected finite {name}, got NaN or Inf in matrix {b}")
    for name, each in (("target_bits", target_bits), ("tokens", tokens)):
        if each is not None and tuple(each.shape) != (B,):
            raise ValueError(f"quantize: expected {name} of shape {(B,)}, got {tuple(each.shape)}")
    if target_bits is not None and not bool(((target_bits >= BITS_MIN) & (target_bits <= BITS_MAX)).all()):
        raise ValueError(f"quantize: expected target_bits in [{BITS_MIN}, {BITS_MAX}], got {target_bits.tolist()}")
