"""``token_apply``: a sparse plan (CSR) applied to packed tokens."""

from __future__ import annotations

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, Tensor start, Tensor source, Tensor? weight, bool mean) -> Tensor"


def check(x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, weight: torch.Tensor | None, mean: bool) -> None:
    require_tensor("token_apply", "x", x, dims="NC", dtypes=FLOATS)
    require_tensor("token_apply", "start", start, dims="M", dtypes=(torch.int32,))
    require_tensor("token_apply", "source", source, dims="E", dtypes=(torch.int32,))
    N, E = x.shape[0], source.shape[0]
    if start.shape[0] < 1:
        raise ValueError("token_apply: expected start of shape (M+1,), which is at least (1,), got (0,)")
    if weight is not None:
        require_tensor("token_apply", "weight", weight, dims="E", dtypes=(torch.float32,))
        if weight.shape != source.shape:
            raise ValueError(f"token_apply: expected weight of the shape of source, ({E},), got {tuple(weight.shape)}")
    for name, t in (("start", start), ("source", source), ("weight", weight)):
        if t is not None and t.device != x.device:
            raise TypeError(f"token_apply: expected {name} on the device of x, {x.device}, got {t.device}")
    if N >= 2**31 or E >= 2**31:
        raise ValueError(f"token_apply: expected fewer than 2**31 tokens and sources, got N = {N}, E = {E}")
    if DEBUG and x.is_cuda:
        if int(start[0]) != 0 or int(start[-1]) != E or bool((start.diff() < 0).any()):
            raise ValueError(f"token_apply: expected start to ascend from 0 to E = {E}, got one that does not")
        if bool(((source < 0) | (source >= N)).any()):
            raise ValueError(f"token_apply: expected sources in 0 … {N - 1}, got one outside")


def allocate(x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, weight: torch.Tensor | None, mean: bool) -> Tensors:
    return (x.new_empty((start.shape[0] - 1, x.shape[1])),)


def reference(x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, weight: torch.Tensor | None, mean: bool) -> Tensors:
    M, E = start.shape[0] - 1, source.shape[0]
    sums = torch.promote_types(x.dtype, torch.float32)
    w = x.new_ones(E, dtype=sums) if weight is None else weight.to(sums)
    row = torch.repeat_interleave(torch.arange(M, device=x.device), start.diff())
    out = w.new_zeros((M, x.shape[1])).index_add(0, row, w[:, None] * x[source.long()].to(sums))
    if mean:
        total = w.new_zeros(M).index_add(0, row, w)[:, None]
        out = torch.where(total != 0, out / torch.where(total != 0, total, 1), 0)
    return (out.to(x.dtype),)


_op = register("token_apply", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_apply(
    x: torch.Tensor, start: torch.Tensor, source: torch.Tensor, *, weight: torch.Tensor | None = None, mean: bool = True
) -> torch.Tensor:
    """Apply a sparse plan to packed tokens: drop, gather, merge, pool and weighted sums are all this one call.

    The plan is a matrix of M rows in compressed (CSR) form: row ``m`` takes the tokens ``source[start[m]:start[m + 1]]``.
    Equivalent to, with ``e = slice(start[m], start[m + 1])`` and ``w = weight`` or ones::

        out[m] = (w[e, None] * x[source[e]]).sum(0) / (w[e].sum() if mean else 1)

    Args:
        x: (N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA; for instance the tokens of several images, packed.
        start: (M+1,) int32, ascending from 0 to E. An empty row is zeros.
        source: (E,) int32 in 0 … N−1. A token that no row names is dropped; one may serve several rows.
        weight: (E,) float32; default all ones.
        mean: divide by the sum of a row's weights (zeros where that is 0). A row of one source whose weight is not 0 then
            is that token, bit for bit; without ``mean``, one whose weight is 1.

    Returns:
        (M, C) in the dtype of ``x``; sums are float32, added in the order of the plan and rounded once.

    Raises:
        ValueError: wrong rank or shape, or (on CPU) ``start`` or ``source`` that are no plan for ``x``.
        TypeError: wrong dtype, or tensors on different devices.
    """
    return _op(x, start, source, weight, mean)[0]
