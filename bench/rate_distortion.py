"""What a layer loses against the bits it takes: QMoE's grid, rounding to nearest and ours, on synthetic layers.

python bench/rate_distortion.py curves.png
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table

from effvlm.quant import TernaryRecipe, bits_per_weight, quantize
from effvlm.quant.measure import fit
from effvlm.quant.minmax import minmax, minmax_factor, minmax_grid
from effvlm.quant.problem import Problem
from effvlm.quant.rate import overhead
from effvlm.quant.target import pilot, reach, scout

LAYERS = ("gaussian white", "gaussian i^-0.6", "gaussian i^-1", "t5 i^-0.6", "t5 i^-1", "unequal channels")
TARGETS = (0.4, 0.5, 0.65, 0.8, 1.0, 1.3, 1.6)
LOW = (0.15, 0.2, 0.3, 0.4, 0.5)  # where ours errs like QMoE's grid
Curve = list[tuple[float, float]]  # of (bits per weight, error)


def layer(
    name: str, rows: int = 96, channels: int = 1024, tokens: int = 4096, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) weights and the (C, C) sum of x xᵀ over ``tokens`` inputs whose covariance has the named spectrum.

    ``unequal channels`` are Gaussian weights under i^-0.8, each input channel multiplied by exp(a normal number).
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=g)
    if name.startswith("t5"):
        weight /= (torch.randn(5, rows, channels, generator=g).square().mean(0)).sqrt()
    power = {"white": 0.0, "i^-0.6": 0.6, "i^-1": 1.0, "channels": 0.8}[name.split()[-1]]
    turn = torch.linalg.qr(torch.randn(channels, channels, generator=g)).Q
    spread = torch.arange(1, channels + 1).float() ** (-power / 2)
    x = (torch.randn(tokens, channels, generator=g) * spread) @ turn.T
    if name == "unequal channels":
        x *= torch.randn(channels, generator=g).exp()
    return weight, x.T @ x


def entropy(trits: torch.Tensor) -> float:
    """Bits per weight of an ideal code for independent trits of these frequencies."""
    share = torch.unique(trits, return_counts=True)[1].double() / trits.numel()
    return float(-(share * share.log2()).sum())


def grid_error(weight: torch.Tensor, hessian: torch.Tensor, damp: float = 0.1) -> tuple[torch.Tensor, float]:
    """QMoE's trits of one (R, C) matrix, and what it loses with its own two levels per row."""
    trits = minmax(weight[None], minmax_factor(hessian[None], damp))[0]
    low, high = minmax_grid(weight)
    rounded = torch.where(trits > 0, high[:, None], 0) + torch.where(trits < 0, low[:, None], 0)
    away, h = (weight - rounded).double(), hessian.double()
    return trits, float(((away @ h) * away).sum() / ((weight.double() @ h) * weight.double()).sum())


def bits_at(curve: list[tuple[float, float]], error: float) -> float:
    """Where a curve of (bits, error), ascending in bits, comes down to an error; straight lines in log(error), NaN outside."""
    for (b0, e0), (b1, e1) in pairwise(curve):
        if e0 >= error >= e1:
            return b0 + (b1 - b0) * math.log(e0 / error) / math.log(e0 / e1) if e0 > e1 else b0
    return math.nan


def ours(weight: torch.Tensor, hessian: torch.Tensor, targets: Sequence[float]) -> Curve:
    """Three levels at any rate, also below those that a recipe allows: QMoE's grid can end up there."""
    recipe, bits = TernaryRecipe(levels=3), torch.tensor(targets)
    stack, hessians = (x.expand(len(targets), -1, -1) for x in (weight, hessian))
    problem = Problem.of(stack, hessians, torch.full((len(targets),), recipe.damp))
    rate, few = bits - overhead(*weight.shape), problem.rows()[0]
    told = pilot(few, rate, 1, scout(few, rate, 1, recipe)[0], recipe)
    trits = reach(problem, rate, told, 1, recipe)
    return sorted(zip(bits_per_weight(trits).tolist(), fit(stack, trits, hessians).error.tolist(), strict=True))


def measure(name: str, rows: int, targets: Sequence[float]) -> dict[str, Curve]:
    """Curves of (bits, error) by method; QMoE's grid is one point, once at its entropy and once at what it takes stored."""
    weight, hessian = layer(name, rows)
    trits, error = grid_error(weight, hessian)
    curves = {"min-max, entropy": [(entropy(trits), error)], "min-max": [(float(bits_per_weight(trits[None])), error)]}
    stack, hessians = (x.expand(len(targets), -1, -1) for x in (weight, hessian))
    recipes = {"rtn": TernaryRecipe(method="rtn"), "3 levels": TernaryRecipe(levels=3), "5 levels": TernaryRecipe(levels=5)}
    for method, recipe in {**recipes, "auto": TernaryRecipe()}.items():
        made = quantize(stack, hessians, recipe, torch.tensor(targets))
        curves[method] = list(zip(made.bits.tolist(), made.error.tolist(), strict=True))
    return curves


def plot(curves: dict[str, dict[str, Curve]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = math.ceil(len(curves) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 8), squeeze=False)
    for axis, (name, by_method) in zip(axes.flat, curves.items(), strict=False):
        for method, points in by_method.items():
            axis.semilogy(*zip(*sorted(points), strict=True), "o" if len(points) == 1 else ".-", label=method)
        axis.set(title=name, xlabel="bits per weight stored", ylabel="share of the output's energy lost")
        axis.grid(alpha=0.3, which="both")
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(name: str, curves: dict[str, Curve], targets: Sequence[float]) -> Table:
    made = Table("error at bits per weight", *map(str, targets), title=name)
    for method, points in curves.items():
        if len(points) == len(targets):
            cells = (
                f"{e:.4f}" + ("" if abs(b / t - 1) < 0.01 else f" ({b:.2f})") for (b, e), t in zip(points, targets, strict=True)
            )
            made.add_row(method, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", nargs="?", help="where to save the curves")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="two layers and three targets")
    asked = parser.parse_args()
    names, targets = (LAYERS[1::4], TARGETS[1:4]) if asked.quick else (LAYERS, TARGETS)
    console, curves = Console(width=120), {}
    for name in names:
        begin = time.perf_counter()
        curves[name] = measure(name, asked.rows, targets)
        console.print(table(f"{name} ({time.perf_counter() - begin:.0f} s)", curves[name], targets))
        (ideal, error), (stored, _) = curves[name]["min-max, entropy"][0], curves[name]["min-max"][0]
        at = bits_at(ours(*layer(name, asked.rows), LOW), error)
        console.print(f"min-max: entropy {ideal:.3f}, stored {stored:.3f}, error {error:.4f}")
        console.print(f"ours at that error: {at:.3f} stored, {at / ideal:.2f} of the entropy, {at / stored:.2f} of the bits\n")
    if asked.plot:
        plot(curves, asked.plot)


if __name__ == "__main__":
    main()
