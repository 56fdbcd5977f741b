"""Compressed weights of experts inside a model: a module of buffers in the place of a parameter."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from effvlm.ops.ternary_matmul import ternary_matmul
from effvlm.ops.ternary_weight import BASE_STRIPS, PARTS, TILE_ROWS, TernaryWeight, strips

ACTIVATIONS = ("exact", "int8")
RECENT = 64  # calls after which a matrix that was not used may have been dropped from memory


def _system_call() -> Callable[[int, int, int], int] | None:
    """``madvise``, where there is one."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return cast(Callable[[int, int, int], int], call)


_advise = _system_call()


def _will_need(address: int, size: int) -> None:
    if _advise is not None:
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(begin, address + size - begin, mmap.MADV_WILLNEED)


@dataclass
class _Mapped:
    """Where matrices are in memory (``ends`` of words after ``start``), and at which of all ``calls`` each was last used."""

    start: int
    ends: list[int]
    used: list[int]
    calls: int = 0

    def need(self, e: int) -> None:
        """A matrix is about to be read."""
        if 0 <= e < len(self.used):
            if self.calls - self.used[e] > RECENT:
                _will_need(self.start + 4 * self.ends[e], 4 * (self.ends[e + 1] - self.ends[e]))
            self.used[e] = self.calls


class Planes(torch.nn.Module):
    """A stack (E, R, C) of ternary matrices; state-dict names are those of :meth:`TernaryWeight.tensors`.

    Args:
        weight: (E, R, C), or the tensors of one, kept as they are: views of a memory-mapped file stay views.
        activations: what :func:`effvlm.ternary_matmul` does with its input, ``"exact"`` or ``"int8"``.
    """

    _is_hf_initialized = True  # transformers' initialisation looks at what it finds under a parameter's name
    dtype = "ternary"  # what effvlm.enable says of a weight that it cannot read
    header: torch.Tensor
    data: torch.Tensor
    tiles: torch.Tensor
    base: torch.Tensor
    scales: torch.Tensor
    checksums: torch.Tensor

    def __init__(self, weight: TernaryWeight | Mapping[str, torch.Tensor], activations: str = "exact") -> None:
        super().__init__()
        self.activations = activations
        self._weight = weight if isinstance(weight, TernaryWeight) else None
        self._mapped = _Mapped(0, [], [])
        for name, tensor in (weight.tensors() if isinstance(weight, TernaryWeight) else weight).items():
            self.register_buffer(name, tensor)

    @classmethod
    def empty(cls, sizes: tuple[int, int, int, int], activations: str = "exact") -> Planes:
        """On the meta device, for a loader to fill: E, R, C and the number of words of ``data``."""
        E, R, C, words = sizes
        blocks, count = -(-R // TILE_ROWS), len(strips(C))
        shapes = {
            "header": (8,),
            "data": (words,),
            "tiles": (E, blocks, count, 2),
            "base": (E * blocks * -(-count // BASE_STRIPS) + 1,),
            "scales": (E, R),
            "checksums": (E,),
        }
        return cls({name: torch.empty(shapes[name], dtype=PARTS[name], device="meta") for name in PARTS}, activations)

    @property
    def mT(self) -> Planes:  # noqa: N802 - a parameter's name for it
        """Itself: the matrices are (R, C) however the module stored them."""
        return self

    @property
    def weight(self) -> TernaryWeight:
        """The buffers as the kernels want them; matrices are checked before their first use.

        Raises:
            ValueError: the buffers are no weights (nothing was loaded into them, or they are damaged).
        """
        if self._weight is None or self._weight.data is not self.data:
            self._weight = self._assembled()
        return self._weight

    def _assembled(self) -> TernaryWeight:
        on_cpu = {name: getattr(self, name).cpu() for name in PARTS}
        made = TernaryWeight.from_tensors(on_cpu)
        if self.data.device.type == "cpu":
            return made
        made.validate()  # somebody moved the buffers unchecked
        self.header, self.checksums = on_cpu["header"], on_cpu["checksums"]
        return TernaryWeight(*(getattr(self, name) for name in PARTS))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What :meth:`empty` takes."""
        E, R, C = self.weight.header[4:7].tolist()
        return E, R, C, self.data.numel()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(T, C) tokens through the matrices that (T, K) int64 ids name → (T, K, R); ids −1 and E give zeros."""
        return ternary_matmul(x, self.weight, self.activations, ids=ids)

    def prefetch(self, ids: torch.Tensor) -> None:
        """Have the system read the matrices that a call will need, if their file is mapped: these bytes, all at once.

        Page faults would fetch them one after the other, each with what lies around it, which for a model larger than memory
        is most of what is read. Matrices that a recent call used are taken to be in memory.
        """
        if self.data.device.type != "cpu" or _advise is None or torch.compiler.is_compiling():
            return
        if self._mapped.start != self.data.data_ptr():
            for name in ("tiles", "base", "scales", "checksums"):
                tensor = self.get_buffer(name)
                _will_need(tensor.data_ptr(), tensor.numel() * tensor.element_size())
            ends = self.base[:: max((len(self.base) - 1) // max(len(self.checksums), 1), 1)].tolist()
            self._mapped = _Mapped(self.data.data_ptr(), ends, [-RECENT] * len(self.checksums))
        self._mapped.calls += 1
        for e in set(ids.flatten().tolist()):
            self._mapped.need(e)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """(E, R, C), matrix by matrix, so that little more than the result is needed."""
        weight, (E, R, C, _) = self.weight, self.sizes
        weight.validate()
        per = (len(weight.base) - 1) // max(E, 1)
        out = torch.empty(E, R, C, dtype=dtype, device=self.data.device)
        for e in range(E):
            base = weight.base[e * per : (e + 1) * per + 1]
            trits = torch.ops.effvlm.ternary_unpack(weight.data, weight.tiles[e : e + 1], base, R, C, weight.levels)[0]
            out[e] = trits.float() * weight.scales[e, :, None].float()
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Planes:
        """Devices are followed, dtypes are not: scales stay bfloat16, header and checksums on the CPU."""
        now = fn(torch.empty(0, dtype=torch.uint32, device=self.data.device)).device
        if now != self.data.device:
            moved = self.weight.to(now) if now.type != "meta" else None
            for name in PARTS:
                setattr(self, name, getattr(moved, name) if moved else getattr(self, name).to(now))
            self._weight = moved
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: Any
    ) -> None:
        """Tensors are taken, not copied into ours: ``data`` has another length for other weights."""
        for name in PARTS:
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name])
            elif strict:
                missing.append(prefix + name)
        if strict:
            known = {prefix + name for name in PARTS}
            unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        self._weight = None

    def extra_repr(self) -> str:
        """Shape and rate."""
        if self.data.is_meta:
            return "not loaded"
        E, R, C, _ = self.sizes
        return f"{E} × {R} × {C}, {self.weight.bits_per_weight:.2f} bits per weight, {self.activations} activations"
