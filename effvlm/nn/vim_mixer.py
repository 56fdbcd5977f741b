"""``VimMixer``: Vision Mamba's bidirectional mixer."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import pad

from effvlm.ops.causal_conv1d import causal_conv1d
from effvlm.ops.selective_scan import selective_scan
from effvlm.ops.traversals import backward


class VimMixer(nn.Module):
    """Two Mamba scans over the tokens, one forward and one backward, each behind its own causal convolution, gated together.

    Parameters have the names and shapes of Vim's ``Mamba(bimamba_type="v2")``, so that its checkpoints load. The backward half
    reads the tokens in place: its convolution looks ahead, its scan starts at the end; nothing is flipped.

    Args:
        dim: C, channels in and out.
        state_size: N, states per channel.
        conv_kernel: width of the convolutions, 2 to 16.
        expand: inner channels per channel.
        dt_rank: rank of Δ; default ``ceil(dim / 16)``.
        halve: divide the sum of the two by 2 (Vim's ``if_divide_out``).

    Source: Zhu et al. 2024 (Vision Mamba).
    """

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        halve: bool = False,
    ) -> None:
        super().__init__()
        inner, rank, N = expand * dim, dt_rank or math.ceil(dim / 16), state_size
        self.halve = halve
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * N, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.log(torch.arange(1.0, N + 1)).repeat(inner, 1)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) → (B, L, C)."""
        u, z = self.in_proj(x).mT.chunk(2, 1)  # (B, D, L)
        y = self._half(u, z, "") + self._half(u, z, "_b")
        return self.out_proj(y.mT / 2 if self.halve else y.mT)  # type: ignore[no-any-return]

    def _half(self, u: torch.Tensor, z: torch.Tensor, suffix: str) -> torch.Tensor:
        conv, A_log = self.get_submodule(f"conv1d{suffix}"), self.get_parameter(f"A{suffix}_log")
        x_proj, dt_proj = self.get_submodule(f"x_proj{suffix}"), self.get_submodule(f"dt_proj{suffix}")
        assert isinstance(conv, nn.Conv1d)
        assert isinstance(dt_proj, nn.Linear)
        L = u.shape[2]
        if suffix:  # what a causal convolution of the flipped tokens is, without the flips
            ahead = conv.kernel_size[0] - 1
            u = causal_conv1d(pad(u, (0, ahead)), conv.weight[:, 0].flip(1), conv.bias, activation="silu")[..., ahead:]
        else:
            u = causal_conv1d(u, conv.weight[:, 0], conv.bias, activation="silu")
        R, N = dt_proj.in_features, A_log.shape[1]
        dt, B, C = x_proj(u.mT).split([R, N, N], -1)
        path = (1, L, 0, 0, 1)
        return selective_scan(
            u,
            (dt @ dt_proj.weight.mT).mT[:, None],
            -A_log.float().exp()[None],
            B.mT[:, None],
            C.mT[:, None],
            self.get_parameter(f"D{suffix}").float()[None],
            z,
            dt_proj.bias.float()[None],
            True,
            traversals=[backward(path) if suffix else path],
        ).out
