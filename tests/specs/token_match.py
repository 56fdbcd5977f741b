"""token_match: exact where the arithmetic is; elsewhere a partner is right when no other is better by more than rounding."""

from __future__ import annotations

from collections.abc import Callable
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
    Case("roles", {"B": 3, "N": 70, "C": 33}, {"r": 20, "roles": (0.5, 0.2)}),
    Case("roles_tails", {"B": 3, "N": 33, "C": 17}, {"r": 5, "roles": (0.6, 0.3)}),
    Case("roles_screened", {"B": 2, "N": 389, "C": 130}, {"r": 100, "roles": (0.4, 0.5)}, "image"),
    Case("roles_dot", {"B": 1, "N": 450, "C": 65}, {"r": 210, "cosine": False, "roles": (0.6, 0.4)}, "norms"),
    Case("roles_ties", {"B": 2, "N": 350, "C": 70}, {"r": 40, "cosine": False, "roles": (0.4, 0.5)}, "integers"),
    Case("roles_few", {"B": 2, "N": 400, "C": 64}, {"r": 0, "roles": (0.9, 0.02)}),
    Case("one_role", {"B": 2, "N": 40, "C": 16}, {"r": 0, "roles": (1.0, 0.0)}),
    Case("no_roles", {"B": 1, "N": 5, "C": 8}, {"r": 0, "roles": (0.0, 0.0)}),
    Case("no_tokens", {"B": 1, "N": 0, "C": 8}, {"r": 0, "roles": (0.5, 0.5)}),
    Case("clip_l_336", {"B": 1, "N": 577, "C": 1024}, {"r": 288}, bench=True),
    Case("clip_l_336", {"B": 1, "N": 577, "C": 1024}, {"r": 288}, "image", bench=True),
    Case("clip_l_keys", {"B": 8, "N": 577, "C": 64}, {"r": 16}, "image", bench=True),
    Case("frames", {"B": 32, "N": 196, "C": 3584}, {"r": 98}, bench=True),
    Case("llava_next_7b", {"B": 1, "N": 2880, "C": 4096}, {"r": 1440}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 1024}, {"r": 1440}, bench=True),
    Case("llava_next", {"B": 1, "N": 2880, "C": 1024}, {"r": 1440}, "image", bench=True),
    Case("llava_next_320", {"B": 1, "N": 2880, "C": 4096}, {"r": 2500, "roles": (0.889, 0.111)}, bench=True),
)


def inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Args:
    B, N, C = (case.sizes[k] for k in "BNC")
    x, role = DATA[case.data](B, N, C, generator).to(dtype), None
    if "roles" in case.options:  # shares of sources and destinations
        lot, (source, destination) = torch.rand(B, N, generator=generator), case.options["roles"]
        role = torch.where(lot < source, 1, torch.where(lot < source + destination, 2, 0)).to(torch.uint8)
    return x, case.options["r"], case.options.get("cosine", True), role


def compare(args: Args, got: Tensors, oracle: Tensors, same: Tensors) -> None:
    x, r, cosine, role = args
    score, partner, group = (t.cpu() for t in got)
    x, N = x.detach().cpu().double(), x.shape[1]
    role = (1 + torch.arange(N) % 2).expand(x.shape[:2]) if role is None else role.cpu()
    none = oracle[0].isneginf()
    assert torch.equal(score.isneginf(), none), "score: -inf of those that have no partner, and of no others"
    wanted, plain, got_score = (t.masked_fill(none, 0) for t in (oracle[0], same[0], score))
    terms = x.norm(dim=-1).max().item() ** 2 if not cosine and x.numel() else 1.0
    limit = reduction_limit("score", wanted, plain, terms=terms)
    error = (got_score - wanted).abs()
    assert error.le(limit).all(), f"score: worst error {error.max()}, limit {limit}"
    assert torch.equal(partner < 0, oracle[1] < 0), "partner: of those that have none"
    norm = x.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, x / norm, 0.0) if cosine else x
    scores = (unit @ unit.mT).masked_fill(role[:, None] != 2, -torch.inf)
    scores = scores[:, ::2] if score.shape[1] < N else scores
    if N > 1 and score.numel():
        chosen = scores.gather(2, partner.clamp_min(0).long()[..., None])[..., 0]
        short = torch.where(partner < 0, 0, scores.amax(-1) - chosen)
        assert short.le(2 * limit).all(), f"partner: one is worse than the best by {short.max()}, limit {2 * limit}"
        if torch.equal(x, x.round()) and not cosine:
            assert torch.equal(partner, oracle[1].to(torch.int32)), (
                "partner: exact arithmetic, so the lowest index of the maximum"
            )
    assert torch.equal(group, groups_of(score, partner, r, N)), "group: not what the op's own scores and partners give"


def flops(c: Case) -> float:
    B, N, C = (c.sizes[k] for k in "BNC")
    source, destination = c.options.get("roles", (0.5, 0.5))
    return 2.0 * B * int(source * N + 0.5) * int(destination * N) * C


def torch_match(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Any:
    """The published formulation: normalise, one matrix of similarities, maximum, sort."""
    m = x / x.norm(dim=-1, keepdim=True) if cosine else x
    if role is None:
        best, partner = (m[:, ::2] @ m[:, 1::2].mT).max(dim=-1)
    else:
        best, partner = (m[:, role[0] == 1] @ m[:, role[0] == 2].mT).max(dim=-1)
    return best.argsort(dim=-1, descending=True)[:, :r], partner


def _r_too_large(args: list[Any]) -> None:
    args[1] = args[0].shape[1] // 2 + 1


def _role(role: torch.Tensor, r: int = 98) -> Callable[[list[Any]], None]:
    def change(args: list[Any]) -> None:
        args[1], args[3] = r, role

    return change


def _roles(*sources: int) -> torch.Tensor:
    """(2, 196), the first so many sources of each entry, the others destinations."""
    return torch.where(torch.arange(196) < torch.tensor(sources)[:, None], 1, 2).to(torch.int8)


def _nan(args: list[Any]) -> None:
    args[0][1, 3, 2] = float("nan")


SPEC = Spec(
    op="token_match",
    cases=CASES,
    inputs=inputs,
    compare=compare,
    flops=flops,
    bytes=lambda c, dtype: float(c.sizes["B"] * c.sizes["N"] * c.sizes["C"] * dtype.itemsize),
    bad=(
        Bad("rank", lambda a: a.__setitem__(0, a[0][0]), ValueError, "(B, N, C)"),
        Bad("dtype", lambda a: a.__setitem__(0, a[0].double()), TypeError, "float64"),
        Bad("r_negative", lambda a: a.__setitem__(1, -1), ValueError, "r = -1"),
        Bad("r_too_large", _r_too_large, ValueError, "N // 2"),
        Bad("role_shape", _role(_roles(98, 98)[:, 1:]), ValueError, "(2, 196)"),
        Bad("role_dtype", _role(_roles(98, 98).int()), TypeError, "int8"),
        Bad("role_r", _role(_roles(98, 98), 196), ValueError, "r < N = 196"),
        Bad("role_sources", _role(_roles(98, 97)), ValueError, "97 at batch 1, got r = 98"),
        Bad("role_destinations", _role(_roles(196, 98)), ValueError, "0 at batch 0, got r = 98"),
        Bad("role_value", _role(_roles(98, 98).index_fill(1, torch.tensor([5]), -1)), ValueError, "batch 0, token 5"),
        Bad("nan", _nan, ValueError, "batch 1, token 3"),
    ),
    peers={"torch": torch_match},
)
