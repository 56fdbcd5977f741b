"""What a reducer did: tokens in and out of every stage, and whether it did anything at all."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Stage:
    """One step of a recipe, over all images so far."""

    name: str
    at: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class Report:
    """Counts over all images that a reducer has seen.

    Attributes:
        images: images and videos.
        tokens_in: their visual tokens before, as the unreduced model counts them.
        tokens_out: and after.
        stages: the recipe's steps in order.
        encode_seconds: time in the vision tower and projector, reductions inside the tower included.
        reduce_seconds: time of everything else that reducing took.
        changed: images whose tokens were dropped or merged.
    """

    images: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    stages: list[Stage] = field(default_factory=list)
    encode_seconds: float = 0.0
    reduce_seconds: float = 0.0
    changed: int = 0

    @property
    def engaged(self) -> bool:
        """Whether any image was reduced: False is a recipe that did nothing, for instance a video method on still images."""
        return self.changed > 0 and 0 < self.tokens_out < self.tokens_in

    def __str__(self) -> str:
        lines = [
            f"{self.images} images: {self.tokens_in} → {self.tokens_out} visual tokens; encoding {self.encode_seconds:.3f} s, "
            f"reducing {self.reduce_seconds:.3f} s" + ("" if self.engaged or not self.images else "; NOTHING WAS REDUCED")
        ]
        lines += [f"  {s.at}: {s.name} {s.tokens_in} → {s.tokens_out}" for s in self.stages]
        return "\n".join(lines)
