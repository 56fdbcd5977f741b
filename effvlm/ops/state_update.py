"""``state_update``: one decode step of a recurrent matrix or diagonal state, in place (Mamba, Mamba-2, gated delta rule, KDA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effvlm._library import FLOATS, Tensors, register, require_tensor

SCHEMA = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor? A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? beta, bool dt_softplus, bool l2norm, float scale) -> Tensor"
)
MAX_N = 1024


def check(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    beta: torch.Tensor | None,
    dt_softplus: bool,
    l2norm: bool,
    scale: float,
) -> None:
    device, heads = x.device, state.dim() == 4
    sizes = _shape("state", state, "SHPN" if heads else "SPN", FLOATS, device)
    S, H, N = sizes[0], sizes[1] if heads else 1, sizes[-1]
    if N > MAX_N:
        raise ValueError(f"state_update: expected N of at most {MAX_N}, got {N}")
    same = (x.dtype,) if x.dtype in FLOATS else FLOATS
    either = (x.dtype, torch.float32)
    rows, per_row = ("SHP", sizes[:3]) if heads else ("SP", sizes[:2])
    _expect("x", x, rows, per_row, same, device)
    _expect("dt", dt, *_decay_sizes(dt, rows, sizes, beta is not None), either, device)
    groups, rest = ("SGN", (S, B.shape[1] if B.dim() == 3 else 1, N)) if heads else ("SN", (S, N))
    _expect("B", B, groups, rest, same, device)
    if heads and H and (not rest[1] or H % rest[1]):
        raise ValueError(f"state_update: expected B of shape (S, G, N) with G a divisor of H = {H}, got {tuple(B.shape)}")
    _expect("C", C, groups, rest, same, device)
    for name, t in (("A", A), ("dt_bias", dt_bias), ("D", D)):
        if t is not None:
            full = name == "A" or (name == "dt_bias" and t.dim() == len(sizes) - 1)
            _expect(name, t, rows[1:] + "N" if full else rows[1:], sizes[1:] if full else per_row[1:], either, device)
    if z is not None:
        _expect("z", z, rows, per_row, same, device)
    if beta is not None:
        _expect("beta", beta, "SH", (S, H), either, device)


def _decay_sizes(dt: torch.Tensor, rows: str, sizes: tuple[int, ...], delta: bool) -> tuple[str, tuple[int, ...]]:
    """Letters and sizes of dt, by its rank: those of the state, of its rows, or, for the delta rule, of its heads."""
    rank = dt.dim()
    if rank == len(sizes):
        return rows + "N", sizes
    if delta and rank in (2, 3):
        return ("SH", sizes[:2]) if rank == 2 else ("SHN", (*sizes[:2], sizes[3]))
    return rows, sizes[:-1]


def _shape(name: str, t: torch.Tensor, dims: str, types: tuple[torch.dtype, ...], device: torch.device) -> torch.Size:
    """The shape of a tensor as expected."""
    shape = t.shape
    if len(shape) != len(dims) or t.dtype not in types or t.device != device:
        require_tensor("state_update", name, t, dims=dims, dtypes=types)
        raise TypeError(f"state_update: expected {name} on the device of x, {device}, got {t.device}")
    return shape


def _expect(
    name: str,
    t: torch.Tensor,
    dims: str,
    sizes: tuple[int, ...],
    types: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if t.shape == sizes and t.dtype in types and t.device == device:  # a step is short, and so are its checks
        return
    if _shape(name, t, dims, types, device) != sizes:
        raise ValueError(f"state_update: expected {name} of shape ({', '.join(dims)}) = {tuple(sizes)}, got {tuple(t.shape)}")


def allocate(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    beta: torch.Tensor | None,
    dt_softplus: bool,
    l2norm: bool,
    scale: float,
) -> Tensors:
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    beta: torch.Tensor | None,
    dt_softplus: bool,
    l2norm: bool,
    scale: float,
) -> Tensors:
    if state.dim() == 3:  # one head, whose rows are the channels
        given = (state, x, dt, B, C)
        state, x, dt, B, C = (t.unsqueeze(1) for t in given)
        A, D, dt_bias = (None if t is None else t[None] for t in (A, D, dt_bias))
        z = None if z is None else z.unsqueeze(1)
        rest = (dt_softplus, l2norm, scale)
        out, new = reference(state, x, dt, A, B, C, D, z, dt_bias, beta, *rest)
        return out[:, 0], new[:, 0]
    sums = torch.promote_types(x.dtype, torch.float32)
    t = _steps_of(dt.to(sums), dt_bias, tuple(state.shape), beta is not None)
    t = F.softplus(t) if dt_softplus else t
    b, c = (_per_head(v.to(sums), x.shape[1], l2norm) for v in (B, C))
    x_column = x.to(sums)[..., None]
    new = torch.exp(t if A is None else t * A.to(sums)) * state.to(sums)
    if beta is None:
        new = new + t * x_column * b
    else:
        new = new + beta.to(sums)[..., None, None] * (x_column - (new * b).sum(-1, keepdim=True)) * b
    out = scale * (new * c).sum(-1)
    if D is not None:
        out = out + D.to(sums) * x.to(sums)
    if z is not None:
        out = out * F.silu(z.to(sums))
    return out.to(x.dtype).contiguous(), new.to(state.dtype)


def _steps_of(dt: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...], delta: bool) -> torch.Tensor:
    """dt with its bias, of four dimensions."""
    letters, _ = _decay_sizes(dt, "SHP", sizes, delta)
    t = dt if dt.dim() == 4 else dt[(..., *(slice(None) if d in letters[2:] else None for d in "PN"))]
    if bias is None:
        return t
    return t + (bias if bias.dim() == 3 else bias[..., None]).to(t.dtype)


def _per_head(v: torch.Tensor, heads: int, l2norm: bool) -> torch.Tensor:
    """(S, G, N) → (S, H, 1, N)."""
    v = v * torch.rsqrt((v * v).sum(-1, keepdim=True) + 1e-6) if l2norm else v
    return v.repeat_interleave(heads // max(v.shape[1], 1), 1)[:, :, None]


_op = register("state_update", SCHEMA, check=check, allocate=allocate, reference=reference, needs_workspace=False)


def state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """One step of a selective state space model: Mamba's with (B, D, N), Mamba-2's with (B, H, P, N) states.

    Equivalent to, with ``t = softplus(dt + dt_bias)``: ``state = exp(t * A) * state + t * x[..., None] * B``, in place, and
    ``out = ((state * C).sum(-1) + D * x) * silu(z)``.

    Args:
        state: (B, D, N) or (B, H, P, N) float32, float16 or bfloat16, any strides, on CPU or CUDA; N ≤ 1024. Written in place.
        x: (B, D) or (B, H, P) float32, float16 or bfloat16.
        dt: of the shape of ``x``, in its dtype or float32; as A, D and dt_bias often expanded (stride 0), which is faster.
        A: (D, N) or (H, P, N).
        B: (B, N) or (B, G, N) in the dtype of ``x``; G divides H.
        C: as ``B``.
        D: (D,) or (H, P).
        z: of the shape and dtype of ``x``: the gate.
        dt_bias: (D,) or (H, P).
        dt_softplus: whether dt goes through softplus.

    Returns:
        Of the shape and dtype of ``x``.

    Raises:
        ValueError: wrong rank or shape, or N > 1024.
        TypeError: wrong dtype, or tensors on different devices.

    Mamba (Gu and Dao, 2023), Mamba-2 (Dao and Gu, 2024); arguments as of mamba_ssm's ``selective_state_update``.
    """
    return _op(state, x, dt, A, B, C, D, z, dt_bias, None, dt_softplus, False, 1.0)[0]


def delta_update(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    l2norm: bool = False,
) -> torch.Tensor:
    """One step of the gated delta rule, or of KDA where the decay differs from key to key.

    Equivalent to, for every head: ``state = exp(g) * state``, ``state += beta * k ⊗ (v − state.T @ k)``, in place, and
    ``out = scale * state.T @ q``.

    Args:
        state: (B, H, K, V) float32, float16 or bfloat16, any strides, on CPU or CUDA; K ≤ 1024. Written in place.
        q: (B, G, K) in the dtype of ``v``; G divides H, and each serves H/G heads, one after the other.
        k: as ``q``.
        v: (B, H, V) float32, float16 or bfloat16.
        g: (B, H) or (B, H, K), the logarithm of the decay, in the dtype of ``v`` or float32.
        beta: (B, H) in the dtype of ``v`` or float32.
        scale: default K^−½.
        l2norm: whether q and k are first divided by ``sqrt(sum of squares + 1e-6)``.

    Returns:
        (B, H, V) in the dtype of ``v``.

    Raises:
        ValueError: wrong rank or shape, or K > 1024.
        TypeError: wrong dtype, or tensors on different devices.

    Gated delta networks (Yang et al., 2024), Kimi Linear (2025).
    """
    if state.dim() != 4 or g.dim() not in (2, 3):
        raise ValueError(
            "state_update: expected state of shape (B, H, K, V) and g of shape (B, H) or (B, H, K), "
            f"got {tuple(state.shape)} and {tuple(g.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _op(state.mT, v, g, None, k, q, None, None, None, beta, False, l2norm, scale)[0]
