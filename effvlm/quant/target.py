"""Trits under a Hessian that cost a wanted number of bits: GPTQ, annealing and descent at a price found on a few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.quant.anneal import Descent, best
from effvlm.quant.base import TernaryRecipe
from effvlm.quant.gptq import gptq
from effvlm.quant.problem import TINY, Problem
from effvlm.quant.rate import code_rate
from effvlm.quant.rtn import row_levels
from effvlm.quant.search import PriceSearch

HOT, COLD = 0.22, 0.03  # temperatures of the first and the last annealed sweep, in units of a² times the mean of H's diagonal
SETTLE = 6  # further descents at most
TOLERANCE = 0.006


@dataclass(frozen=True)
class Pilot:
    """What a few rows told about each of B matrices.

    Attributes:
        price: (B,) of a non-zero, at which the rate should come.
        slope: (B,) d log(rate) / d log(price).
        course: (B,) rates after GPTQ and after each sweep on the way to the wanted one.
        bound: (B,) bool, the levels hold less than was wanted.
    """

    price: torch.Tensor
    slope: torch.Tensor
    course: list[torch.Tensor]
    bound: torch.Tensor


def scout(few: Problem, rate: torch.Tensor, top: int, recipe: TernaryRecipe) -> tuple[PriceSearch, torch.Tensor]:
    """Find the price of a (B,) rate, first for GPTQ alone, then for all that follows it; and the (B,) share lost there."""
    search = PriceSearch(rate)
    for _ in range(3):
        search.saw(code_rate(start(few, search.price, top, recipe.block).rounded()))
    search.renew()
    descent, _, course = descend(few, search.price, top, recipe)
    search.saw(course[-1])
    off = torch.where(search.exhausted(), 0, course[-1] - rate)
    return search, few.share_lost(descent.rounded()) * 4**off  # about 6 dB per bit


def pilot(few: Problem, rate: torch.Tensor, top: int, search: PriceSearch, recipe: TernaryRecipe) -> Pilot:
    """Once more at the price that a scout found, for the course on the way."""
    course = descend(few, search.price, top, recipe)[2]
    search.saw(course[-1])
    bound = search.exhausted() & (search.off < -TOLERANCE)
    wanted = torch.where(bound, course[-1], rate) / course[-1].clamp(min=TINY)
    return Pilot(search.price, search.slope, [at * wanted for at in course], bound)


def start(problem: Problem, price: torch.Tensor, top: int, block: int) -> Descent:
    """GPTQ at (B,) prices."""
    price = price[:, None, None]
    diagonal = problem.hessian.diagonal(dim1=1, dim2=2)[:, None]
    level = row_levels(problem.weight.mT, price, top, diagonal).mT
    bar = (price / level.square())[:, 0]
    trits = gptq(problem.weight / level, problem.factor, lambda u, cost: best(2 * u * cost, bar, cost, top), block)
    return Descent(problem.hessian, problem.product, trits, level, top, block)


def descend(
    problem: Problem, price: torch.Tensor, top: int, recipe: TernaryRecipe, told: Pilot | None = None
) -> tuple[Descent, torch.Tensor, list[torch.Tensor]]:
    """GPTQ, annealing, descent; with what a pilot told, prices follow so that rates do.

    Returns:
        The descent; the last (B,) price; the (B,) rates after GPTQ and after each sweep.
    """
    span = max(recipe.sweeps - 1, 1)
    temperatures = [HOT * (COLD / HOT) ** (i / span) for i in range(recipe.sweeps)] + [0.0] * recipe.iterations
    descent = start(problem, price, top, recipe.block)
    course = [code_rate(descent.rounded())]
    for i, temperature in enumerate(temperatures):
        if told is not None:
            price = price * ((course[-1] / told.course[i].clamp(min=TINY)).clamp(0.5, 2) ** (-1 / told.slope))
        if i == recipe.sweeps:
            descent = Descent(problem.whole, problem.whole_product(), descent.trits, descent.scale, top, recipe.block)
        if not temperature:
            descent.refit()
        descent.sweep(price[:, None, None], temperature)
        course.append(code_rate(descent.rounded()))
    descent.refit()
    return descent, price, course


def settle(descent: Descent, price: torch.Tensor, rate: torch.Tensor) -> None:
    """More descents of the (B,) matrices whose rate is not yet as wanted."""
    have, response = code_rate(descent.rounded()), torch.full_like(rate, 0.3)
    for _ in range(SETTLE):
        off = (have / rate).clamp(min=TINY).log()
        todo = off.abs() > TOLERANCE
        if not bool(todo.any()):
            return
        step = (off / response).clamp(-0.5, 0.5)[todo]
        price[todo] *= step.exp()
        some = descent.select(todo)
        some.sweep(price[todo][:, None, None])
        some.refit()
        descent.trits[todo], descent.scale[todo] = some.trits, some.scale
        now = code_rate(some.rounded())
        response[todo] = (-(now / have[todo]).clamp(min=TINY).log() / step).clamp(0.1, 1)
        have[todo] = now


def reach(problem: Problem, rate: torch.Tensor, told: Pilot, top: int, recipe: TernaryRecipe) -> torch.Tensor:
    """Trits of all rows at a (B,) rate, int8 (B, R, C)."""
    descent, price, _ = descend(problem, told.price, top, recipe, told)
    settle(descent, price, torch.where(told.bound, torch.minimum(rate, code_rate(descent.rounded())), rate))
    return descent.rounded()
