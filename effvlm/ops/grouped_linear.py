"""``grouped_linear``: each token through the linear layer that its id names."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor x, Tensor ids, Tensor weight, Tensor? bias) -> Tensor"


def check(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    require_tensor("grouped_linear", "x", x, dims="TC", dtypes=FLOATS)
    require_tensor("grouped_linear", "ids", ids, dims="T", dtypes=(torch.int64,))
    require_tensor("grouped_linear", "weight", weight, dims="EOC", dtypes=(x.dtype,))
    (T, C), (E, out, _) = x.shape, weight.shape
    parts = [("ids", ids, "(T,)", (T,)), ("weight", weight, "(E, O, C)", (E, out, C))]
    if bias is not None:
        require_tensor("grouped_linear", "bias", bias, dims="EO", dtypes=(x.dtype,))
        parts.append(("bias", bias, "(E, O)", (E, out)))
    for name, tensor, letters, shape in parts:
        if tensor.shape != shape:
            raise ValueError(f"grouped_linear: expected {name} of shape {letters} = {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise TypeError(f"grouped_linear: expected {name} on the device of x, {x.device}, got {tensor.device}")
    if isinstance(T, int) and T >= 2**31:
        raise ValueError(f"grouped_linear: expected fewer than 2**31 tokens, got T = {T}")
    if DEBUG and x.is_cuda and bool(((ids < -1) | (ids > E)).any()):
        raise ValueError(f"grouped_linear: expected ids in 0 … {E - 1}, or -1 or {E} to skip, got one outside")


def allocate(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Tensors:
    return (x.new_empty((x.shape[0], weight.shape[1])),)


def reference(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Tensors:
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    for e in range(len(weight)):
        (token,) = (ids == e).nonzero(as_tuple=True)
        made = F.linear(x[token], weight[e].to(x.dtype), None if bias is None else bias[e].to(x.dtype))
        out = out.index_copy(0, token, made)
    return (out,)


_op = register("grouped_linear", SCHEMA, check=check, allocate=allocate, reference=reference)


def grouped_linear(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``out[t] = weight[ids[t]] @ x[t] + bias[ids[t]]``: one of several linear layers per token, each of them read once.

    For layers chosen by a token's kind or task, where no token is computed by two of them: the q, k, v and output projections of
    a mixture of transformers, adapters and heads per modality or language. :func:`effvlm.moe_ffn` computes whole feed-forward
    experts in the same way, and with ``act="identity", gated=False`` a routed mixture of LoRA experts.

    Args:
        x: (T, C) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        ids: (T,) int64, layers in 0 … E−1; −1 and E give zeros.
        weight: (E, O, C) in the dtype of ``x``, any strides: pass transposed weights as a view.
        bias: (E, O).

    Returns:
        (T, O) in the dtype of ``x``.

    Raises:
        ValueError: wrong rank or shape, or (on CPU) an id outside −1 … E.
        TypeError: wrong dtype, or tensors on different devices.
    """
    return _op(x, ids, weight, bias)[0]
