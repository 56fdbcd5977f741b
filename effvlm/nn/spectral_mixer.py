"""``SpectralMixer``: a learned filter of frequencies over a map of tokens (SpectFormer, GFNet)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate


class SpectralMixer(nn.Module):
    """``irfft2(rfft2(x) ∘ W)``: one complex weight per frequency and channel, which is a convolution as wide as the map.

    The parameter has the name and shape of SpectFormer's and GFNet's filters, so that their checkpoints load.

    Args:
        dim: C, channels.
        height: of the map that the filter is stored for.
        width: likewise. Other maps get the filter interpolated bilinearly between frequencies, as GFNet does.

    Sources: Patro et al. 2023 (SpectFormer), Rao et al. 2021 (GFNet).
    """

    def __init__(self, dim: int, height: int, width: int) -> None:
        super().__init__()
        if min(dim, height, width) < 1:
            raise ValueError(f"SpectralMixer: expected positive sizes, got dim = {dim}, height = {height} and width = {width}")
        self.size = height, width
        self.complex_weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, L, C) → (B, L, C); the tokens are a map of ``size`` (default: the filter's), stored by rows.

        Raises:
            ValueError: L is not height · width.
        """
        height, width = size or self.size
        B, L, C = x.shape
        if height * width != L:
            raise ValueError(
                f"SpectralMixer: expected {height} · {width} = {height * width} tokens, got {L}; pass size=(height, width)"
            )
        # Half precision has no transform on the CPU; float32 costs little next to it.
        frequencies = torch.fft.rfft2(x.float().view(B, height, width, C), dim=(1, 2), norm="ortho")
        filtered = frequencies * torch.view_as_complex(self._weight(height, width))
        mixed: torch.Tensor = torch.fft.irfft2(filtered, s=(height, width), dim=(1, 2), norm="ortho")
        return mixed.reshape(B, L, C).to(x.dtype)

    def _weight(self, height: int, width: int) -> torch.Tensor:
        weight = self.complex_weight.float()
        if (height, width) == self.size:
            return weight
        flat = weight.permute(3, 2, 0, 1)  # (2, C, height, width / 2 + 1)
        resized: torch.Tensor = interpolate(flat, (height, width // 2 + 1), mode="bilinear", align_corners=True)
        return resized.permute(2, 3, 1, 0).contiguous()
