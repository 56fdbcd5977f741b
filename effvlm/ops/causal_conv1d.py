"""``causal_conv1d``: depthwise causal convolution with history, in place, for whole sequences and single steps."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? state, Tensor? cu_seqlens, bool silu) -> Tensor"
MAX_WIDTH = 16


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
) -> None:
    types = (x.dtype, torch.float32)
    B, D, _ = _shape("x", x, "BDL", FLOATS, x.device)
    rows, W = _shape("weight", weight, "DW", types, x.device)
    if rows != D or not 2 <= W <= MAX_WIDTH:
        raise ValueError(f"causal_conv1d: expected weight of shape (D, W) = ({D}, 2 … {MAX_WIDTH}), got {tuple(weight.shape)}")
    if bias is not None and _shape("bias", bias, "D", types, x.device) != (D,):
        raise ValueError(f"causal_conv1d: expected bias of shape (D,) = ({D},), got {tuple(bias.shape)}")
    S = B if cu_seqlens is None else _sequences(x, cu_seqlens)
    if state is not None:
        sequences, rows, M = _shape("state", state, "SDM", types, x.device)
        if sequences != S or rows != D or M < W - 1:
            raise ValueError(
                f"causal_conv1d: expected state of shape (S, D, M) = ({S}, {D}, {W - 1} or more), got {tuple(state.shape)}"
            )


def _shape(name: str, t: torch.Tensor, dims: str, types: tuple[torch.dtype, ...], device: torch.device) -> torch.Size:
    """The shape of a tensor as expected; a single step is short, and so are its checks."""
    shape = t.shape
    if len(shape) != len(dims) or t.dtype not in types or t.device != device:
        require_tensor("causal_conv1d", name, t, dims=dims, dtypes=types)
        raise TypeError(f"causal_conv1d: expected {name} on the device of x, {device}, got {t.device}")
    return shape


def _sequences(x: torch.Tensor, cu_seqlens: torch.Tensor) -> int:
    """How many there are."""
    _shape("cu_seqlens", cu_seqlens, "S", (torch.int32,), x.device)
    if x.shape[0] != 1:
        raise ValueError(f"causal_conv1d: expected B = 1 with cu_seqlens, got B = {x.shape[0]}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("causal_conv1d: expected cu_seqlens of shape (S+1,), which is at least (1,), got (0,)")
    if (
        DEBUG
        and x.is_cuda
        and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != x.shape[2] or bool((cu_seqlens.diff() < 0).any()))
    ):
        raise ValueError(f"causal_conv1d: expected cu_seqlens to ascend from 0 to L = {x.shape[2]}, got one that does not")
    return cu_seqlens.shape[0] - 1


def allocate(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
) -> Tensors:
    if x.shape[2] > 1 and x.stride(1) == 1:
        return (torch.empty_like(x.mT, memory_format=torch.contiguous_format).mT,)
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    silu: bool,
) -> Tensors:
    sums = torch.promote_types(x.dtype, torch.float32)
    D, W = weight.shape
    M = W - 1 if state is None else state.shape[2]
    bounds = [0, x.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    S = x.shape[0] if cu_seqlens is None else len(bounds) - 1
    before = x.new_zeros((S, D, M), dtype=sums) if state is None else state.to(sums)
    outs, after = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        history = before if cu_seqlens is None else before[i : i + 1]
        inputs = torch.cat([history, x[:, :, begin:end].to(sums)], -1)
        after.append(inputs[:, :, inputs.shape[2] - M :])
        if begin < end:
            windows = inputs[:, :, M - W + 1 :].unfold(2, W, 1)  # (B, D, end − begin, W)
            outs.append((windows * weight.to(sums)[:, None]).sum(-1))
    out = torch.cat(outs, 2) if outs else x.to(sums)
    if bias is not None:
        out = out + bias.to(sums)[:, None]
    out = (F.silu(out) if silu else out).to(x.dtype)
    out = out.mT.contiguous().mT if x.shape[2] > 1 and x.stride(1) == 1 else out.contiguous()
    return (out,) if state is None else (out, torch.cat([*after, before[:0]]).to(state.dtype))


_op = register("causal_conv1d", SCHEMA, check=check, allocate=allocate, reference=reference, needs_workspace=False)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution of any width from 2 to 16: prefill, prefill with history, and single steps are this one call.

    Equivalent to ``act(F.conv1d(F.pad(x, (W - 1, 0)), weight[:, None], bias, groups=D))``, with the last W−1 columns of ``state``
    in place of the zeros of the padding.

    Args:
        x: (B, D, L) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        weight: (D, W) or, as ``nn.Conv1d`` holds it, (D, 1, W), in the dtype of ``x`` or float32.
        bias: (D,) in the dtype of ``x`` or float32.
        state: (S, D, M), M ≥ W−1, in the dtype of ``x`` or float32: the inputs before the first one, newest last. Written in
            place: afterwards it holds the last M columns of ``[state, x]``. One per batch entry, or per packed sequence.
        cu_seqlens: (S+1,) int32 ascending from 0 to L, for B = 1: where sequences packed along L begin and end.
        activation: None, ``"silu"`` or ``"swish"`` (the same).

    Returns:
        (B, D, L) in the dtype of ``x``, D-contiguous if ``x`` is, else contiguous.

    Raises:
        ValueError: wrong rank or shape, unknown activation, or (on CPU) ``cu_seqlens`` that do not ascend from 0 to L.
        TypeError: wrong dtype, or tensors on different devices.

    Depthwise convolutions before the scan: Mamba (Gu and Dao, 2023); names as in the causal-conv1d package.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d: expected activation None, 'silu' or 'swish', got {activation!r}")
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    return _op(x, weight, bias, state, cu_seqlens, activation is not None)[0]
