"""B-VLLM's temporal merging (Lu et al., "B-VLLM: A Vision LLM with Balanced Spatio-Temporal Tokens", arXiv 2412.09919)."""

from __future__ import annotations

from dataclasses import dataclass

from effvlm.tokens.budgets import check_keep
from effvlm.tokens.merges import Frames
from effvlm.tokens.step import Step


@dataclass(frozen=True)
class BVLLM:
    """Frames that look alike are merged by repeated halving until a budget of frames is met. On still images this does nothing.

    The trained parts (frame selection by a Q-Former, spatial sampling) are not part of this.

    Args:
        keep: share of the frames to keep, in (0, 1].
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        check_keep("BVLLM", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Frames(self.keep)),)
