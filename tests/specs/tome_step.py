"""tome_step: match and merge together, against the published PyTorch formulation of the same step (written from its formulae)."""

from __future__ import annotations

from typing import Any

import torch

from effvlm.ops import token_match, token_merge
from effvlm.ops.token_match import reference as match_reference
from effvlm.ops.token_merge import reference as merge_reference
from specs import Case, Spec, Tensors
from specs.token_match import CASES, flops, inputs


def step(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Tensors:
    match = token_match(x, r, metric="cosine" if cosine else "dot", role=role)
    return tuple(token_merge(x, match.group, x.shape[1] - r))


def step_reference(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Tensors:
    group = match_reference(x, r, cosine, role)[2]
    return merge_reference(x, group, x.shape[1] - r, None)


def torch_step(x: torch.Tensor, r: int, cosine: bool, role: torch.Tensor | None) -> Any:
    """ToMe, §3: all similarities, maximum, sort, gather, scatter the weighted sums, divide by the sizes."""
    metric = x / x.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    unmerged, merged = order[:, r:], order[:, :r]
    target = partner[..., None].gather(1, merged)

    def merge(t: torch.Tensor) -> torch.Tensor:
        source, destination = t[:, ::2], t[:, 1::2]
        B, _, C = source.shape
        moved = source.gather(1, merged.expand(B, r, C))
        stays = source.gather(1, unmerged.expand(B, unmerged.shape[1], C))
        return torch.cat([stays, destination.scatter_reduce(1, target.expand(B, r, C), moved, "sum")], dim=1)

    size = torch.ones_like(x[..., :1])
    total = merge(size)
    return merge(x * size) / total, total


def _moved(case: Case, dtype: torch.dtype) -> float:
    B, N, C = (case.sizes[k] for k in "BNC")
    return float(B * (2 * N + N - case.options["r"]) * C * dtype.itemsize)


SPEC = Spec(
    op="tome_step",
    cases=(CASES[0], *(c for c in CASES if c.bench and "roles" not in c.options)),
    inputs=inputs,
    tolerance=("one_rounding", "reduction"),
    run=step,
    reference=step_reference,
    peers={"torch (published form)": torch_step},
    flops=flops,
    bytes=_moved,
)
