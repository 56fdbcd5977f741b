"""``ternary_matmul``: tokens times compressed matrices, which are never unpacked."""

from __future__ import annotations

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor
from effvlm.ops.ternary_unpack import check_planes
from effvlm.ops.ternary_unpack import reference as unpacked
from effvlm.ops.ternary_weight import TernaryWeight, strips

SCHEMA = "(Tensor x, Tensor ids, Tensor data, Tensor tiles, Tensor base, Tensor scales, int levels, bool int8) -> Tensor"
MAX_INT8_COLUMNS = 2**16  # 255 · 127 · C stays below 2^31
SMALLEST = 1e-33  # tokens whose values are all below this count as zeros in int8


def check(
    x: torch.Tensor, ids: torch.Tensor, data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, scales: torch.Tensor,
    levels: int, int8: bool,
) -> None:  # fmt: skip
    require_tensor("ternary_matmul", "x", x, dims="TC", dtypes=FLOATS)
    require_tensor("ternary_matmul", "ids", ids, dims="TK", dtypes=(torch.int64,))
    require_tensor("ternary_matmul", "scales", scales, dims="ER", dtypes=(torch.bfloat16,))
    (T, C), (E, R) = x.shape, scales.shape
    check_planes("ternary_matmul", data, tiles, base, R, C, levels)
    if ids.shape[0] != T:
        raise ValueError(f"ternary_matmul: expected ids of shape (T, K) with T = {T}, got {tuple(ids.shape)}")
    if tiles.shape[0] != E:
        raise ValueError(f"ternary_matmul: expected scales for E = {tiles.shape[0]} matrices, got {E}")
    for name, tensor in (("ids", ids), ("data", data), ("scales", scales)):
        if tensor.device != x.device:
            raise TypeError(f"ternary_matmul: expected {name} on the device of x, {x.device}, got {tensor.device}")
    if int8 and C > MAX_INT8_COLUMNS:
        raise ValueError(f"ternary_matmul: expected at most {MAX_INT8_COLUMNS} columns with int8 activations, got {C}")
    if isinstance(T, int) and T * ids.shape[1] >= 2**31:
        raise ValueError(f"ternary_matmul: expected fewer than 2**31 choices, got {T} × {ids.shape[1]}")
    if DEBUG and x.is_cuda and bool(((ids < -1) | (ids > E)).any()):
        raise ValueError(f"ternary_matmul: expected ids in 0 … {E - 1}, or -1 or {E} to skip, got one outside")


def allocate(x: torch.Tensor, ids: torch.Tensor, data: torch.Tensor, *rest: object) -> Tensors:
    return (x.new_empty((*ids.shape, rest[2].shape[1])),)  # type: ignore[attr-defined]


def quantize(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as whole numbers: (m·q (T, C) float64, S (T,) float32) with x ≈ S · m·q; see ternary_matmul.h."""
    x, limit, top = x.float(), 127.0 if levels == 3 else 63.0, 255.0
    most = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    plain = (most >= SMALLEST) & most.isfinite()
    unit = torch.where(plain, most / (limit * top), torch.where(most < SMALLEST, 0.0, torch.nan))
    inverse = torch.where(plain, top / most, 0.0)
    whole = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for first, pitch in strips(x.shape[1]):
        part = x[:, first : first + pitch]
        m = (part.abs().amax(1) * inverse).ceil().clamp(1, top)
        scale = torch.where(plain, 1 / (m * unit), 0.0)
        q = (part.nan_to_num(0, 0, 0) * scale[:, None]).round().clamp(-limit, limit)
        whole[:, first : first + pitch] = torch.where(plain[:, None], q.double() * m[:, None].double(), 0.0)
    return whole, unit


def reference(
    x: torch.Tensor, ids: torch.Tensor, data: torch.Tensor, tiles: torch.Tensor, base: torch.Tensor, scales: torch.Tensor,
    levels: int, int8: bool,
) -> Tensors:  # fmt: skip
    (T, C), (E, R) = x.shape, scales.shape
    trits = unpacked(data, tiles, base, R, C, levels)[0]
    out = x.new_zeros((T, ids.shape[1], R))
    values, unit = quantize(x, levels) if int8 else (x, x.new_ones(T, dtype=torch.float64 if x.dtype == torch.float64 else None))
    for e in range(E):
        t, k = (ids == e).nonzero(as_tuple=True)
        scale = scales[e].to(unit.dtype) * unit[t, None]
        made = (values[t] @ trits[e].to(values.dtype).T).to(unit.dtype) * scale
        out = out.index_put((t, k), made.to(x.dtype))
    return (out,)


_op = register("ternary_matmul", SCHEMA, check=check, allocate=allocate, reference=reference)


def ternary_matmul(
    x: torch.Tensor, w: TernaryWeight, activations: str = "exact", *, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ W.T`` with compressed ternary weights, decoded on the fly; of a stack, each token with the matrices its ids name.

    Args:
        x: (T, C) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        w: (R, C), or (E, R, C) with ``ids``, from :func:`ternary_pack`.
        activations: ``"exact"``: x as it is, sums in float32. ``"int8"``: x rounded to int8 with a step per 256 columns (relative
            error about 0.5 %), sums exact; about 1.5 times as fast with VNNI, and the same bits on every machine.
        ids: (T,) or (T, K) int64, matrices in 0 … E−1; −1 and E give zeros.

    Returns:
        (T, R), or (T, K, R) for ids (T, K), in the dtype of ``x``.

    Raises:
        ValueError: wrong shape, corrupt weights, unknown activations, or (on CPU) an id outside −1 … E.
        TypeError: wrong dtype, or tensors on different devices.
    """
    if not isinstance(w, TernaryWeight):
        raise TypeError(f"ternary_matmul: expected w to be a TernaryWeight (from ternary_pack), got {type(w).__name__}")
    if activations not in ("exact", "int8"):
        raise ValueError(f"ternary_matmul: expected activations 'exact' or 'int8', got {activations!r}")
    require_tensor("ternary_matmul", "x", x, dims="TC", dtypes=FLOATS)
    if (ids is None) != (len(w.shape) == 2):
        raise ValueError(f"ternary_matmul: expected ids with a stack (E, R, C), and only then, got w of shape {tuple(w.shape)}")
    if x.shape[1] != w.shape[-1]:
        raise ValueError(f"ternary_matmul: expected x of shape (T, C) with C = {w.shape[-1]}, got {tuple(x.shape)}")
    if w._unchecked and not torch.compiler.is_compiling():
        w.validate(None if ids is None else ids.unique().tolist())
    chosen = x.new_zeros((x.shape[0], 1), dtype=torch.int64) if ids is None else ids
    if chosen.dim() == 1:
        chosen = chosen[:, None]
    out = _op(x, chosen, w.data, w.tiles, w.base, w.scales, w.levels, activations == "int8")[0]
    return out if ids is not None and ids.dim() == 2 else out[:, 0]
