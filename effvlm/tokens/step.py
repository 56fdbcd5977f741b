"""Steps, methods and recipes: where in a model tokens are reduced, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from effvlm.tokens.combines import Combine, Drop
from effvlm.tokens.picks import Pick, Top
from effvlm.tokens.plan import Plan
from effvlm.tokens.signals import Signal
from effvlm.tokens.tokens import Tokens


class Reduction(Protocol):
    """Anything that plans fewer tokens."""

    @property
    def needs(self) -> tuple[Signal, ...]: ...
    def plan(self, tokens: Tokens) -> Plan: ...


@dataclass(frozen=True)
class Select:
    """Pick tokens; combine the others with them, or drop them."""

    pick: Pick = field(default_factory=Top)
    combine: Combine = field(default_factory=Drop)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys((*self.pick.needs, *self.combine.needs)))

    def plan(self, tokens: Tokens) -> Plan:
        picked = self.pick(tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.x.device))
        if bool((picked > 0).all()):
            return Plan.keeping(tokens, picked > 0)
        return self.combine(tokens, picked)


@dataclass(frozen=True)
class Step:
    """One reduction at one place of the model.

    Attributes:
        do: what to do.
        at: ``"projector"``, on the features that the language model would get; ``"vision"``, in every layer of the vision tower,
            between attention and MLP (reductions with a schedule, such as ToMe's).
    """

    do: Reduction
    at: str = "projector"

    def __post_init__(self) -> None:
        if self.at not in ("projector", "vision"):
            raise ValueError(f"Step: expected at to be 'projector' or 'vision', got {self.at!r}")

    def steps(self) -> tuple[Step, ...]:
        """This step, as a method of one."""
        return (self,)


@runtime_checkable
class Method(Protocol):
    """Anything made of steps: the methods of this package, a :class:`Step`, a :class:`Recipe`."""

    def steps(self) -> tuple[Step, ...]: ...


@dataclass(frozen=True)
class Recipe:
    """Methods one after the other.

    Attributes:
        methods: methods and steps; those in the vision tower come first.
        positions: ``"original"``, every token keeps its position id; ``"renumbered"``, ids without gaps, as many released methods
            have them (it costs accuracy wherever places matter).
        attention: ``"plain"``, or ``"proportional"``: in the language model a token that stands for s tokens counts s times, as
            ToMe has it in the tower. Tokens that were dropped count where they are most alike.
    """

    methods: Sequence[Method]
    positions: str = "original"
    attention: str = "plain"

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for m in self.methods:
            if isinstance(m, type) or not isinstance(m, Method):
                raise TypeError(f"Recipe: expected methods such as effvlm.tokens.ToMe(keep=0.25), got {m!r}")
        if self.positions not in ("original", "renumbered"):
            raise ValueError(f"Recipe: expected positions 'original' or 'renumbered', got {self.positions!r}")
        if self.attention not in ("plain", "proportional"):
            raise ValueError(f"Recipe: expected attention 'plain' or 'proportional', got {self.attention!r}")

    def steps(self) -> tuple[Step, ...]:
        """All steps; those of the vision tower before the others."""
        steps = [s for m in self.methods for s in m.steps()]
        return tuple(sorted(steps, key=lambda s: s.at != "vision"))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML text, also written to ``path`` where one is given."""
        from effvlm.tokens import files

        text = files.to_text(self)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Recipe:
        """A recipe from a YAML file, or from YAML text.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the text is no recipe; the message says what is wrong where.
        """
        from effvlm.tokens import files

        return files.from_source(cls, source)


def apply(method: Method, tokens: Tokens) -> Tokens:
    """``tokens`` after all steps of a method, outside any model.

    Raises:
        ValueError: a step in the vision tower, which needs one, or a signal that the tokens do not have.
    """
    for step in method.steps():
        if step.at != "projector":
            raise ValueError(f"apply: expected steps on features, got one at {step.at!r}, which needs a model")
        tokens = step.do.plan(tokens).apply(tokens)
    return tokens
