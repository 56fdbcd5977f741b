"""Bits that trits take in gap planes, without packing them: Rice codes (Rice, 1979) of gaps between non-zeros, tile by tile."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

ROWS, COLUMNS, NARROWEST = 64, 256, 32  # of a tile; what is left of a row is cut into strips of 128, 64 and 32
K_MAX = 5  # low bits of a gap, at most
MOST = (1 << 14) - 1  # entries of a tile, and unary bits
TILE_BITS, SCALE_BITS, BASE_BITS = 64, 16, 32  # a directory entry; a row's bfloat16; the start of 32 strips of 64 rows
AT_ONCE = 1 << 19  # weights looked at together: what fits a cache


def bits_per_weight(trits: torch.Tensor, *, smooth: bool = False) -> torch.Tensor:
    """What storing these trits takes, row scales and directory included.

    Each tile of 64 rows × 256 columns is read row by row as one sequence of gaps between non-zeros: ``gap >> k`` in unary, k
    low bits and a sign each, ``k`` in 0 … 5 chosen per tile; in tiles with a ±2, a magnitude bit too. Gaps over a whole row are
    bridged by entries without a weight, for which tiles of five levels have no room. A tile that is smaller as a bit map, or
    does not fit otherwise, is stored so.

    Args:
        trits: (B, R, C) int8 in −2 … 2; a matrix with a ±2 anywhere is stored in five levels.
        smooth: as if five levels had that room, for searches: a single bridge must not make the rate jump.

    Returns:
        (B,) float64, in bits per weight.

    Raises:
        ValueError: not three dimensions, or no weights.
    """
    if trits.dim() != 3 or trits.numel() == 0:
        raise ValueError(f"bits_per_weight: expected trits of shape (B, R, C) with weights, got {tuple(trits.shape)}")
    return torch.stack([_matrix_bits(one, smooth) for one in trits])


def overhead(R: int, C: int) -> float:
    """Bits per weight that an (R, C) matrix takes whatever its trits: row scales and directory."""
    blocks, strips = -(-R // ROWS), len(_strips(C))
    return (SCALE_BITS * R + blocks * (TILE_BITS * strips + BASE_BITS * -(-strips // 32))) / (R * C)


def code_rate(trits: torch.Tensor) -> torch.Tensor:
    """(B, R, C) int8 → (B,) float32, the smooth :func:`bits_per_weight` without :func:`overhead`: what searches follow."""
    return (bits_per_weight(trits, smooth=True) - overhead(*trits.shape[1:])).float()


def _strips(C: int) -> list[tuple[int, int]]:
    """(first column, width) of the strips of a row, in order."""
    whole, left = divmod(-(-C // NARROWEST) * NARROWEST, COLUMNS)
    widths = [COLUMNS] * whole + [width for width in (128, 64, 32) if left & width]
    return [(sum(widths[:s]), width) for s, width in enumerate(widths)]


def _matrix_bits(trits: torch.Tensor, smooth: bool) -> torch.Tensor:
    """(R, C) → () float64."""
    R, C = trits.shape
    five = bool(trits.amax() > 1) or bool(trits.amin() < -1)
    whole = C // COLUMNS * COLUMNS
    parts = [(0, whole, COLUMNS)] + [(at, at + width, width) for at, width in _strips(C) if at >= whole]
    total = torch.zeros((), dtype=torch.int64, device=trits.device)
    for rows in trits.split(max(1, AT_ONCE // (ROWS * C)) * ROWS):
        for begin, end, width in parts:
            if end > begin:
                total += _tiles_bits(_tiles(rows[:, begin:end], width), width, five, smooth)
    return total.double() / trits.numel() + overhead(R, C)


def _tiles(part: torch.Tensor, width: int) -> torch.Tensor:
    """(R, C) of strips of one width → (T, 64 · width), a tile per row, padded by zeros."""
    R, C = part.shape
    blocks, strips = -(-R // ROWS), -(-C // width)
    padded = pad(part, (0, strips * width - C, 0, blocks * ROWS - R))
    return padded.view(blocks, ROWS, strips, width).transpose(1, 2).reshape(-1, ROWS * width)


def _tiles_bits(tiles: torch.Tensor, width: int, five: bool, smooth: bool) -> torch.Tensor:
    """(T, 64 · width) → () int64 bits of the tiles' data, whole 32-bit words each."""
    T, L = tiles.shape
    place = tiles.flatten().nonzero()[:, 0]
    first = torch.arange(T + 1, device=tiles.device) * L
    at = torch.searchsorted(place, first)  # where each tile's non-zeros begin
    gap = place.diff(prepend=place.new_zeros(1)) - 1
    filled = at.diff() > 0
    begins = at[:-1][filled]
    gap[begins] = place[begins] - first[:-1][filled]
    count, planes = at.diff(), torch.ones_like(at[:-1])
    if five:
        planes += tiles.abs().amax(1) > 1
    dense = torch.zeros_like(filled)
    if bool((gap >= width).any()):
        gap, bridges = _bridged(gap, place % L, width)
        at = pad(bridges.add(1).cumsum(0), (1, 0))[at]
        bridged = at.diff() > count
        planes += bridged
        dense = bridged & (five and not smooth)
    return 8 * _least_bytes(gap, at, planes, dense, (3 if five else 2) * L // 8).sum()


def _least_bytes(
    gap: torch.Tensor, at: torch.Tensor, planes: torch.Tensor, dense: torch.Tensor, dense_bytes: int
) -> torch.Tensor:
    """(T,) int64: of tiles whose gaps are at[i] … at[i + 1] − 1, at the best k, or as a bit map."""
    count = at.diff()
    best = torch.full_like(count, dense_bytes)
    for k in range(K_MAX + 1):
        unary = count + pad((gap >> k).cumsum(0), (1, 0))[at].diff()
        lists = (k + planes) * (count // 64 * 8 + (count % 64 + 7) // 8)
        size = ((unary + 7) // 8 + lists + 3) // 4 * 4
        best = torch.where(dense | (unary > MOST), best, torch.minimum(best, size))
    return best


def _bridged(gap: torch.Tensor, place: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps with those over a row or more cut by entries without a weight, a row apart; and how many before each non-zero."""
    before = place - gap - 1
    rows = place // width - before.div(width, rounding_mode="floor")
    further = (place % width > before % width) & (rows > 0) & (width == COLUMNS)  # more than 256 places would be left
    bridges = (rows - 1 + further.long()).clamp(min=0)
    cut = torch.full((len(gap) + int(bridges.sum()),), width - 1, device=gap.device)
    cut[(bridges + 1).cumsum(0) - 1] = gap - width * bridges
    return cut, bridges
