"""What a pass did, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One module of experts.

    Attributes:
        name: of the module.
        experts: how many it has.
        weights: in all its compressed stacks.
        bytes_before, bytes_after: of these stacks.
        weight_error: ‖W − Q‖² / ‖W‖², the mean over its matrices.
        output_error: ‖y − y'‖ / ‖y‖ of the module's output on calibration tokens; None without any.
        methods: how many matrices by each method.
        starved: experts that too few calibration tokens chose, and that were rounded to nearest.
        notes: what else did not go as asked → how many matrices.
    """

    name: str
    experts: int
    weights: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None = None
    methods: Mapping[str, int] = field(default_factory=dict)
    starved: tuple[int, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Of all that is stored for these weights."""
        return 8 * self.bytes_after / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """From JSON."""
        given = {name: value for name, value in values.items() if name != "bits_per_weight"}
        return cls(**(given | {"starved": tuple(given.get("starved", ()))}))


@dataclass(frozen=True)
class CompressReport:
    """What :func:`effvlm.compress` did; ``print`` it for a table.

    Attributes:
        layers: compressed modules.
        left_alone: name of each module of experts that was not → why.
        bytes_before, bytes_after: of the whole model.
        peak_memory: most bytes that the process ever had in memory.
        seconds: that the call took; resumed work counts what was left of it.
        out: where the model was written; None if it was not.
    """

    layers: list[LayerReport]
    left_alone: dict[str, str]
    bytes_before: int
    bytes_after: int
    peak_memory: int
    seconds: float
    out: str | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the whole model is."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"layers": [layer.to_dict() for layer in self.layers], "ratio": self.ratio}

    def __str__(self) -> str:
        heads = ("layer", "experts", "bits/weight", "output error", "weight error", "method")
        rows = [heads, *(row(layer) for layer in self.layers)]
        widths = [max(len(r[i]) for r in rows) for i in range(len(heads))]
        lines = ["  ".join(c.ljust(w) if i in (0, 5) else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
                 for r in rows]  # fmt: skip
        lines += [f"{name}: left as it was: {why}" for name, why in self.left_alone.items()]
        notes = sum((Counter(layer.notes) for layer in self.layers), Counter[str]())
        lines += [f"{count} matrices: {note}" for note, count in sorted(notes.items())]
        return "\n".join([line.rstrip() for line in lines] + [self.summary()])

    def summary(self) -> str:
        """The totals in a line."""
        before, after = (sum(getattr(layer, f"bytes_{when}") for layer in self.layers) for when in ("before", "after"))
        return (
            f"experts {size(before)} → {size(after)}, model {size(self.bytes_before)} → {size(self.bytes_after)} "
            f"({self.ratio:.1f}× smaller), {self.seconds:.1f} s, peak memory {size(self.peak_memory)}"
        )


def row(layer: LayerReport) -> tuple[str, ...]:
    """A layer's line in a table."""
    methods = ", ".join(f"{name} {count}" for name, count in Counter(layer.methods).most_common())
    words = [methods] + ([f"{len(layer.starved)} starved"] if layer.starved else [])
    output = "" if layer.output_error is None else f"{100 * layer.output_error:.1f} %"
    bits, lost = f"{layer.bits_per_weight:.3f}", f"{100 * layer.weight_error:.1f} %"
    return layer.name, str(layer.experts), bits, output, lost, "; ".join(words)


def size(count: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"
