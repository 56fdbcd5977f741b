"""One stack of matrices to gap planes: batch after batch through the quantiser, packed as they come."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from effvlm.ops.ternary_weight import TernaryWeight, crc32, ternary_pack
from effvlm.quant import Quantized, TernaryRecipe, quantize
from effvlm.quant.quantizer import FIVE_FROM

DEFAULT_MEMORY = 1 << 30  # bytes that weights under way may take
PADDING = 16  # words of zeros behind the data
ROUNDING_BYTES, CALIBRATED_BYTES = 14, 64  # per weight under way, at most; measured
HESSIAN_BYTES = 24  # per entry of a Hessian under way

Read = Callable[[int, int], torch.Tensor]
Grams = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Stats:
    """What became of a stack's matrices, one entry each."""

    weight_error: list[float] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    starved: set[int] = field(default_factory=set)

    def add(self, made: Quantized, tokens: torch.Tensor | None, recipe: TernaryRecipe) -> None:
        """Matrices that follow those before."""
        first = len(self.methods)
        self.weight_error += made.weight_error.tolist()
        self.methods += made.method
        few = [] if tokens is None else (tokens < recipe.min_tokens).tolist()
        self.starved |= {first + i for i, starved in enumerate(few) if starved}
        for note, starved in zip(made.notes, few or [False] * len(made.notes), strict=True):
            if not starved:  # else the note says just that
                self.notes.update(part.rpartition(": ")[2] for part in note.split("; ") if part)  # without its figures


class Assembler:
    """Puts packed batches of matrices together; the result is what packing all at once gives, bit by bit.

    Args:
        shape: (E, R, C) of all.
        levels: 3 or 5, of all.
        sink: gets the words of data, in order.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, sink: Callable[[torch.Tensor], None]) -> None:
        self._sink, self._words, self._levels = sink, 0, levels
        self._header = ternary_pack(torch.zeros(shape[0], 0, 0, dtype=torch.int8), torch.zeros(shape[0], 0), levels=levels).header
        self._shape = shape
        self._parts: list[dict[str, torch.Tensor]] = []

    def add(self, trits: torch.Tensor, scales: torch.Tensor) -> None:
        """The next (B, R, C) trits and their (B, R) scales."""
        part = ternary_pack(trits, scales, levels=self._levels)
        own, base = part.data[:-PADDING], part.base.long()
        self._sink(own)
        moved = (base + self._words).to(torch.uint32)
        per = (len(base) - 1) // len(trits)
        sums = [
            crc32(own[int(base[e * per]) : int(base[(e + 1) * per])], part.tiles[e], moved[e * per : (e + 1) * per + 1],
                 part.scales[e])
            for e in range(len(trits))
        ]  # fmt: skip
        checksums = torch.tensor(sums, dtype=torch.int64).to(torch.uint32)
        self._parts.append({"tiles": part.tiles, "base": moved[:-1], "scales": part.scales, "checksums": checksums})
        self._words += len(own)

    def finish(self) -> dict[str, torch.Tensor]:
        """All tensors but ``data``, whose end goes to the sink."""
        self._sink(torch.zeros(PADDING, dtype=torch.uint32))
        made = {name: torch.cat([part[name] for part in self._parts]) for name in ("tiles", "scales", "checksums")}
        end = torch.tensor([self._words], dtype=torch.int64).to(torch.uint32)
        made["base"] = torch.cat([part["base"] for part in self._parts] + [end])
        made["header"] = self._header.clone()
        made["header"][4:7] = torch.tensor(self._shape, dtype=torch.int64).to(torch.uint32)
        made["header"][-1] = crc32(made["header"][:-1])
        return made

    @property
    def words(self) -> int:
        """Of the data, padding included."""
        return self._words + PADDING


def batch_of(shape: tuple[int, int, int], recipe: TernaryRecipe, max_memory: int, calibrated: bool) -> int:
    """How many matrices may be under way together.

    Raises:
        ValueError: not even one.
    """
    _, R, C = shape
    calibrated = calibrated and recipe.method != "rtn"
    each = R * C * (CALIBRATED_BYTES if calibrated else ROUNDING_BYTES) + (C * C * HESSIAN_BYTES if calibrated else 0)
    if each > max_memory:
        raise ValueError(
            f"compress: expected max_memory of at least {each / 1e6:.0f} MB, which one matrix of {R} × {C} takes, "
            f"got {max_memory / 1e6:.0f} MB"
        )
    return int(max_memory // each)


def compress_stack(
    name: str,
    read: Read,
    shape: tuple[int, int, int],
    recipe: TernaryRecipe,
    batch: int,
    sink: Callable[[torch.Tensor], None],
    *,
    grams: Grams | None = None,
    bits: torch.Tensor | None = None,
    done: Callable[[int], None] = lambda weights: None,
) -> tuple[dict[str, torch.Tensor], int, Stats]:
    """Quantise and pack a stack.

    Args:
        name: for errors.
        read: (begin, end) → (end − begin, R, C) floating point.
        shape: (E, R, C).
        recipe: how.
        batch: matrices under way together.
        sink: gets the words of ``data``.
        grams: (begin, end) → (B, C, C) Hessians and the (B,) tokens that they stand for.
        bits: (E,) bits per weight instead of the recipe's.
        done: called with the number of weights of each batch.

    Returns:
        All tensors but ``data``, the number of its words, and what became of the matrices.
    """
    E, R, C = shape
    recipe = _with_levels(name, read, shape, recipe, grams, bits)
    made, stats = Assembler(shape, 5 if recipe.levels == 5 else 3, sink), Stats()
    for begin in range(0, E, batch):
        end = min(begin + batch, E)
        one, tokens = _quantize(name, read, recipe, grams, bits, begin, end)
        made.add(one.trits.cpu(), one.scales.cpu())
        stats.add(one, tokens, recipe)
        done((end - begin) * R * C)
    return made.finish(), made.words, stats


def _quantize(
    name: str, read: Read, recipe: TernaryRecipe, grams: Grams | None, bits: torch.Tensor | None, begin: int, end: int
) -> tuple[Quantized, torch.Tensor | None]:
    hessian, tokens = grams(begin, end) if grams is not None else (None, None)
    target, weight = None if bits is None else bits[begin:end], read(begin, end)
    try:
        return quantize(weight, hessian, recipe, target, tokens), tokens
    except ValueError as error:  # numbers that are none, of a matrix counted from the first of these
        raise ValueError(f"compress: {name}, from expert {begin} on: {error}") from error


def _with_levels(
    name: str, read: Read, shape: tuple[int, int, int], recipe: TernaryRecipe, grams: Grams | None, bits: torch.Tensor | None
) -> TernaryRecipe:
    """A stack has one number of levels: five where all of it has the bits for them, and they suit its first matrix."""
    if recipe.levels != "auto":
        return recipe
    three, least = dataclasses.replace(recipe, levels=3), recipe.target_bits if bits is None else float(bits.min())
    if recipe.method == "minmax" or least < FIVE_FROM:  # tiles with few non-zeros are large by five levels
        return three
    quick = dataclasses.replace(recipe, sweeps=0, iterations=1)
    one = _quantize(name, read, quick, grams, bits, 0, 1)[0]
    return dataclasses.replace(recipe, levels=5) if int(one.trits.abs().max()) > 1 else three


def in_memory(tensors: dict[str, torch.Tensor], words: list[torch.Tensor]) -> TernaryWeight:
    """The weights whose data a list took."""
    parts: dict[str, Any] = {**tensors, "data": torch.cat(words)}
    return TernaryWeight(**parts)
