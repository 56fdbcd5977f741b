"""What every pass over experts gives back: which layers changed, how many parameters it cost or saved, and the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Report:
    """What a pass did; ``print`` it.

    Attributes:
        method: the pass.
        modules: names of the modules of experts that changed (for a new model: its own).
        parameters: how many the model had before, and has after.
        experts: how many every module had before, and has after; "16" or "8, 16" where layers differ.
        model: the model that came out: the one that went in, unless the pass says that it makes a new one.
    """

    method: str
    modules: tuple[str, ...]
    parameters: tuple[int, int]
    experts: tuple[str, str]
    model: Any = field(repr=False)

    def __str__(self) -> str:
        (before, after), (had, has) = self.parameters, self.experts
        share = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
        count = f"{had} → {has} experts each" if had != has else f"{has} experts each"
        lines = [
            f"{self.method}: {len(self.modules)} layers, {count}",
            f"  parameters {before:,} → {after:,}{share}",
        ]
        return "\n".join(lines + [f"  {line}" for line in self.notes()])

    def notes(self) -> list[str]:
        """Further lines, of the pass."""
        return []


def parameters(model: torch.nn.Module) -> int:
    """How many parameters a model has; shared ones once."""
    return sum(p.numel() for p in model.parameters())


def counts(numbers: Iterable[int]) -> str:
    """The different numbers, as text."""
    return ", ".join(map(str, sorted(set(numbers))))
