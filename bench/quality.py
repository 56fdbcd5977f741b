"""What compressed experts cost the demo VLM: right answers to held-out questions against bits per weight, as a table and a plot.

python bench/quality.py curves.png            # 2,000 questions; about half an hour on 2 cores
python bench/quality.py --n 400 --bits 0.8    # a look

Calibration takes questions of the training distribution, with digits that the held-out ones do not have (scikit-learn). QMoE's
grid is run as published, each row's least and greatest weight as levels, inside GPTQ; its size is what its trits take in gap
planes, so that grids are compared and not codes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, record
from rate_distortion import entropy
from rich.console import Console
from rich.table import Table

import effvlm
from effvlm.compression.calibrate import Session
from effvlm.compression.modules import Inputs
from effvlm.demo.evaluation import draw_sample, prompt
from effvlm.demo.questions import KINDS
from effvlm.demo.scenes import training_scans
from effvlm.hf import ternary_experts
from effvlm.quant import TernaryRecipe, bits_per_weight
from effvlm.quant.minmax import minmax, minmax_factor, minmax_grid

BITS = (0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.6)
QMOE_DAMP = 0.1


def calibration(processor: Any, questions: int, batch: int = 32) -> list[dict[str, torch.Tensor]]:
    """Questions with their answers, as the model was trained on them."""
    kinds, batches = list(KINDS), []
    for first in range(0, questions, batch):
        drawn = [draw_sample(2**39 + i, kinds[i % len(kinds)], training_scans()) for i in range(first, first + batch)]
        text = [f"{prompt(s.question)} {s.answer}" for s in drawn]
        batches.append(dict(processor(images=[s.image for s in drawn], text=text, return_tensors="pt", padding=True)))
    return batches


class Levels(torch.nn.Module):
    """A product with dense (E, R, C) weights, in the place of a compressed one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(T, C) and (T, K) ids → (T, K, R); zeros for ids that no expert has."""
        out = x.new_zeros(*ids.shape, self.weight.shape[1])
        for e, weight in enumerate(self.weight):
            token, choice = (ids == e).nonzero(as_tuple=True)
            out[token, choice] = x[token] @ weight.T
        return out


@torch.no_grad()
def qmoe(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Give a model's experts QMoE's levels, layer after layer, in place; bits per weight in gap planes, and the entropy."""
    modules = ternary_experts.found(model)[0]
    trits: list[torch.Tensor] = []
    with Session(model, batches, modules) as session:
        for name in session.order:
            inputs = Inputs(modules[name], session.see(name), TernaryRecipe(damp=QMOE_DAMP))
            done: dict[str, Any] = {}
            for slot in ternary_experts.slots_of(modules[name]):
                weight = slot.read(modules[name], 0, slot.experts)
                hessian, tokens = inputs.grams(weight.shape[2], done)(0, slot.experts)
                assert int(tokens.min()) > 0, "an expert without tokens has no Hessian"
                made = minmax(weight, minmax_factor(hessian, QMOE_DAMP))
                low, high = (level[..., None] for level in minmax_grid(weight))
                weight.copy_(torch.where(made > 0, high, 0) + torch.where(made < 0, low, 0))
                done[slot.path] = Levels(weight)
                trits.append(made)
    sizes = [(float(bits_per_weight(t).mean()), entropy(t), t.numel()) for t in trits]
    total = sum(n for _, _, n in sizes)
    return sum(b * n for b, _, n in sizes) / total, sum(h * n for _, h, n in sizes) / total


def ours(model: Any, recipe: TernaryRecipe, batches: list[dict[str, torch.Tensor]]) -> float:
    """Compress in place; bits per weight, headers and checksums left out: they are once per file, of a tiny model."""
    effvlm.compress(model, recipe, batches)
    sizes = [(w.weight, math.prod(w.sizes[:3])) for _, w in ternary_experts.planes_of(model)]
    stored = sum(w.nbytes - 4 * (16 + len(w.header) + len(w.checksums)) for w, _ in sizes)
    return 8 * stored / sum(n for _, n in sizes)


def point(method: str, bits: float, right: int, n: int, **more: Any) -> dict[str, Any]:
    """A row, with the 95 % interval of a proportion (Wilson, 1927)."""
    share, z = right / n, 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"method": method, "bits": bits, "right": right, "n": n, "low": middle - half, "high": middle + half, **more}


def measure(n: int, targets: Sequence[float], questions: int, say: Any) -> list[dict[str, Any]]:
    """All methods at all targets."""
    model, processor = effvlm.demo.load()
    batches = calibration(processor, questions)
    rows: list[dict[str, Any]] = []

    def add(method: str, made: Any, bits: float, **more: Any) -> None:
        answers = effvlm.demo.evaluate(made, n, processor=processor)
        rows.append(point(method, bits, answers["right"], n, **more))
        say(f"{method:10s} {bits:6.3f} bits per weight: {100 * answers['accuracy']:.1f} % right")

    add("unmodified", model, 8.0 * next(model.parameters()).element_size())
    grid = copy.deepcopy(model)
    bits, ideal = qmoe(grid, batches)
    add("QMoE", grid, bits, entropy=ideal)
    for target in sorted({*targets, round(bits, 3)}):
        for method in ("rtn", "gptq"):
            compressed, start = copy.deepcopy(model), time.perf_counter()
            bits_got = ours(compressed, TernaryRecipe(target_bits=target, method=method), batches)
            add(method, compressed, bits_got, target=target, seconds=time.perf_counter() - start)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("method", "bits per weight", "right", "95 %")
    for row in rows:
        interval = f"{100 * row['low']:.1f} … {100 * row['high']:.1f} %"
        made.add_row(row["method"], f"{row['bits']:.3f}", f"{100 * row['right'] / row['n']:.1f} %", interval)
    return made


def plot(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    whole = next(row for row in rows if row["method"] == "unmodified")
    axis.axhline(100 * whole["right"] / whole["n"], color="0.6", ls="--", label="unmodified")
    for method, label in (("gptq", "effvlm"), ("rtn", "rounded to nearest"), ("QMoE", "QMoE's grid")):
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["bits"])
        share = [100 * r["right"] / r["n"] for r in points]
        down = [s - 100 * r["low"] for s, r in zip(share, points, strict=True)]
        up = [100 * r["high"] - s for s, r in zip(share, points, strict=True)]
        style = "o" if len(points) == 1 else "o-"
        axis.errorbar([r["bits"] for r in points], share, [down, up], fmt=style, ms=4, capsize=2, label=label)
    axis.set(xlabel="bits per weight of the experts, everything stored", ylabel=f"% of {whole['n']} held-out answers right")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", nargs="?", help="where to save the curves")
    parser.add_argument("--n", type=int, default=2000, help="held-out questions")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS)
    parser.add_argument("--questions", type=int, default=512, help="for calibration")
    parser.add_argument("--save", action="store_true", help="write bench/results/quality-demo.json")
    asked = parser.parse_args()
    console = Console(stderr=True)
    rows = measure(asked.n, asked.bits, asked.questions, lambda line: console.print(line, highlight=False))
    Console().print(table(rows))
    if asked.plot:
        plot(rows, asked.plot)
    if asked.save:
        result = {"machine": record("cpu"), "calibration questions": asked.questions, "rows": rows}
        (Path(ROOT) / "bench/results/quality-demo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
