"""Ternary weights in gap planes: packed, checked, saved (``docs/gap_planes.md`` describes every byte)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from effvlm._library import call_host

MAGIC, VERSION = 0x31504147, 1  # "GAP1"
TILE_ROWS, TILE_COLUMNS, BASE_STRIPS = 64, 256, 32
PARTS = {"header": torch.uint32, "data": torch.uint32, "tiles": torch.uint32, "base": torch.uint32,
         "scales": torch.bfloat16, "checksums": torch.uint32}  # fmt: skip
_HEADER_WORDS = 8


def strips(columns: int) -> list[tuple[int, int]]:
    """(first column, pitch) of every strip of a row: whole ones of 256, then 128, 64 and 32 for what is left."""
    units = -(-columns // 32)
    found = [(s * TILE_COLUMNS, TILE_COLUMNS) for s in range(units // 8)]
    at = units // 8 * TILE_COLUMNS
    for pitch in (128, 64, 32):
        if units * 32 & pitch:
            found.append((at, pitch))
            at += pitch
    return found


def _numbers(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Blocks of rows, strips, and bases per block."""
    count = len(strips(shape[-1]))
    return -(-shape[-2] // TILE_ROWS), count, -(-count // BASE_STRIPS)


def crc32(*parts: torch.Tensor) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().view(torch.uint8).numpy().data, value)
    return value


def _corrupt(text: str) -> ValueError:
    return ValueError(f"ternary: corrupt weights: {text}")


