"""``token_similarity``: cosine similarity of pairs of rows, in one pass."""

from __future__ import annotations

import torch

from effvlm._library import FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor a, Tensor b) -> Tensor"


def check(a: torch.Tensor, b: torch.Tensor) -> None:
    require_tensor("token_similarity", "a", a, dims="NC", dtypes=FLOATS)
    require_tensor("token_similarity", "b", b, dims="NC", dtypes=FLOATS)
    if a.shape != b.shape:
        raise ValueError(f"token_similarity: expected b of the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"token_similarity: expected b of the dtype of a, {a.dtype}, got {b.dtype}")
    if a.device != b.device:
        raise TypeError(f"token_similarity: expected b on the device of a, {a.device}, got {b.device}")


def allocate(a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return (a.new_empty(a.shape[0], dtype=torch.float32),)


def reference(a: torch.Tensor, b: torch.Tensor) -> Tensors:
    sums = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(sums), b.to(sums)
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / torch.where(norms == 0, 1, norms)
    return (torch.where(norms == 0, 0, cosine).clamp(-1, 1),)


_op = register("token_similarity", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of ``a[n]`` and ``b[n]``, in one pass over both.

    Made for video: with ``x`` (frames · P, C), how much each patch is like itself one frame earlier is
    ``token_similarity(x[P:], x[:-P])``. Both are views, nothing is copied, and memory is read once.
    Equivalent to ``F.cosine_similarity(a.float(), b.float())``, but 0 where a norm is 0.

    Args:
        a: (N, C) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        b: (N, C), of the dtype and on the device of ``a``; may share its memory.

    Returns:
        (N,) float32 in -1 … 1. NaN or Inf in a row makes that row's similarity NaN, and no other.

    Raises:
        ValueError: wrong rank, or different shapes.
        TypeError: wrong or different dtypes or devices.
    """
    return _op(a, b)[0]
