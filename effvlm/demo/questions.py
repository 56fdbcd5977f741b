"""Questions about a scene: eight kinds, each a function that returns a Question or None when the scene has none of that kind.

Answers are drawn to be balanced, so that guessing without looking stays near chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from effvlm.demo.scenes import COLORS, GRID, PLACES, SHAPES, SIZES, Scene, Thing


@dataclass(frozen=True)
class Question:
    """A question with its answer and where that is to be seen.

    Attributes:
        anchor: cells that the question's words point at.
        evidence: cells that the answer is read from; the same ones, but for relations.
    """

    text: str
    answer: str
    anchor: tuple[int, ...]
    evidence: tuple[int, ...]


_STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_WHATS = (*SHAPES, *map(str, range(10)))
_COUNTS = ("0", "1", "2", "3", "4")


def _pick(rng: np.random.Generator, options: list[tuple[int, Thing]]) -> tuple[int, Thing] | None:
    return options[rng.integers(len(options))] if options else None


def _at(picked: tuple[int, Thing] | None, text: str, attribute: str) -> Question | None:
    if picked is None:
        return None
    place, thing = picked
    return Question(text.format(PLACES[place]), str(getattr(thing, attribute)), (place,), (place,))


def _descriptions(thing: Thing) -> tuple[str, str, str]:
    """By colour, by what it is, by both."""
    return f"{thing.color} thing", thing.what, thing.name


def _unique(scene: Scene) -> list[tuple[int, str]]:
    """(cell, description) of every description that fits one thing only."""
    fits = Counter(words for _, thing in scene.things() for words in _descriptions(thing))
    return [(i, words) for i, thing in scene.things() for words in _descriptions(thing) if fits[words] == 1]


def color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What colour is the thing at a place."""
    return _at(_pick(rng, scene.things()), "what color is the thing at the {} ?", "color")


def shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What shape is at a place."""
    return _at(_pick(rng, [(i, t) for i, t in scene.things() if t.shape]), "what shape is at the {} ?", "shape")


def digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which handwritten digit is at a place."""
    return _at(_pick(rng, [(i, t) for i, t in scene.things() if t.digit is not None]), "which digit is at the {} ?", "digit")


def size(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How big the shape at a place is: small or large."""
    return _at(_pick(rng, [(i, t) for i, t in scene.things() if t.size]), "how big is the shape at the {} ?", "size")


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many things of a colour there are, 0 to 4; the number is drawn first, so that all are as likely as scenes allow."""
    numbers = {name: sum(t.color == name for _, t in scene.things()) for name in COLORS}
    wanted = int(rng.integers(len(_COUNTS)))
    matching = [name for name, n in numbers.items() if n == wanted]
    if not matching:
        return None
    picked = matching[rng.integers(len(matching))]
    cells = tuple(i for i, t in scene.things() if t.color == picked)
    return Question(f"how many {picked} things are there ?", str(wanted), cells, cells)


def exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Whether there is such a thing; yes and no are equally likely; a no by colour and shape has one of them in the picture."""
    there = [thing for _, thing in scene.things()]
    colors, whats = {t.color for t in there}, {t.what for t in there}
    by = int(rng.integers(3))
    present = sorted({_descriptions(t)[by] for t in there})
    everything = (
        [f"{c} thing" for c in COLORS],
        list(_WHATS),
        [f"{c} {w}" for c in COLORS for w in _WHATS if c in colors or w in whats],
    )
    absent = [words for words in everything[by] if words not in present]
    if not present or not absent:
        return None
    yes = bool(rng.integers(2))
    options = present if yes else absent
    words = options[rng.integers(len(options))]
    cells = tuple(i for i, t in scene.things() if _descriptions(t)[by] == words)
    return Question(f"is there a {words} ?", "yes" if yes else "no", cells, cells)


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where the only such thing is."""
    options = _unique(scene)
    if not options:
        return None
    place, words = options[rng.integers(len(options))]
    return Question(f"where is the {words} ?", PLACES[place], (place,), (place,))


def relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What stands next to the only such thing: a name of two words, or nothing."""
    options = []
    for i, description in _unique(scene):
        for words, (dy, dx) in _STEPS.items():
            y, x = i // GRID + dy, i % GRID + dx
            if 0 <= y < GRID and 0 <= x < GRID:
                there = y * GRID + x
                neighbour = scene.cells[there]
                answer = neighbour.name if neighbour else "nothing"
                options.append(Question(f"what is {words} the {description} ?", answer, (i,), (there,)))
    return options[rng.integers(len(options))] if options else None


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    f.__name__: f for f in (color, shape, digit, size, count, exists, where, relation)
}


def vocabulary() -> list[str]:
    """Every word that questions and answers use, in a fixed order."""
    asked = "what color is the thing at shape which digit how big many things are there a where left right of above below"
    words = [
        *asked.split(),
        *COLORS,
        *SHAPES,
        *SIZES,
        *" ".join(PLACES).split(),
        *map(str, range(10)),
        "yes",
        "no",
        "nothing",
        "?",
    ]
    return list(dict.fromkeys(words))
