"""``moe_ffn``: the feed-forward experts of a sparse mixture, for tokens that are already routed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weight, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "str act, bool gated, bool interleaved, float alpha, float limit, float offset) -> Tensor"
)
ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")


def check(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    offset: float,
) -> None:
    require_tensor("moe_ffn", "x", x, dims="TH", dtypes=FLOATS)
    require_tensor("moe_ffn", "ids", ids, dims="TK", dtypes=(torch.int64,))
    require_tensor("moe_ffn", "weight", weight, dims="TK", dtypes=(torch.float32,))
    require_tensor("moe_ffn", "up", up, dims="ERH", dtypes=(x.dtype,))
    require_tensor("moe_ffn", "down", down, dims="EOI", dtypes=(x.dtype,))
    (T, H), (E, R, _), (_, out, inner) = x.shape, up.shape, down.shape
    choices = (T, ids.shape[1])
    _check_one("ids", ids, "(T, K)", choices, x)
    _check_one("weight", weight, "(T, K)", choices, x)
    _check_one("up", up, "(E, 2·I, H)" if gated else "(E, I, H)", (E, 2 * inner if gated else inner, H), x)
    _check_one("down", down, "(E, O, I)", (E, out, inner), x)
    if up_bias is not None:
        require_tensor("moe_ffn", "up_bias", up_bias, dims="ER", dtypes=(x.dtype,))
        _check_one("up_bias", up_bias, "(E, R)", (E, R), x)
    if down_bias is not None:
        require_tensor("moe_ffn", "down_bias", down_bias, dims="EO", dtypes=(x.dtype,))
        _check_one("down_bias", down_bias, "(E, O)", (E, out), x)
    if act not in ACTS:
        raise ValueError(f"moe_ffn: expected act to be one of {', '.join(ACTS)}, got {act!r}")
    if not limit > 0:
        raise ValueError(f"moe_ffn: expected limit > 0 (infinity for none), got {limit}")
    if isinstance(T, int) and T * ids.shape[1] >= 2**31:
        raise ValueError(f"moe_ffn: expected fewer than 2**31 choices, got T·K = {T * ids.shape[1]}")
    if DEBUG and x.is_cuda and bool(((ids < -1) | (ids > E)).any()):
        raise ValueError(f"moe_ffn: expected expert ids in 0 … {E - 1}, or -1 or {E} to skip, got one outside")


def _check_one(name: str, tensor: torch.Tensor, letters: str, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"moe_ffn: expected {name} of shape {letters} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise TypeError(f"moe_ffn: expected {name} on the device of x, {x.device}, got {tensor.device}")


def allocate(x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, up: torch.Tensor, *rest: object) -> Tensors:
    down = rest[1]
    assert isinstance(down, torch.Tensor)
    return (x.new_empty((x.shape[0], down.shape[1])),)


def activation(x: torch.Tensor, act: str, alpha: float) -> torch.Tensor:
    """What ``act`` means."""
    if act == "silu":
        return x * torch.sigmoid(alpha * x)
    if act in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    if act == "identity":
        return x
    return torch.relu(x) ** (2 if act == "relu2" else 1)


def gate(rows: torch.Tensor, act: str, gated: bool, interleaved: bool, alpha: float, limit: float, offset: float) -> torch.Tensor:
    """(…, R) sums of the first product → (…, I)."""
    if not gated:
        return activation(rows, act, alpha)
    g, u = (rows[..., ::2], rows[..., 1::2]) if interleaved else rows.chunk(2, dim=-1)
    return activation(g.clamp(max=limit), act, alpha) * (u.clamp(-limit, limit) + offset)


def reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    offset: float,
) -> Tensors:
    out = x.new_zeros((x.shape[0], down.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(up.shape[0]):
        token, choice = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        up_e, down_e = up[e].to(x.dtype), down[e].to(x.dtype)  # one at a time: all experts are gigabytes
        rows = F.linear(x[token], up_e, None if up_bias is None else up_bias[e].to(x.dtype))
        hidden = gate(rows, act, gated, interleaved, alpha, limit, offset)
        made = F.linear(hidden, down_e, None if down_bias is None else down_bias[e].to(x.dtype))
        out = out.index_add(0, token, (made * weight[token, choice, None]).to(out.dtype))
    return (out.to(x.dtype),)


_op = register("moe_ffn", SCHEMA, check=check, allocate=allocate, reference=reference)


def moe_ffn(
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    act: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float = math.inf,
    offset: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of each token's experts; every expert that is needed is read once, in place.

    Equivalent to, for every token ``t``: the sum over its choices ``k`` of ``weight[t, k] * (down[e] @ h + down_bias[e])`` with
    ``e = ids[t, k]`` and ``h = gate(up[e] @ x[t] + up_bias[e])``. A gate multiplies the activated first half of the rows (every
    other row, when ``interleaved``) by the second: ``act(min(g, limit)) * (clamp(u, -limit, limit) + offset)``.

    Experts by kind of token or by task (vision and language experts of Mono-InternVL and VLMo) are ids from a mask,
    ``ids = is_image.long()[:, None]`` with weights of 1; :func:`effvlm.moe_route` makes learnt ones from a router's logits.

    Args:
        x: (T, H) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        ids: (T, K) int64, experts in 0 … E−1; −1 and E skip the choice.
        weight: (T, K) float32.
        up: (E, 2·I, H), or (E, I, H) without a gate, in the dtype of ``x``; any strides: pass transposed weights as a view.
        down: (E, O, I).
        up_bias: (E, 2·I) or (E, I).
        down_bias: (E, O).
        act: ``"silu"`` (g·σ(alpha·g)), ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` (squared relu) or
            ``"identity"`` (a mixture of LoRA experts: ``up`` (E, rank, H), ``down`` (E, O, rank), not gated).
        gated: whether ``up`` has gate and up rows.
        interleaved: whether they alternate (gpt-oss), instead of all gates first.
        alpha: inside the sigmoid of ``"silu"``.
        limit: clamps gate and up rows (gpt-oss, DeepSeek-V4); infinity for none.
        offset: added to the up rows (1 in gpt-oss).

    Returns:
        (T, O) in the dtype of ``x``.

    Raises:
        ValueError: wrong rank or shape, unknown ``act``, or (on CPU) an id outside −1 … E.
        TypeError: wrong dtype, or tensors on different devices.
    """
    return _op(x, ids, weight, up, up_bias, down, down_bias, act, gated, interleaved, alpha, limit, offset)[0]
