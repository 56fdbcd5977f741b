"""``ternary_unpack``: gap planes back to one value per weight."""

from __future__ import annotations

import torch

from effvlm._library import Tensors, register, require_tensor
from effvlm.ops.ternary_weight import BASE_STRIPS, TILE_COLUMNS, TILE_ROWS, TernaryWeight, strips

SCHEMA = "(Tensor data, Tensor tiles, Tensor base, int R, int C, int levels) -> Tensor"


def check_planes(op: str, data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, R: int, C: int, levels: int) -> None:
    """Raise unless the tensors can be the gap planes of matrices (R, C)."""
    for name, tensor, dims in (("data", data, "W"), ("tiles", tiles, "EBST"), ("base", base, "N")):
        require_tensor(op, name, tensor, dims=dims, dtypes=(torch.uint32,))
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: expected contiguous {name}, got strides {tensor.stride()}")
        if tensor.device != data.device:
            raise TypeError(f"{op}: expected {name} on the device of data, {data.device}, got {tensor.device}")
    if levels not in (3, 5):
        raise ValueError(f"{op}: expected levels 3 or 5, got {levels}")
    E, B, S = tiles.shape[0], -(-R // TILE_ROWS), len(strips(C))
    count = E * B * -(-S // BASE_STRIPS) + 1
    if tiles.shape != (E, B, S, 2) or base.shape != (count,):
        raise ValueError(
            f"{op}: expected tiles of shape (E, B, S, 2) = {(E, B, S, 2)} and base of shape {(count,)} for {R} × {C}, "
            f"got {tuple(tiles.shape)} and {tuple(base.shape)}"
        )


def check(data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, R: int, C: int, levels: int) -> None:
    check_planes("ternary_unpack", data, tiles, base, R, C, levels)


def allocate(data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, R: int, C: int, levels: int) -> Tensors:
    return (torch.empty((tiles.shape[0], R, C), dtype=torch.int8, device=data.device),)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """Bytes as bits, lowest first."""
    return (data[:, None] >> torch.arange(8, device=data.device, dtype=torch.uint8) & 1).flatten().bool()


def _listed(tile: torch.Tensor, first: int, second: int, kind: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and values of a tile's entries."""
    count, k = first >> 16 & 0x3FFF, second >> 22 & 7
    planes = k + 1 + (kind == 1)
    size = planes * (count // 64 * 8 + -(-(count % 64) // 8))
    unary, rest = _bits(tile[: len(tile) - size]), tile[len(tile) - size :]
    ones = unary.nonzero().flatten()
    quotient = torch.diff(ones, prepend=ones.new_tensor([-1])) - 1
    whole = count // 64  # blocks of 64 entries, then one with what is left
    blocks = _bits(rest[: whole * planes * 8]).view(whole, planes, 64).transpose(0, 1).flatten(1)
    tail = _bits(rest[whole * planes * 8 :]).view(planes, -1)[:, : count % 64]
    plane = torch.cat([blocks, tail], 1).long()
    gap = (quotient << k) + (plane[:k] << torch.arange(k, device=tile.device)[:, None]).sum(0)
    size_of = ones.new_ones(count) if kind == 0 else plane[k + 1] + 1 if levels == 5 else 1 - plane[k + 1]
    return (gap + 1).cumsum(0) - 1, size_of * (1 - 2 * plane[k])


def _dense(tile: torch.Tensor, pitch: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    plane = [_bits(p).long() for p in tile.split(TILE_ROWS * pitch // 8)]
    at = plane[0].nonzero().flatten()
    return at, ((1 - 2 * plane[1]) * (1 + (plane[2] if levels == 5 else 0)))[at]


def reference(data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, R: int, C: int, levels: int) -> Tensors:
    (E, B, S, _), words, starts = tiles.shape, data.view(torch.uint8), base.long().tolist()
    out = torch.zeros(E, B * TILE_ROWS, len(strips(C)) and sum(p for _, p in strips(C)), dtype=torch.int8, device=data.device)
    entries, groups = tiles.long().flatten(0, 1).tolist(), -(-S // BASE_STRIPS)
    for block in range(E * B):
        for s, (column, pitch) in enumerate(strips(C)):
            group = block * groups + s // BASE_STRIPS
            first, second = entries[block][s]
            last = s == S - 1 or s % BASE_STRIPS == BASE_STRIPS - 1
            end = starts[group + 1] if last else starts[group] + (entries[block][s + 1][0] & 0xFFFF)
            tile, kind = words[4 * (starts[group] + (first & 0xFFFF)) : 4 * end], first >> 30
            at, value = _dense(tile, pitch, levels) if kind == 2 else _listed(tile, first, second, kind, levels)
            values = torch.zeros(TILE_ROWS * pitch, dtype=torch.int8, device=data.device)
            values[at] = value.to(torch.int8)
            row = block % B * TILE_ROWS
            out[block // B, row : row + TILE_ROWS, column : column + pitch] = values.view(TILE_ROWS, pitch)
    return (out[:, :R, :C].contiguous(),)


assert TILE_COLUMNS == 256  # columns are bytes everywhere
_op = register("ternary_unpack", SCHEMA, check=check, allocate=allocate, reference=reference)


def ternary_unpack(weight: TernaryWeight) -> torch.Tensor:
    """The trits that :func:`ternary_pack` was given.

    Args:
        weight: packed weights, on CPU or CUDA.

    Returns:
        int8 of ``weight.shape``, −1 … 1, or −2 … 2; multiply by ``weight.scales[..., None]`` for the weights themselves.

    Raises:
        ValueError: corrupt weights.
    """
    weight.validate()
    R, C = weight.shape[-2:]
    return _op(weight.data, weight.tiles, weight.base, R, C, weight.levels)[0].view(weight.shape)
