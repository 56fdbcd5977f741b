"""Questions about a scene: eight kinds, each a function that returns (question, answer) or None when the scene has no such
question. Answers are drawn to be balanced, so that guessing without looking stays near chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from effvlm.demo.scenes import COLORS, GRID, PLACES, SHAPES, SIZES, Scene, Thing

Answered = tuple[str, str]
_STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_WHATS = (*SHAPES, *map(str, range(10)))
_COUNTS = ("0", "1", "2", "3", "4")


def _pick(rng: np.random.Generator, options: list[tuple[int, Thing]]) -> tuple[int, Thing] | None:
    return options[rng.integers(len(options))] if options else None


def _descriptions(thing: Thing) -> tuple[str, str, str]:
    """By colour, by what it is, by both."""
    return f"{thing.color} thing", thing.what, thing.name


def _unique(scene: Scene) -> list[tuple[int, str]]:
    """(cell, description) of every description that fits one thing only."""
    fits = Counter(words for _, thing in scene.things() for words in _descriptions(thing))
    return [(i, words) for i, thing in scene.things() for words in _descriptions(thing) if fits[words] == 1]


def color(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """What colour is the thing at a place."""
    picked = _pick(rng, scene.things())
    return picked and (f"what color is the thing at the {PLACES[picked[0]]} ?", picked[1].color)


def shape(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """What shape is at a place."""
    picked = _pick(rng, [(i, t) for i, t in scene.things() if t.shape])
    return picked and (f"what shape is at the {PLACES[picked[0]]} ?", str(picked[1].shape))


def digit(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """Which handwritten digit is at a place."""
    picked = _pick(rng, [(i, t) for i, t in scene.things() if t.digit is not None])
    return picked and (f"which digit is at the {PLACES[picked[0]]} ?", str(picked[1].digit))


def size(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """How big the shape at a place is: small or large."""
    picked = _pick(rng, [(i, t) for i, t in scene.things() if t.size])
    return picked and (f"how big is the shape at the {PLACES[picked[0]]} ?", str(picked[1].size))


def count(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """How many things of a colour there are, 0 to 4; the number is drawn first, so that all are as likely as scenes allow."""
    numbers = {name: sum(t.color == name for _, t in scene.things()) for name in COLORS}
    wanted = int(rng.integers(len(_COUNTS)))
    matching = [name for name, n in numbers.items() if n == wanted]
    if not matching:
        return None
    return f"how many {matching[rng.integers(len(matching))]} things are there ?", str(wanted)


def exists(scene: Scene, rng: np.random.Generator) -> Answered | None:
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
    return f"is there a {options[rng.integers(len(options))]} ?", "yes" if yes else "no"


def where(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """Where the only such thing is."""
    options = _unique(scene)
    if not options:
        return None
    place, words = options[rng.integers(len(options))]
    return f"where is the {words} ?", PLACES[place]


def relation(scene: Scene, rng: np.random.Generator) -> Answered | None:
    """What stands next to the only such thing: a name of two words, or nothing."""
    options = []
    for i, description in _unique(scene):
        for words, (dy, dx) in _STEPS.items():
            y, x = i // GRID + dy, i % GRID + dx
            if 0 <= y < GRID and 0 <= x < GRID:
                neighbour = scene.cells[y * GRID + x]
                options.append((f"what is {words} the {description} ?", neighbour.name if neighbour else "nothing"))
    return options[rng.integers(len(options))] if options else None


KINDS: dict[str, Callable[[Scene, np.random.Generator], Answered | None]] = {
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
