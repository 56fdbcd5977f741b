"""Kinds of token tensors: (B, N, C) float32 from a generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Make = Callable[[int, int, int, torch.Generator], torch.Tensor]


def _gauss(B: int, N: int, C: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(B, N, C, generator=g)


def _image(B: int, N: int, C: int, g: torch.Generator) -> torch.Tensor:
    """As a ViT's features: a large common part, neighbours alike, some noise."""
    side = int(max(N, 1) ** 0.5) + 1
    coarse = torch.randn(B, max(C, 1), side // 3 + 1, side // 3 + 1, generator=g)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)[:, :N, :C]
    return (smooth + 0.3 * torch.randn(B, N, C, generator=g) + 2 * torch.randn(C, generator=g)).contiguous()


def _duplicates(B: int, N: int, C: int, g: torch.Generator) -> torch.Tensor:
    """Few distinct tokens, so that ties are the rule."""
    return torch.randn(B, 5, C, generator=g)[:, torch.randint(5, (N,), generator=g)]


def _integers(B: int, N: int, C: int, g: torch.Generator) -> torch.Tensor:
    """Small integers: every product and sum is exact in float32, in any order."""
    return torch.randint(-3, 4, (B, N, C), generator=g).float()


def _norms(B: int, N: int, C: int, g: torch.Generator) -> torch.Tensor:
    """Norms over six orders of magnitude, every seventh token zero."""
    x = torch.randn(B, N, C, generator=g) * 10 ** (6 * torch.rand(B, N, 1, generator=g) - 3)
    x[:, ::7] = 0
    return x


DATA: dict[str, Make] = {
    "gauss": _gauss,
    "image": _image,
    "duplicates": _duplicates,
    "integers": _integers,
    "norms": _norms,
}
