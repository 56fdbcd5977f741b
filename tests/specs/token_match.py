"""token_match: exact where the arithmetic is; elsewhere a partner is right when no other is better by more than rounding."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import reduction_limit

from effvlm.ops.token_match import groups_of
from specs import Args, Bad, Case, Spec, Tensors
from specs.data import DATA

CASES = (
    Case("siglip_b", {"B": 2, "N": 196, "C": 64}, {"r": 98}),
    Case("one_token", {"B": 2, "N": 1, "C": 8}, {"r": 0}),
    Case("two_tokens", {"B": 1, "N": 2, "C": 1}, {"r": 1}),
    Case("no_tokens", {"B": 1, "N": 0, "C": 8}, {"r": 0}),
    Case("no_batch", {"B": 0, "N": 4, "C": 8}, {"r": 2}),
    Case("no_channels", {"B": 2, "N": 5, "C": 0}, {"r": 2}),
    Case("tails", {"B": 3, "N": 33, "C": 17}, {"r": 5}),
    Case("below_screen", {"B": 1, "N": 223, "C": 64}, {"r": 111}),
    Case("above_screen", {"B": 2, "N": 225, "C": 65}, {"r": 0}),
    Case("narrow", {"B": 1, "N": 230, "C": 63}, {"r": 65}),
    Case("strips", {"B": 1, "N": 389, "C": 130}, {"r": 100}),
    Case("clip_l", {"B": 1, "N": 577, "C": 64}, {"r": 16}, "image"),
    Case("norms", {"B": 2, "N": 243, "C": 96}, {"r": 50}, "norms"),
    Case("norms_dot", {"B": 1, "N": 243, "C": 96}, {"r": 50, "cosine": False}, "norms"),
    Case("dot", {"B": 1, "N": 300, "C": 100}, {"r": 150, "cosine": False}, "image"),
    Case("ties", {"B": 2, "N": 250, "C": 80}, {"r": 40, "cosine": False}, "integers"),
    Case("ties_narrow", {"B": 2, "N": 41, "C": 9}, {"r": 13, "cosine": False}, "integers"),
    Case("duplicates", {"B": 1, "N": 260, "C": 72}, {"r": 100}, "duplicates"),
    Case("clip_l_336", {"B": 1, "N": 577, "C": 1024}, {"r": 288}, bench=True),
    Case("clip_l_336", {"B": 1, "N": 577, "C": 1024}, {"r": 288}, "image", bench=True),
    Case("clip_l_keys", {"B": 8, "N": 577, "C": 64}, {"r": 16}, "image", bench=True),
    Case("frames", {"B": 32, "N": 196, "C": 3584}, {"r": 98}, bench=True),
    Case("llava_next_7b", {"B": 1, "N": 2880, "C": 4096}, {"r": 1440}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 1024}, {"r": 1440}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 1024}, {"r": 1440}, "image", bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    x = DATA[case.data](case.sizes["B"], case.sizes["N"], case.sizes["C"], generator).to(dtype)
    return x, case.options["r"], case.options.get("cosine", True)


def compare(args: Args, got: Tensors, oracle: Tensors, same: Tensors) -> None:
    x, r, cosine = args
    score, partner, group = (t.cpu() for t in got)
    x, N = x.detach().cpu().double(), x.shape[1]
    limit = reduction_limit(
        "score", oracle[0], same[0], terms=x.norm(dim=-1).max().item() ** 2 if not cosine and x.numel() else 1.0
    )
    assert (score - oracle[0]).abs().le(limit).all(), f"score: worst error {(score - oracle[0]).abs().max()}, limit {limit}"
    if N > 1 and score.numel():
        assert (partner % 2 == 1).all(), "partner: expected odd positions"
        norm = x.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, x / norm, 0.0) if cosine else x
        all_scores = unit[:, ::2] @ unit[:, 1::2].mT
        chosen = all_scores.gather(2, (partner.long() - 1)[..., None] // 2)[..., 0]
        short = all_scores.amax(-1) - chosen
        assert short.le(2 * limit).all(), f"partner: one is worse than the best by {short.max()}, limit {2 * limit}"
        if torch.equal(x, x.round()) and not cosine:
            assert torch.equal(partner, oracle[1].to(torch.int32)), (
                "partner: exact arithmetic, so the lowest index of the maximum"
            )
    else:
        assert (partner == -1).all()
    assert torch.equal(group, groups_of(score, partner, r, N)), "group: not what the op's own scores and partners give"


def torch_match(x: torch.Tensor, r: int, cosine: bool) -> Any:
    """The published formulation: normalise, one matrix of similarities, maximum, sort."""
    m = x / x.norm(dim=-1, keepdim=True) if cosine else x
    best, partner = (m[:, ::2] @ m[:, 1::2].mT).max(dim=-1)
    return best.argsort(dim=-1, descending=True)[:, :r], partner


def _r_too_large(args: list[Any]) -> None:
    args[1] = args[0].shape[1] // 2 + 1


def _nan(args: list[Any]) -> None:
    args[0][1, 3, 2] = float("nan")


SPEC = Spec(
    op="token_match",
    cases=CASES,
    inputs=inputs,
    compare=compare,
    flops=lambda c: 2.0 * c.sizes["B"] * (c.sizes["N"] // 2) * ((c.sizes["N"] + 1) // 2) * c.sizes["C"],
    bytes=lambda c, dtype: float(c.sizes["B"] * c.sizes["N"] * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("r_negative", lambda a: a.__setitem__(1, -1), ValueError, "r = -1"),
        Bad("r_too_large", _r_too_large, ValueError, "N // 2"),
        Bad("nan", _nan, ValueError, "batch 1, token 3"),
    ),
    peers={"torch": torch_match},
)