@dataclass(eq=False)
class TernaryWeight:
    """A matrix (R, C) of ternary weights with a scale per row, or a stack (E, R, C) of them, in gap planes.

    ``torch.load`` is never involved: :meth:`tensors` are plain tensors for safetensors, :meth:`from_tensors` reads them back,
    memory-mapped if they are. Each matrix is checked (checksum, then every entry) before it is first used.

    Attributes:
        header: (8,) uint32, magic, version, levels, dimensions, E, R, C and a checksum of these.
        data: (W,) uint32, the tiles and 16 words of zeros.
        tiles: (E, B, S, 2) uint32, the directory: blocks of 64 rows by strips of columns.
        base: (E·B·G + 1,) uint32, where in ``data`` the tiles of a block start, for every 32 strips.
        scales: (E, R) bfloat16.
        checksums: (E,) uint32, CRC-32 of each matrix.
        shape: (R, C), or (E, R, C).
        levels: 3 for −1, 0, 1; 5 for −2 … 2.
    """

    header: torch.Tensor
    data: torch.Tensor
    tiles: torch.Tensor
    base: torch.Tensor
    scales: torch.Tensor
    checksums: torch.Tensor
    _unchecked: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        dims, *sizes = self.header[3:7].tolist()
        self.shape, self.levels = torch.Size(sizes[3 - dims :]), int(self.header[2])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> TernaryWeight:
        """The weights that :meth:`tensors` gave; nothing but the header and the directory's shape is read yet.

        Raises:
            ValueError: a part is missing, of another dtype or shape, of a later version, or the header is damaged.
        """
        for name, dtype in PARTS.items():
            if name not in tensors:
                raise _corrupt(f"expected tensors {', '.join(PARTS)}, got no {name}")
            if tensors[name].dtype != dtype or not tensors[name].is_contiguous():
                raise _corrupt(f"expected {name} as contiguous {dtype}, got {tensors[name].dtype}")
        header = tensors["header"].cpu()
        if header.shape != (_HEADER_WORDS,) or (words := header.tolist())[0] != MAGIC:
            raise _corrupt("the header is not that of gap planes")
        if words[1] != VERSION:
            raise ValueError(f"ternary: expected gap planes of version {VERSION}, got {words[1]}; a newer effvlm reads them")
        if words[-1] != crc32(header[:-1]):
            raise _corrupt("the header's checksum is wrong")
        made = cls(*(tensors[name] for name in PARTS))
        made._unchecked = set(range(words[4]))
        made._check_shapes()
        return made

    def _check_shapes(self) -> None:
        _, _, levels, dims, E, R, C, _ = self.header.tolist()
        B, S, G = _numbers((R, C))
        expected = {"tiles": (E, B, S, 2), "base": (E * B * G + 1,), "scales": (E, R), "checksums": (E,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise _corrupt(f"expected {name} of shape {shape}, got {tuple(getattr(self, name).shape)}")
        if levels not in (3, 5) or dims not in (2, 3) or (dims == 2 and E != 1) or self.data.numel() < 16:
            raise _corrupt("the header's numbers make no sense")

    @property
    def device(self) -> torch.device:
        """Where the weights are; the header and the checksums stay on the CPU."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Of everything that is stored."""
        return 8 * self.nbytes / max(self.shape.numel(), 1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything there is to save."""
        return {name: getattr(self, name) for name in PARTS}

    def to(self, device: torch.device | str) -> TernaryWeight:
        """The same on another device, checked before it leaves the CPU."""
        if torch.device(device).type != "cpu":
            self.validate()
        moved = {n: getattr(self, n).to(device) for n in ("data", "tiles", "base", "scales")}
        other = TernaryWeight(**(self.tensors() | moved))
        other._unchecked = set(self._unchecked)
        return other

    def _matrix(self, e: int) -> tuple[torch.Tensor, ...]:
        B, _, G = _numbers(self.shape)
        base = self.base[e * B * G : (e + 1) * B * G + 1]
        # slices of an empty range are what an empty matrix has
        return self.data[int(base[0]) : int(base[-1])], self.tiles[e], base, self.scales[e]

    def validate(self, matrices: Iterable[int] | None = None) -> None:
        """Check all matrices, or some, that are not yet known to be right; about 1 GB/s of packed bytes per thread.

        Raises:
            ValueError: naming the matrix and what is wrong with it.
        """
        if not self._unchecked:
            return
        wanted = self._unchecked if matrices is None else self._unchecked & set(matrices)
        if wanted and self.data.device.type != "cpu":
            raise ValueError("ternary: expected weights on the CPU, where they are checked before they are moved")
        E, R, C = self.header[4:7].tolist()
        for e in sorted(wanted):
            if crc32(*self._matrix(e)) != int(self.checksums[e]):
                raise _corrupt(f"the checksum of matrix {e} is wrong")
            call_host("gap_planes_validate", self.data, self.tiles, self.base, E, R, C, self.levels, e, e + 1)
            self._unchecked.discard(e)


def _checked_input(trits: torch.Tensor, scales: torch.Tensor, levels: int) -> None:
    if not isinstance(trits, torch.Tensor) or trits.dtype != torch.int8 or trits.dim() not in (2, 3):
        what = f"{trits.dtype} {tuple(trits.shape)}" if isinstance(trits, torch.Tensor) else type(trits).__name__
        raise ValueError(f"ternary_pack: expected trits as int8 (R, C) or (E, R, C), got {what}")
    if levels not in (3, 5):
        raise ValueError(f"ternary_pack: expected levels 3 or 5, got {levels}")
    if not isinstance(scales, torch.Tensor) or scales.shape != trits.shape[:-1]:
        got = tuple(scales.shape) if isinstance(scales, torch.Tensor) else type(scales).__name__
        raise ValueError(f"ternary_pack: expected a scale per row, of shape {tuple(trits.shape[:-1])}, got {got}")
    if not bool(scales.isfinite().all()):
        raise ValueError("ternary_pack: expected finite scales, got NaN or infinity")
    if trits.device.type != "cpu" or scales.device.type != "cpu":
        raise ValueError(f"ternary_pack: expected tensors on the CPU, got {trits.device} and {scales.device}")


def ternary_pack(trits: torch.Tensor, scales: torch.Tensor, *, levels: int = 3) -> TernaryWeight:
    """Pack ternary weights below one bit each; the same bytes for the same weights, whatever the number of threads.

    Args:
        trits: (R, C) or (E, R, C) int8 in −1, 0, 1 (−2 … 2 with ``levels=5``), on the CPU.
        scales: (R,) or (E, R), stored as bfloat16: a weight is ``scale · trit``.
        levels: 3, or 5 for a magnitude bit per non-zero.

    Returns:
        The packed weights. Their size is within a few per cent of the entropy of the trits: Rice codes of the gaps between
        non-zeros, a sign each, about 100 bits per tile of 64 × 256 and 16 per row.

    Raises:
        ValueError: wrong shape, dtype or device, values outside the levels, scales that are not finite, over 16 GiB of data.
    """
    _checked_input(trits, scales, levels)
    stack = (trits if trits.dim() == 3 else trits[None]).contiguous()
    (E, R, C), (B, S, G) = stack.shape, _numbers(stack.shape)
    tiles = torch.empty(E, B, S, 2, dtype=torch.uint32)
    base = torch.empty(E * B * G + 1, dtype=torch.uint32)
    words = call_host("gap_planes_measure", stack, levels, tiles, base)
    data = torch.empty(words, dtype=torch.uint32)
    call_host("gap_planes_write", stack, levels, data, tiles, base)
    header = torch.tensor([MAGIC, VERSION, levels, trits.dim(), E, R, C, 0], dtype=torch.uint32)
    header[-1] = crc32(header[:-1])
    rounded = scales.to(torch.bfloat16).contiguous().view(E, R)
    weight = TernaryWeight(header, data, tiles, base, rounded, torch.empty(E, dtype=torch.uint32))
    for e in range(E):
        weight.checksums[e] = crc32(*weight._matrix(e))
    return weight
