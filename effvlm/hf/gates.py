"""What happens between an expert's two products, found by trying it: no family is assumed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from effvlm.ops.moe_ffn import ACTS, gate


@dataclass(frozen=True)
class Gate:
    """The keywords of :func:`effvlm.moe_ffn` that say what happens between the two products."""

    act: str
    gated: bool
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __str__(self) -> str:
        words = [self.act + ("" if self.alpha == 1 else f" (alpha {self.alpha:g})"), "gated" if self.gated else "not gated"]
        words += ["interleaved"] * self.interleaved + [f"clamped at {self.limit:g}"] * (self.limit < math.inf)
        return ", ".join(words)


def _candidates(gated: bool, limits: Iterable[float], alphas: Iterable[float]) -> list[Gate]:
    if not gated:
        return [Gate(act, gated=False) for act in ACTS]
    choices = itertools.product(ACTS, (False, True), (1.0, 1.702, *alphas), (math.inf, *limits), (0.0, 1.0))
    return [Gate(act, True, interleaved, alpha, limit, offset) for act, interleaved, alpha, limit, offset in choices]


def match_gate(
    apply: Callable[[torch.Tensor], torch.Tensor], *, gated: bool, limits: Iterable[float] = (), alphas: Iterable[float] = ()
) -> Gate | None:
    """The gate that computes what ``apply`` does on a probe of (64, R) rows, or None.

    Args:
        apply: (S, R) sums of the first product → (S, I).
        gated: whether R is 2·I.
        limits, alphas: values to try besides none, and besides 1 and 1.702.
    """
    rows = torch.randn(64, 2 * 24 if gated else 24, generator=torch.Generator().manual_seed(0)) * 4
    rows[:4] *= 10  # into every clamp
    try:
        with torch.no_grad():
            wanted = apply(rows)
    except Exception:  # somebody else's code, on an input of ours: whatever it raises, we do not know its gate
        return None
    for candidate in _candidates(gated, limits, alphas):
        got = gate(rows, **vars(candidate))
        if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
            return candidate
    return None


_known: WeakKeyDictionary[torch.nn.Module, Gate | None] = WeakKeyDictionary()


def gate_of(module: torch.nn.Module, find: Callable[[torch.nn.Module], Gate | None], *, again: bool = False) -> Gate | None:
    """``find(module)``, once per module; a copy of a module is another module. ``again``: it may have changed."""
    if again or module not in _known:
        _known[module] = find(module)
    return _known[module]
