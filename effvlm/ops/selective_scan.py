"""``selective_scan``: Mamba's scan (S6), along any number of paths over the tokens, with its gate, in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor
from effvlm.ops.traversals import Traversal

SCHEMA = (
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool delta_softplus, int[]? traversals) -> (Tensor, Tensor)"
)
Maybe = torch.Tensor | None
_MOST_STATES, _MOST_PATHS = 256, 8


class SelectiveScan(NamedTuple):
    """What :func:`selective_scan` returns.

    Attributes:
        out: (B, D, L) in the dtype of ``u``; its channels lie together in memory, as the projection that follows reads them.
        final_state: (S, D, N) float32, or (S, K, D, N) with traversals.
    """

    out: torch.Tensor
    final_state: torch.Tensor


def _refuse(text: str) -> None:
    raise ValueError(f"selective_scan: {text}")


def _check_tensors(u: torch.Tensor, tensors: dict[str, Maybe], dims: dict[str, str], sizes: dict[str, int]) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        dtypes = FLOATS if name in ("delta", "B", "C", "z") else (torch.float32,)
        require_tensor("selective_scan", name, x, dims=dims[name], dtypes=dtypes)
        expected = tuple(sizes[letter] for letter in dims[name])
        if x.shape != expected:
            letters = ", ".join(dims[name])
            _refuse(f"expected {name} of shape ({letters}) = {expected}, got {tuple(x.shape)}")
        if x.device != u.device:
            raise TypeError(f"selective_scan: expected {name} on the device of u, {u.device}, got {x.device}")


def _check_packed(u: torch.Tensor, cu_seqlens: torch.Tensor, has_paths: bool) -> None:
    require_tensor("selective_scan", "cu_seqlens", cu_seqlens, dims="S", dtypes=(torch.int32,))
    if has_paths:
        _refuse("packed sequences (cu_seqlens) and traversals do not go together; call it once per sequence")
    if cu_seqlens.shape[0] < 1 or u.shape[0] != 1:
        _refuse(f"expected cu_seqlens of shape (S + 1,) with B = 1, got {tuple(cu_seqlens.shape)} with B = {u.shape[0]}")
    if cu_seqlens.device != u.device:
        raise TypeError(f"selective_scan: expected cu_seqlens on the device of u, {u.device}, got {cu_seqlens.device}")
    if DEBUG and u.is_cuda:
        ends = [0, *cu_seqlens.tolist(), u.shape[2]]
        if ends[1] != 0 or ends[-2] != ends[-1] or ends != sorted(ends):
            _refuse(f"expected cu_seqlens to ascend from 0 to L = {u.shape[2]}")


def _check_path(k: int, path: Sequence[int], L: int) -> None:
    outer, inner, offset, outer_stride, inner_stride = path
    if outer < 0 or inner < 0:
        _refuse(f"expected counts of at least 0 in traversal {k}, got {tuple(path)}")
    if not outer or not inner:
        return
    reach = ((outer - 1) * outer_stride, (inner - 1) * inner_stride)
    low, high = offset + sum(min(r, 0) for r in reach), offset + sum(max(r, 0) for r in reach)
    if low < 0 or high >= L:
        _refuse(f"expected traversal {k} to stay in 0 … L−1 = {L - 1}, got {tuple(path)}, which covers {low} … {high}")
    # i·outer_stride = j·inner_stride has its smallest solution at these i and j.
    common = math.gcd(outer_stride, inner_stride)
    if (common == 0 and outer * inner > 1) or (
        common and abs(inner_stride) // common < outer and abs(outer_stride) // common < inner
    ):
        _refuse(f"expected traversal {k} to come to a place at most once, got {tuple(path)}")


def check(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Maybe,
    z: Maybe,
    delta_bias: Maybe,
    initial_state: Maybe,
    cu_seqlens: Maybe,
    delta_softplus: bool,
    traversals: Sequence[int] | None,
) -> None:
    require_tensor("selective_scan", "u", u, dims="BDL", dtypes=FLOATS)
    require_tensor("selective_scan", "delta", delta, dims="BKDL", dtypes=FLOATS)
    if isinstance(A, torch.Tensor) and A.is_complex():
        raise TypeError("selective_scan: expected a real A; complex states (S4D) are not what Mamba uses, and not supported")
    require_tensor("selective_scan", "A", A, dims="KDN", dtypes=(torch.float32,))
    if cu_seqlens is not None:
        _check_packed(u, cu_seqlens, traversals is not None)
    K, N = delta.shape[1], A.shape[2]
    sizes = {"B": u.shape[0], "D": u.shape[1], "L": u.shape[2], "K": K, "N": N}
    sizes["S"] = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensors = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    dims = {"delta": "BKDL", "A": "KDN", "B": "BKNL", "C": "BKNL", "D": "KD", "z": "BDL", "delta_bias": "KD"}
    _check_tensors(u, tensors, dims | {"initial_state": "SKDN"}, sizes)
    if not 1 <= N <= _MOST_STATES:
        _refuse(f"expected 1 to {_MOST_STATES} states per channel, got N = {N}")
    if traversals is None and K != 1:
        _refuse(f"expected K = 1 without traversals, got delta of shape {tuple(delta.shape)}")
    if traversals is not None:
        if not 1 <= K <= _MOST_PATHS or len(traversals) != 5 * K:
            _refuse(f"expected 5 numbers for each of K = {K} traversals, at most {_MOST_PATHS}, got {len(traversals)} numbers")
        for k in range(K):
            _check_path(k, traversals[5 * k : 5 * k + 5], u.shape[2])


def allocate(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *rest: object) -> Tensors:
    batch, D, L = u.shape
    cu_seqlens = rest[6]
    S = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, torch.Tensor) else batch
    K, _, N = A.shape
    return u.new_empty((batch, L, D)).transpose(1, 2), u.new_empty((S, K, D, N), dtype=torch.float32)


def _places(path: Sequence[int], device: torch.device) -> torch.Tensor:
    outer, inner, offset, outer_stride, inner_stride = path
    o, i = torch.arange(outer, device=device), torch.arange(inner, device=device)
    return (offset + o[:, None] * outer_stride + i * inner_stride).flatten()


def _steps(
    h: torch.Tensor, u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h (S, D, N); u, dt (S, D, T); B, C (S, N, T) → y (S, D, T) and h after the last step."""
    y = []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(y, -1), h


