"""``token_score``: how much attention each key receives, without the attention matrix."""

from __future__ import annotations

import torch

from effvlm._library import DEBUG, FLOATS, Tensors, register, require_tensor

SCHEMA = "(Tensor query, Tensor key, Tensor? lse, Tensor? weight, Tensor? start, bool causal, float scale, str heads) -> Tensor"
HEADS = ("none", "mean", "sum", "max")


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    causal: bool,
    scale: float,
    heads: str,
) -> None:
    require_tensor("token_score", "query", query, dims="BHLD", dtypes=FLOATS)
    require_tensor("token_score", "key", key, dims="BGSD", dtypes=(query.dtype,))
    (B, H, L, D), (_, G, S, _) = query.shape, key.shape
    if key.shape != (B, G, S, D):
        raise ValueError(f"token_score: expected key of shape (B, G, S, D) = ({B}, G, S, {D}), got {tuple(key.shape)}")
    if H < 1 or G < 1 or H % G or D < 1:
        raise ValueError(f"token_score: expected D >= 1 and H a multiple of G >= 1, got H = {H}, G = {G}, D = {D}")
    if L >= 2**31 or S >= 2**31:
        raise ValueError(f"token_score: expected fewer than 2**31 rows and keys, got L = {L}, S = {S}")
    if heads not in HEADS:
        raise ValueError(f"token_score: expected heads to be one of {', '.join(HEADS)}, got {heads!r}")
    for name, t, dims, shape in (("lse", lse, "BHL", (B, H, L)), ("weight", weight, "BL", (B, L))):
        if t is not None:
            require_tensor("token_score", name, t, dims=dims, dtypes=(torch.float32,))
            if t.shape != shape:
                raise ValueError(f"token_score: expected {name} of shape ({', '.join(dims)}) = {shape}, got {tuple(t.shape)}")
    if start is not None:
        require_tensor("token_score", "start", start, dims="T", dtypes=(torch.int32,))
        if L != S or len(start) < 1:
            raise ValueError(f"token_score: expected start of at least one place, with L = S, got {len(start)}, L = {L}, S = {S}")
        if DEBUG and start.is_cuda and not bool(start[0] == 0 and start[-1] == L and (start.diff() >= 0).all()):
            raise ValueError(f"token_score: expected start to ascend from 0 to L = {L}, got {start.tolist()}")
    for name, t in (("key", key), ("lse", lse), ("weight", weight), ("start", start)):
        if t is not None and t.device != query.device:
            raise TypeError(f"token_score: expected {name} on the device of query, {query.device}, got {t.device}")


def allocate(query: torch.Tensor, key: torch.Tensor, *rest: object) -> Tensors:
    (B, H, _, _), S = query.shape, key.shape[2]
    return (query.new_empty((B, H, S) if rest[-1] == "none" else (B, S), dtype=torch.float32),)


def visible(L: int, S: int, start: torch.Tensor | None, causal: bool, device: torch.device) -> torch.Tensor:
    """(L, S) bool: which keys each row sees."""
    row, key = torch.arange(L, device=device)[:, None], torch.arange(S, device=device)
    seen = key <= row + (S - L) if causal else torch.ones((L, S), dtype=torch.bool, device=device)
    if start is not None:
        segment = torch.searchsorted(start.long(), torch.arange(L, device=device), right=True)
        seen = seen & (segment[:, None] == segment)
    return seen


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    causal: bool,
    scale: float,
    heads: str,
) -> Tensors:
    sums = torch.promote_types(query.dtype, torch.float32)
    (_, H, L, _), (G, S) = query.shape, key.shape[1:3]
    x = scale * query.to(sums) @ key.to(sums).repeat_interleave(H // G, dim=1).mT
    seen = visible(L, S, start, causal, query.device)
    x = x.masked_fill(~seen, -torch.inf)
    lse = x.logsumexp(dim=-1) if lse is None else lse.to(sums)
    counts = seen.any(dim=-1)  # rows
    p = torch.exp(x - torch.where(counts, lse, 0.0)[..., None])
    p = torch.where(seen, p, 0.0)
    if weight is not None:
        w = weight[:, None, :, None].to(sums)
        p = torch.where(w != 0, w * p, 0.0)
    c = p.sum(dim=2)
    if heads == "none":
        return (c,)
    return (c.amax(dim=1) if heads == "max" else c.sum(dim=1) if heads == "sum" else c.mean(dim=1),)


_op = register("token_score", SCHEMA, check=check, allocate=allocate, reference=reference)


def token_score(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: str = "mean",
) -> torch.Tensor:
    """How much attention each key receives from the rows: column sums of an attention matrix that is never stored.

    Equivalent to ``(weight[:, None, :, None] * (scale * query @ key.mT - lse[..., None]).exp()).sum(2).mean(1)``, with 0 where a
    row does not see a key. With the log-sum-exp that flash attention returns beside its output it takes half of that attention's
    operations; without, the op computes it, which takes as many again. Scores of this kind choose which visual tokens to keep
    (FastV, arXiv 2403.06764; VisionZip, 2412.04467; H2O, 2306.14048).

    Args:
        query: (B, H, L, D) float32, float16 or bfloat16, any strides, on CPU or CUDA.
        key: (B, G, S, D) in the dtype of ``query``; G divides H (grouped queries).
        lse: (B, H, L) float32, natural logarithm of each row's sum of exponentials over the keys that it sees; default: computed.
        weight: (B, L) float32, how much each row counts; rows of weight 0 are left out and cost nothing; default all ones.
        start: (T+1,) int32, ascending from 0 to L: packed sequences (as ``cu_seqlens``), each of which sees itself only; L = S.
        causal: row ``i`` sees the keys up to ``i + S - L`` only.
        scale: of the products; default ``1 / sqrt(D)``.
        heads: ``"mean"``, ``"sum"`` or ``"max"`` over heads, or ``"none"`` to keep them apart.

    Returns:
        (B, S) float32, or (B, H, S) with ``heads="none"``.

    Raises:
        ValueError: wrong rank or shape, an unknown ``heads``, or (on CPU) ``start`` that does not ascend from 0 to L.
        TypeError: wrong dtype, or tensors on different devices.
    """
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5 if isinstance(query, torch.Tensor) and query.dim() else 1.0
    return _op(query, key, lse, weight, start, causal, scale, heads)[0]
