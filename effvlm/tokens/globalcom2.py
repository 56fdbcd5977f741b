"""GlobalCom²: the thumbnail decides how much each crop keeps (Liu et al., arXiv 2501.05179)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from effvlm.tokens.budgets import check_keep
from effvlm.tokens.groups import Crop, Segments
from effvlm.tokens.signals import Attention, Signal
from effvlm.tokens.step import Select, Step
from effvlm.tokens.tokens import Tokens


@dataclass(frozen=True)
class ByThumbnail:
    """Crop 0 of each image is its thumbnail, the others tile it.

    The thumbnail keeps ``share`` of its tokens by CLS attention. Crop j keeps share · (1 + softmax_j(s_j / tau) − mean), where
    s_j is the
    thumbnail's attention that falls into it; inside a crop rank l2(own attention) + l2(thumbnail's attention, resized).
    """

    share: float = 0.25
    tau: float = 10.0
    attention: Attention = field(default_factory=lambda: Attention(-2))

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (self.attention,)

    def __call__(self, tokens: Tokens, taken: torch.Tensor) -> torch.Tensor:
        own = tokens.signal(self.attention).float().masked_fill(tokens.protected, 0)
        crops = Segments.of(tokens, Crop())
        first = crops.order[crops.start[:-1].long()]
        image, crop = tokens.image()[first], tokens.place[first, 0]
        there = self._resized(tokens, own)
        sums, ratio = crops.sums(there), torch.full((crops.count,), self.share, device=own.device)
        for i in range(tokens.images):
            tiles = (image == i) & (crop > 0)
            if bool(tiles.any()):
                part = (sums[tiles] / self.tau).softmax(0)
                ratio[tiles] = (self.share * (1 + part - part.mean())).clamp(0, 1)
        score = self._unit(own, crops) + self._unit(there, crops).where(tokens.place[:, 0] > 0, 0.0)
        score = score.masked_fill(tokens.protected, torch.inf).masked_fill(taken, -torch.inf)
        free = crops.sums(~tokens.protected)
        limit = (ratio * free + 0.5).floor().clamp_min(1).minimum(free) + crops.sums(tokens.protected)
        return crops.select(score, limit, "top").long()

    @staticmethod
    def _unit(score: torch.Tensor, crops: Segments) -> torch.Tensor:
        return score / crops.sums(score * score).sqrt().clamp_min(1e-12)[crops.label]

    @staticmethod
    def _resized(tokens: Tokens, attention: torch.Tensor) -> torch.Tensor:
        """(N,): for tokens of tiles, the thumbnail's attention at the same spot of the image, bilinear; 0 elsewhere.

        A tile token's ``place`` is in the grid of all tiles together, which spans what the thumbnail shows.
        """
        result = torch.zeros_like(attention)
        place, image = tokens.place.long(), tokens.image()
        for i in range(tokens.images):
            thumb = ((image == i) & (place[:, 0] == 0) & (place[:, 1] >= 0)).nonzero()[:, 0]
            tiles = ((image == i) & (place[:, 0] > 0) & (place[:, 1] >= 0)).nonzero()[:, 0]
            if not len(thumb) or not len(tiles):
                continue
            h, w = (int(place[thumb, d].max()) + 1 for d in (1, 2))
            grid = torch.zeros(h * w, device=attention.device)
            grid[place[thumb, 1] * w + place[thumb, 2]] = attention[thumb]
            high, wide = (int(place[tiles, d].max()) + 1 for d in (1, 2))
            large = torch.nn.functional.interpolate(grid.view(1, 1, h, w), (high, wide), mode="bilinear")[0, 0]
            result[tiles] = large[place[tiles, 1], place[tiles, 2]]
        return result


@dataclass(frozen=True)
class GlobalCom2:
    """Pruning of any-resolution images, guided by the thumbnail. Images without crops: the most CLS attention.

    Args:
        keep: share of the tokens to keep, in (0, 1]; the paper's default is 0.25.
        tau: temperature of the shares among crops.
        layer: whose CLS attention.
    """

    keep: float = 0.25
    tau: float = 10.0
    layer: int | float = -2

    def __post_init__(self) -> None:
        check_keep("GlobalCom2", self.keep)

    def steps(self) -> tuple[Step, ...]:
        return (Step(Select(ByThumbnail(self.keep, self.tau, Attention(self.layer)))),)
