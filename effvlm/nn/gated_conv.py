"""``GatedConv``: HorNet's recursive gated convolution (gⁿConv)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class GatedConv(nn.Module):
    """Interactions of order n between tokens, by depthwise convolutions and gates: ``p ← W_k(p) ∘ q_k``, n times, in O(HW).

    Parameters have the names and shapes of HorNet's ``gnconv``, so that its checkpoints load.

    Args:
        dim: C, channels; a multiple of ``2 ** (order - 1)``.
        order: n, at least 1; the k-th interaction has ``dim / 2 ** (n - 1 - k)`` channels.
        kernel: width of the depthwise convolution.
        scale: of what the convolution returns (HorNet: 1/3 in places).
        filter: instead of the convolution: (channels) → a module from (B, channels, height, width) to the same, for instance a
            global filter.

    Source: Rao et al. 2022 (HorNet).
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        *,
        kernel: int = 7,
        scale: float = 1.0,
        filter: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(f"GatedConv: expected dim to be a multiple of 2 ** (order - 1), got dim = {dim} and order = {order}")
        self.dims = [dim // 2**i for i in reversed(range(order))]
        self.scale = scale
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.dwconv = filter(total) if filter else nn.Conv2d(total, total, kernel, padding=kernel // 2, groups=total)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims, self.dims[1:], strict=False))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) → (B, C, height, width)."""
        p, q = self.proj_in(x).split([self.dims[0], sum(self.dims)], 1)
        first, *others = (self.dwconv(q) * self.scale).split(self.dims, 1)
        p = p * first
        for widen, gate in zip(self.pws, others, strict=True):
            p = widen(p) * gate
        return self.proj_out(p)  # type: ignore[no-any-return]
