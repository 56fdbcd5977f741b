"""PruneVid's merging stage (Huang et al., arXiv 2412.16117). Built from the formulae alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effvlm.tokens.budgets import check_keep, kept
from effvlm.tokens.groups import Crop, Segments
from effvlm.tokens.merges import Centres, density_peaks
from effvlm.tokens.plan import Plan
from effvlm.tokens.scores import previous
from effvlm.tokens.step import Step
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class Static:
    """Frames fall into segments (density peaks of their means, each frame to its nearest peak, cut where that changes); within a
    segment, a place whose tokens are all more than ``threshold`` like the frame before becomes one token, their mean."""

    segments: float = 0.25
    threshold: float = 0.8
    needs = ()

    def plan(self, tokens: Tokens) -> Plan:
        frames = Segments.of(tokens, Crop())
        begins = self._begins(tokens, frames)
        before = previous(tokens, 1)
        cosine = torch.nn.functional.cosine_similarity(tokens.x.float(), tokens.x[before.clamp_min(0)].float(), dim=1)
        follows = (before >= 0) & ~begins[frames.label] & (cosine > self.threshold) & ~tokens.protected
        anchor = torch.arange(len(tokens), device=before.device)
        for f in range(frames.count):  # in order of frames, so that chains lead to their first token
            rows = frames.order[frames.start[f] : frames.start[f + 1]]
            anchor[rows] = torch.where(follows[rows], anchor[before[rows].clamp_min(0)], rows)
        return Plan.assigning(tokens, anchor)

    def _begins(self, tokens: Tokens, frames: Segments) -> torch.Tensor:
        """(frames,) bool: whether a segment begins with this frame."""
        means = frames.means(tokens.x)
        image = tokens.image()[frames.order[frames.start[:-1].long()]]
        begins = torch.ones(frames.count, dtype=torch.bool, device=means.device)
        for i in range(tokens.images):
            mine = (image == i).nonzero()[:, 0]
            if len(mine) > 1:
                peaks = density_peaks(means[mine], kept(self.segments, len(mine)), 5)
                cluster = torch.cdist(means[mine], means[mine[peaks]]).argmin(1)
                begins[mine[1:]] = cluster[1:] != cluster[:-1]
        return begins


@dataclass(frozen=True)
class PruneVid:
    """Static places are averaged over time within segments of a video; then density peaks of each frame, and what is nearest to
    them.

    The pruning by the language model's attention is not part of this. On still images only the second part works.

    Args:
        keep: share of each frame's tokens that become centres, in (0, 1]; the paper: 0.5.
        segments: peaks per frame that cut the video.
        threshold: cosine above which a token is static.
    """

    keep: float = 0.5
    segments: float = 0.25
    threshold: float = 0.8

    def __post_init__(self) -> None:
        check_keep("PruneVid", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Static(self.segments, self.threshold)), Step(Centres(self.keep, group=Crop())))
