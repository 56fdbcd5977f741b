"""token_diverse: exact where the arithmetic is; elsewhere a pick is right when none was better by more than rounding."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import reduction_limit

from effvlm.ops.token_diverse import SPENT
from specs import Args, Bad, Case, Spec, Tensors
from specs.data import DATA

DPP: dict[str, Any] = {"dpp": True}
RELEVANT: dict[str, Any] = {"dpp": True, "relevance": "random"}

CASES = (
    Case("relevant", {"B": 2, "N": 49, "C": 32, "k": 12}, RELEVANT),
    Case("small", {"B": 2, "N": 49, "C": 32, "k": 12}),
    Case("no_batch", {"B": 0, "N": 4, "C": 8, "k": 2}),
    Case("no_tokens", {"B": 2, "N": 0, "C": 8, "k": 0}),
    Case("no_tokens", {"B": 2, "N": 0, "C": 8, "k": 0}, RELEVANT),
    Case("no_picks", {"B": 2, "N": 5, "C": 8, "k": 0}, DPP),
    Case("no_channels", {"B": 2, "N": 5, "C": 0, "k": 3}),
    Case("no_channels", {"B": 2, "N": 5, "C": 0, "k": 5}, RELEVANT),
    Case("one_token", {"B": 2, "N": 1, "C": 8, "k": 1}),
    Case("one_token", {"B": 2, "N": 1, "C": 8, "k": 1}, DPP),
    Case("one_pick", {"B": 1, "N": 70, "C": 24, "k": 1}),
    Case("two_tokens", {"B": 3, "N": 2, "C": 5, "k": 2}),
    Case("two_tokens", {"B": 3, "N": 2, "C": 5, "k": 2}, RELEVANT),
    Case("tails", {"B": 3, "N": 33, "C": 17, "k": 14}),
    Case("dpp_tails", {"B": 3, "N": 33, "C": 17, "k": 14}, RELEVANT),
    Case("all_tokens", {"B": 1, "N": 67, "C": 16, "k": 67}),
    Case("all_tokens", {"B": 1, "N": 67, "C": 16, "k": 67}, RELEVANT),
    Case("all_tokens", {"B": 1, "N": 67, "C": 96, "k": 67}, DPP, "image"),
    Case("irrelevant", {"B": 2, "N": 40, "C": 64, "k": 30}, {"dpp": True, "relevance": "zeros"}),
    Case("strips", {"B": 1, "N": 389, "C": 130, "k": 100}),
    Case("strips", {"B": 3, "N": 389, "C": 130, "k": 100}, RELEVANT),
    Case("clip_l", {"B": 1, "N": 577, "C": 64, "k": 64}, data="image"),
    Case("clip_l", {"B": 1, "N": 577, "C": 64, "k": 64}, DPP, "image"),
    Case("norms", {"B": 2, "N": 203, "C": 96, "k": 90}, data="norms"),
    Case("norms", {"B": 2, "N": 203, "C": 96, "k": 120}, DPP, "norms"),
    Case("ties", {"B": 2, "N": 150, "C": 16, "k": 60}, {"signs": True}),
    Case("ties_wide", {"B": 1, "N": 300, "C": 64, "k": 200}, {"signs": True}),
    Case("integers", {"B": 2, "N": 150, "C": 9, "k": 40}, data="integers"),
    Case("duplicates", {"B": 1, "N": 260, "C": 72, "k": 100}, data="duplicates"),
    Case("duplicates", {"B": 2, "N": 120, "C": 72, "k": 120}, RELEVANT, "duplicates"),
    Case("clip_l_336", {"B": 1, "N": 576, "C": 1024, "k": 64}, data="image", bench=True),
    Case("clip_l_336", {"B": 1, "N": 576, "C": 1024, "k": 64}, DPP, "image", bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 4096, "k": 320}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 4096, "k": 320}, DPP, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 4096, "k": 320}, data="image", bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 4096, "k": 320}, DPP, "image", bench=True),
    Case("video", {"B": 64, "N": 256, "C": 3584, "k": 26}, data="image", bench=True),
    Case("video", {"B": 64, "N": 256, "C": 3584, "k": 26}, DPP, "image", bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, N, C, k = (case.sizes[s] for s in "BNCk")
    x = DATA[case.data](B, N, C, generator).to(dtype)
    if case.options.get("signs"):  # norms are powers of two, so that cosines are exact
        x = (2 * torch.randint(2, (B, N, C), generator=generator) - 1).to(dtype)
    relevance = None
    if case.options.get("relevance"):
        relevance = torch.rand(B, N, generator=generator)
        relevance[:, ::5] = relevance[:, :1]  # ties
        if case.options["relevance"] == "zeros":
            relevance[:, torch.randint(N, (N // 2,), generator=generator)] = 0
    return x, k, relevance, case.options.get("dpp", False)


def _unit(x: torch.Tensor) -> torch.Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, torch.zeros_like(x))


def _replay_max_min(cosine: torch.Tensor, order: list[int], limit: float) -> None:
    nearest = cosine.clone().fill_diagonal_(-torch.inf).amax(-1)
    for t, pick in enumerate(order):
        short = float(nearest[pick] - nearest.min()) if len(nearest) > 1 else 0.0
        assert short <= 2 * limit, f"pick {t}: token {pick} is nearer than another by {short}, limit {2 * limit}"
        nearest = cosine[order[: t + 1]].amax(0)
        nearest[order[: t + 1]] = torch.inf


def _replay_dpp(cosine: torch.Tensor, left: torch.Tensor, relevance: torch.Tensor, order: list[int], limit: float) -> None:
    """Errors of cosines, up to ``limit``, are carried through the recurrence to first order."""
    error, squared = torch.full_like(left, 4 * 2.0**-24), relevance * relevance
    rows = cosine.new_zeros((len(order), len(left)))
    for t, pick in enumerate(order):
        least, most = (squared * torch.where(d > SPENT, d, 0.0) for d in (left - error, left + error))
        least[order[:t]] = most[order[:t]] = -1
        if most.max() <= 0:
            rest = [i for i in relevance.argsort(descending=True, stable=True).tolist() if i not in order[:t]]
            assert order[t:] == rest[: len(order) - t], f"pick {t}: all is spent, expected tokens by relevance"
            return
        if least.max() <= 0:
            return  # rounding decides whether all is spent
        assert most[pick] >= least.max() * (1 - 4 * 2.0**-24), (
            f"pick {t}: token {pick} is worth at most {most[pick]}, another at least {least.max()}"
        )
        rows[t] = (cosine[pick] - rows[:t, pick] @ rows[:t]) / left[pick].sqrt()
        left, error = left - rows[t] ** 2, error + 2 * rows[t].abs() * limit / left[pick].sqrt()


def compare(args: Args, got: Tensors, oracle: Tensors, same: Tensors) -> None:
    x, k, relevance, dpp = args
    out, x = got[0].cpu().long(), x.detach().cpu()
    B, N, _ = x.shape
    assert out.shape == (B, k)
    assert not out.numel() or (out.min() >= 0 and out.max() < N)
    unit = _unit(x.double())
    cosine, norm = unit @ unit.mT, x.double().norm(dim=-1)
    limit = reduction_limit("cosine", cosine, _unit(x.float()) @ _unit(x.float()).mT, terms=1.0)
    for b in range(B if k else 0):
        order = out[b].tolist()
        assert len(set(order)) == k, "a token was picked twice"
        if dpp:
            weight = torch.ones(N).double() if relevance is None else relevance[b].cpu().double()
            _replay_dpp(cosine[b], (norm[b] > 0).double(), weight, order, limit)
        else:
            _replay_max_min(cosine[b], order, limit)
    exact = bool((norm.log2() == norm.log2().round()).all()) and torch.equal(x, x.round())
    if exact and not dpp:
        assert torch.equal(out, oracle[0].cpu().long()), "exact arithmetic, so the lowest index of the best"


def torch_diverse(x: torch.Tensor, k: int, relevance: torch.Tensor | None, dpp: bool) -> torch.Tensor:
    """The published formulations: a matrix of cosines, then a running minimum or a running orthogonalisation."""
    m = x / x.norm(dim=-1, keepdim=True)
    cosine = m @ m.mT
    batch, (B, N, _) = torch.arange(x.shape[0]), x.shape
    order = torch.empty(k, B, dtype=torch.long)
    if not dpp:
        distance = 1 - cosine
        value = distance.diagonal_scatter(distance.new_full((B, N), 2), dim1=1, dim2=2).amin(-1)
        for t in range(k):
            order[t] = value.argmax(-1)
            last = distance[batch, order[t]]
            value = last if t == 0 else torch.minimum(value, last)
            value = value.scatter(1, order[: t + 1].T, -2)
        return order.T
    r = torch.ones(B, N) if relevance is None else relevance
    kernel = r[:, :, None] * cosine.float() * r[:, None]
    value, rows = kernel.diagonal(dim1=1, dim2=2).clone(), kernel.new_zeros(k, B, N)
    for t in range(k):
        order[t] = value.argmax(-1)
        j = order[t]
        e = (kernel[batch, j] - torch.einsum("tb,tbn->bn", rows[:t, batch, j], rows[:t])) / value[batch, j, None].sqrt()
        rows[t], value = e, (value - e * e).scatter(1, j[:, None], -torch.inf)
    return order.T


def _set(index: int, value: Any) -> Any:
    return lambda args: args.__setitem__(index, value)


def _flops(c: Case) -> float:
    B, N, C, k = (c.sizes[s] for s in "BNCk")
    return float(B * N * k * (2 * C + k) if c.options.get("dpp") else B * N * (N + k) * C * 2)


SPEC = Spec(
    op="token_diverse",
    cases=CASES,
    inputs=inputs,
    compare=compare,
    flops=_flops,
    bytes=lambda c, dtype: float(c.sizes["B"] * c.sizes["N"] * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("k_negative", _set(1, -1), ValueError, "k = -1"),
        Bad("k_too_large", _set(1, 50), ValueError, "k <= N = 49"),
        Bad("relevance_shape", _set(2, torch.ones(2, 48)), ValueError, "(2, 48)"),
        Bad("relevance_dtype", _set(2, torch.ones(2, 49, dtype=torch.float16)), TypeError, "float32"),
        Bad("relevance_negative", lambda a: a[2].__setitem__((1, 7), -1.0), ValueError, "batch 1, token 7"),
        Bad("relevance_nan", lambda a: a[2].__setitem__((0, 7), float("nan")), ValueError, "batch 0, token 7"),
        Bad("relevance_without_dpp", _set(3, False), ValueError, "'dpp'"),
        Bad("nan", lambda a: a[0].__setitem__((1, 3, 2), float("nan")), ValueError, "batch 1, token 3"),
    ),
    peers={"torch": torch_diverse},
)