def _scan(
    h: torch.Tensor, u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in √T segments, of which backward keeps the first state and computes the others again."""
    T = u.shape[2]
    size = max(math.isqrt(T), 1)
    y = [u[..., :0]]
    for t in range(0, T, size):
        part = [x[..., t : t + size] for x in (u, dt, B, C)]
        if torch.is_grad_enabled():
            out, h = checkpoint(_steps, h, part[0], part[1], A, part[2], part[3], use_reentrant=False)
        else:
            out, h = _steps(h, part[0], part[1], A, part[2], part[3])
        y.append(out)
    return torch.cat(y, -1), h


def reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Maybe,
    z: Maybe,
    delta_bias: Maybe,
    initial_state: Maybe,
    cu_seqlens: Maybe,
    delta_softplus: bool,
    traversals: Sequence[int] | None,
) -> Tensors:
    wide = torch.promote_types(u.dtype, torch.float32)
    K, channels, N = A.shape
    x, A, B, C = u.to(wide), A.to(wide), B.to(wide), C.to(wide)
    dt = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)[..., None]
    dt = F.softplus(dt, threshold=1000.0) if delta_softplus else dt
    cuts = [0, u.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    paths = [(1, b - a, a, 0, 1) for a, b in itertools.pairwise(cuts)]  # of packed sequences, one each
    if traversals is not None:
        paths = [tuple(traversals[5 * k : 5 * k + 5]) for k in range(K)]  # type: ignore[misc]
    out, finals = torch.zeros_like(x), []
    for p, path in enumerate(paths):
        k, s = (p, slice(None)) if cu_seqlens is None else (0, slice(p, p + 1))
        at = _places(path, u.device)
        start = x.new_zeros((u.shape[0], channels, N)) if initial_state is None else initial_state[s, k].to(wide)
        y, h = _scan(start, x[..., at], dt[:, k][..., at], A[k], B[:, k][..., at], C[:, k][..., at])
        y = y if D is None else y + D[k].to(wide)[:, None] * x[..., at]
        out = out.index_add(2, at, y)
        finals.append(h)
    out = out if z is None else out * F.silu(z.to(wide))
    empty = A.new_zeros((0, channels, N))
    final = torch.stack(finals, 1) if cu_seqlens is None else torch.cat([empty, *finals])[:, None]
    return out.to(u.dtype), final


_op = register("selective_scan", SCHEMA, check=check, allocate=allocate, reference=reference, differentiable=reference)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Maybe = None,
    z: Maybe = None,
    delta_bias: Maybe = None,
    delta_softplus: bool = False,
    *,
    initial_state: Maybe = None,
    cu_seqlens: Maybe = None,
    traversals: Sequence[Traversal] | None = None,
) -> SelectiveScan:
    """Mamba's selective scan with skip connection and gate, for one order of the tokens or several at once.

    Per channel and state ``h = exp(dt * A) * h + dt * B * u`` and ``y = C @ h + D * u``, with ``dt = delta + delta_bias`` or its
    softplus; ``out = y * silu(z)``. With traversals, each of the K has its own parameters and states, runs over the places that
    it names of *all* tensors, and their ``y`` are summed where they meet; places on no traversal are zeros. So the scans of Vim
    (:func:`effvlm.bidirectional`), VMamba (:func:`effvlm.cross_scan`) and MSVMamba (:func:`effvlm.multi_scale_scan`), merge and
    gate included, are one call without permuted copies. Gradients go through PyTorch, computed again in √L segments.

    Args:
        u: (B, D, L) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        delta: (B, D, L), or (B, K, D, L) with traversals; it, B, C and z have any of the three dtypes.
        A: (D, N) or (K, D, N) float32, N from 1 to 256; as usual negative.
        B, C: (B, N, L) or (B, K, N, L).
        D: (D,) or (K, D) float32, the skip connection.
        z: (B, D, L), the gate.
        delta_bias: (D,) or (K, D) float32, added to delta first.
        delta_softplus: whether dt is softplus(delta + delta_bias).
        initial_state: (S, D, N) or (S, K, D, N) float32; default zeros. S is B, or the number of packed sequences.
        cu_seqlens: (S + 1,) int32 from 0 to L: sequences packed into one row (B = 1), each with a state of its own.
        traversals: K tuples ``(outer_count, inner_count, offset, outer_stride, inner_stride)``, K up to 8: step ``t`` is at place
            ``offset + t // inner_count * outer_stride + t % inner_count * inner_stride``.

    Returns:
        ``SelectiveScan(out, final_state)``.

    Raises:
        ValueError: wrong rank or shape, a traversal that leaves 0 … L−1 or comes to a place twice, traversals of packed
            sequences, or (on CPU) ``cu_seqlens`` that does not ascend from 0 to L.
        TypeError: wrong dtype, complex A, or tensors on different devices.

    Source: Gu and Dao, Mamba, arXiv 2312.00752; Liu et al., VMamba, arXiv 2401.10166.
    """
    for name, x in (("B", B), ("C", C)):
        if isinstance(x, torch.Tensor) and x.dim() == 2:
            _refuse(
                f"expected {name} of shape (B, N, L), got {tuple(x.shape)}: the same {name} for all tokens (S4) is not supported"
            )
    if traversals is not None:
        flat = [int(number) for path in traversals for number in path]
        return SelectiveScan(*_op(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, flat))
    A, delta, B, C = A[None], delta.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
    D, delta_bias = (None if x is None else x[None] for x in (D, delta_bias))
    initial_state = None if initial_state is None else initial_state.unsqueeze(1)
    out, final = _op(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, None)
    return SelectiveScan(out, final.squeeze(1))
