"""``VisionScan2d``: Mamba's scan over a map of tokens in several directions at once (VMamba, MSVMamba)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, silu

from effvlm.ops.selective_scan import selective_scan
from effvlm.ops.traversals import Traversal, bidirectional, cross_scan, multi_scale_scan

Directions = Literal["cross", "bidirectional", "multi_scale"]
_PATHS: dict[str, Callable[[int, int], tuple[Traversal, ...]]] = {
    "cross": cross_scan,
    "bidirectional": lambda height, width: bidirectional(height * width),
    "multi_scale": lambda height, width: multi_scale_scan(height, width, -(-height // 2), -(-width // 2)),
}


class VisionScan2d(nn.Module):
    """SS2D: ``out = W_out(norm(Σ_k scan_k(silu(conv(x)))) ∘ silu(z))``, the directions k merged inside one scan.

    Parameters have VMamba's names and shapes, so that its checkpoints load.

    Args:
        dim: C, channels in and out.
        state_size: N, states per channel (VMamba: 16, later 1).
        expand: inner channels D per channel.
        dt_rank: R, rank of Δ; default ``ceil(dim / 16)``.
        conv_kernel: width of the depthwise convolution before the scan; 1 or less is none.
        directions: ``"cross"``, by rows and by columns, forward and backward (VMamba); ``"bidirectional"``, by rows forward and
            backward; ``"multi_scale"``, by rows over the whole map and in the other three directions over one of half the side,
            made by a depthwise convolution of stride 2, enlarged bilinearly and added (MSVMamba).
        bias: of the two projections.

    Sources: Liu et al. 2024 (VMamba), Shi et al. 2024 (MSVMamba).
    """

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        conv_kernel: int = 3,
        directions: Directions = "cross",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if directions not in _PATHS:
            raise ValueError(f"VisionScan2d: expected directions to be one of {', '.join(_PATHS)}, got {directions!r}")
        self.directions = directions
        inner, rank, N = int(expand * dim), dt_rank or math.ceil(dim / 16), state_size
        K = len(_PATHS[directions](1, 1))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv2d = _depthwise(inner, conv_kernel) if conv_kernel > 1 else None
        self.down = _depthwise(inner, 3, stride=2) if directions == "multi_scale" else None
        self.x_proj_weight = nn.Parameter(torch.randn(K, rank + 2 * N, inner) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.empty(K, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.exp(torch.empty(K, inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(K * inner, 1))
        self.Ds = nn.Parameter(torch.ones(K * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, height, width, C) → (B, height, width, C)."""
        B, height, width, _ = x.shape
        x, z = self.in_proj(x).chunk(2, -1)
        maps = x.permute(0, 3, 1, 2)
        maps = silu(maps if self.conv2d is None else self.conv2d(maps))
        u = maps.flatten(2)
        if self.down is not None:
            small = self.down(maps)
            u = torch.cat([u, small.flatten(2)], 2)
        y = self._scan(u, _PATHS[self.directions](height, width), height * width)
        if self.down is not None:
            whole, part = y[..., : height * width], y[..., height * width :].reshape(small.shape)
            y = whole + interpolate(part, (height, width), mode="bilinear").flatten(2)
        y = self.out_norm(y.mT).view(B, height, width, -1)
        return self.out_proj(y * silu(z))  # type: ignore[no-any-return]

    def _scan(self, u: torch.Tensor, paths: tuple[Traversal, ...], whole: int) -> torch.Tensor:
        """(B, D, L) → (B, D, L): Δ, B and C of every direction by position, so that nothing is permuted."""
        K, D, R = self.dt_projs_weight.shape
        N = self.A_logs.shape[1]
        tokens = u.mT  # (B, L, D)
        if self.down is None:
            low = tokens @ self.x_proj_weight.view(-1, D).mT  # (B, L, K·(R + 2N))
            low = low.unflatten(2, (K, R + 2 * N)).transpose(1, 2)
        else:  # the first direction walks the whole map only, the others the small one
            first = tokens[:, :whole] @ self.x_proj_weight[0].mT
            others = torch.einsum("bld,kcd->bklc", tokens[:, whole:], self.x_proj_weight[1:])
            rest = u.shape[2] - whole
            low = torch.cat([pad(first, (0, 0, 0, rest))[:, None], pad(others, (0, 0, whole, 0))], 1)
        dt, B, C = low.split([R, N, N], -1)  # (B, K, L, ·)
        delta = dt @ self.dt_projs_weight.mT
        return selective_scan(
            u,
            delta.mT,
            -self.A_logs.float().exp().view(K, D, N),
            B.mT,
            C.mT,
            self.Ds.float().view(K, D),
            None,
            self.dt_projs_bias.float(),
            True,
            traversals=paths,
        ).out


def _depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride=stride, padding=kernel // 2, groups=channels)
