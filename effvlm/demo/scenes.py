"""Scenes of the demo VLM: a 3×3 grid of shapes and real handwritten digits, rendered with anti-aliasing in NumPy.

Everything follows from a seed. Digits are scans from the UCI "Optical Recognition of Handwritten Digits" data (CC BY 4.0): the
ones that tests and the demo show ship with the package, the ones to train on come from scikit-learn and are never shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

GRID, CELL = 3, 32
SIZE = GRID * CELL  # pixels
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 185, 70),
    "blue": (60, 95, 235),
    "yellow": (235, 215, 55),
    "purple": (165, 65, 205),
    "white": (238, 238, 238),
}
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DIGITS_FILE = Path(__file__).with_name("digits.safetensors")
HELD_OUT_EVERY = 5  # every fifth scan of scikit-learn's digits is held out

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """What one cell holds: a shape in two sizes, or a handwritten digit."""

    color: str
    shape: str | None = None
    size: str | None = None
    digit: int | None = None

    @property
    def what(self) -> str:
        """The shape or the digit, without the colour."""
        return self.shape or str(self.digit)

    @property
    def name(self) -> str:
        """As a question or an answer calls it: "red circle", "blue 7"."""
        return f"{self.color} {self.what}"


@dataclass(frozen=True)
class Scene:
    """Nine cells, row by row; None is an empty one. ``seed`` fixes all that is not meaning: jitter, noise, which scan."""

    cells: tuple[Thing | None, ...]
    seed: int

    def things(self) -> list[tuple[int, Thing]]:
        """(cell index, thing) of every cell that is not empty."""
        return [(i, thing) for i, thing in enumerate(self.cells) if thing is not None]


def draw_scene(rng: np.random.Generator, *, empty: float = 0.2, digits: float = 0.3) -> Scene:
    """A random scene of 2 to 6 colours; each cell is empty or holds a digit with the probabilities given, else a shape."""
    colors = rng.permutation(list(COLORS))[: rng.integers(2, len(COLORS) + 1)].tolist()

    def cell() -> Thing | None:
        kind, color = rng.random(), colors[rng.integers(len(colors))]
        if kind < empty:
            return None
        if kind < empty + digits:
            return Thing(color, digit=int(rng.integers(10)))
        return Thing(color, shape=SHAPES[rng.integers(len(SHAPES))], size=SIZES[rng.integers(2)])

    return Scene(tuple(cell() for _ in range(GRID * GRID)), int(rng.integers(2**31)))


@dataclass(frozen=True)
class Scans:
    """Digit scans: ``images`` (n, 8, 8) uint8 in 0 … 16, ``labels`` (n,) uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@cache
def held_out_scans() -> Scans:
    """The scans that ship with the package; no model of ours was trained on them."""
    data = load_file(DIGITS_FILE)
    return Scans(data["images"], data["labels"])


@cache
def training_scans() -> Scans:
    """The other scans, from scikit-learn (``pip install 'effvlm[train]'``)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("training the demo model needs scikit-learn: pip install 'effvlm[train]'") from error
    digits = load_digits()
    keep = np.arange(len(digits.target)) % HELD_OUT_EVERY != 0
    return Scans(digits.images[keep].astype(np.uint8), digits.target[keep].astype(np.uint8))


def _star(u: Float, v: Float, r: Float) -> Float:
    outline = 0.42 + 0.58 * np.abs(np.cos(2.5 * np.arctan2(u, -v))) ** 1.5
    return np.asarray(np.hypot(u, v) - r * outline, dtype=np.float32)


# Signed distances (pixels, negative inside) of a shape of radius r at (u, v) from its centre.
_DISTANCE: dict[str, Callable[[Float, Float, Any], Float]] = {
    "circle": lambda u, v, r: np.hypot(u, v) - r,
    "square": lambda u, v, r: np.maximum(np.abs(u), np.abs(v)) - 0.85 * r,
    "triangle": lambda u, v, r: np.maximum(np.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v), v) - 0.55 * r,
    "cross": lambda u, v, r: np.minimum(
        np.maximum(np.abs(u) - r, np.abs(v) - 0.3 * r), np.maximum(np.abs(v) - r, np.abs(u) - 0.3 * r)
    ),
    "star": _star,
    "ring": lambda u, v, r: np.abs(np.hypot(u, v) - 0.75 * r) - 0.22 * r,
}


def _digit_mask(scan: NDArray[np.uint8], u: Float, v: Float, r: float) -> Float:
    """Coverage of a scan that spans ±r pixels, by bilinear sampling."""
    padded = np.pad(scan.astype(np.float32) / 16, 2)
    x, y = np.clip(u / r * 4 + 5.5, 0, 10.99), np.clip(v / r * 4 + 5.5, 0, 10.99)
    i, j = y.astype(int), x.astype(int)
    a, b = y - i, x - j
    top = padded[i, j] * (1 - b) + padded[i, j + 1] * b
    bottom = padded[i + 1, j] * (1 - b) + padded[i + 1, j + 1] * b
    return np.asarray(np.clip(1.3 * (top * (1 - a) + bottom * a), 0, 1), dtype=np.float32)


def _mask(thing: Thing, scans: Scans, rng: np.random.Generator) -> Float:
    """Coverage in 0 … 1 of the pixels of one cell, (CELL, CELL)."""
    angle = rng.uniform(-0.25, 0.25)
    r = rng.uniform(6.5, 8.0) if thing.size == "small" else rng.uniform(11.5, 13.5)
    room = CELL / 2 - r - 1
    dx, dy = rng.uniform(-room, room, 2)
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32) - (CELL - 1) / 2
    u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
    v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
    if thing.shape is None:
        of_label = np.flatnonzero(scans.labels == thing.digit)
        return _digit_mask(scans.images[rng.choice(of_label)], u, v, r)
    return np.asarray(np.clip(0.5 - _DISTANCE[thing.shape](u, v, r), 0, 1), dtype=np.float32)


def render(scene: Scene, scans: Scans) -> Image.Image:
    """The picture of a scene: RGB, SIZE × SIZE pixels. The same scene and scans give the same bytes."""
    rng = np.random.default_rng(scene.seed)
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = rng.uniform(0, 70, 3)
    for i, thing in scene.things():
        top, left = i // GRID * CELL, i % GRID * CELL
        mask = _mask(thing, scans, rng)[..., None]
        color = np.clip(np.array(COLORS[thing.color], np.float32) + rng.uniform(-15, 15, 3), 0, 255)
        cell = picture[top : top + CELL, left : left + CELL]
        cell += mask * (color.astype(np.float32) - cell)
    picture += rng.normal(0, 6, picture.shape).astype(np.float32)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
