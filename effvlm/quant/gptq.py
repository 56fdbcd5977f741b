"""GPTQ for stacks of matrices (Frantar et al., arXiv 2210.17323), in the form that needs no inverse (LDLQ, arXiv 2307.13304)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Factor:
    """H = U diag(d) Uᵀ with ``U`` unit upper triangular: rounding column after column costs Σ d_j (w_j − q_j)².

    Attributes:
        unit: (B, C, C) float32, U.
        cost: (B, C) float32, d; 1 / d_j is the square of what GPTQ's paper divides the error by.
        failed: (B,) bool, matrices that had no factor, and got that of their diagonal.
    """

    unit: torch.Tensor
    cost: torch.Tensor
    failed: torch.Tensor

    def take(self, which: torch.Tensor | slice) -> Factor:
        """Only some of the B matrices."""
        return Factor(self.unit[which], self.cost[which], self.failed[which])


def factor(hessian: torch.Tensor) -> Factor:
    """Factor symmetric (B, C, C) float32 matrices, from the last column to the first."""
    lower, info = torch.linalg.cholesky_ex(hessian.flip(1, 2))
    root = lower.flip(1, 2)
    diagonal = root.diagonal(dim1=1, dim2=2)
    own = hessian.diagonal(dim1=1, dim2=2)
    failed = (info != 0) | ~torch.isfinite(diagonal).all(1) | (diagonal <= 0).any(1)
    unit = torch.where(failed[:, None, None], torch.eye(hessian.shape[1]).to(hessian), root / diagonal[:, None])
    return Factor(unit, torch.where(failed[:, None], own, diagonal.square()), failed)


def gptq(weight: torch.Tensor, factor: Factor, rule: Rule, block: int = 128) -> torch.Tensor:
    """Round columns one after the other, each corrected for the errors of those before it.

    Column j is rounded after adding Σ_{i<j} U_ij (w_i − q_i), which makes tr((W − Q) H (W − Q)ᵀ) the sum of what each column
    costs by itself. Corrections from earlier blocks come as one product per block.

    Args:
        weight: (B, C, R) float32, a column of the matrix per row.
        factor: of the (B, C, C) Hessians.
        rule: gets (B, R) corrected weights of a column and its (B, 1) cost d_j, gives (B, R) rounded ones.
        block: columns per product.

    Returns:
        (B, C, R) float32, the rounded weights.
    """
    error = torch.empty_like(weight)
    rounded = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], block):
        part = slice(begin, begin + block)
        wanted = weight[:, part].clone()
        if begin:
            wanted.baddbmm_(factor.unit[:, :begin, part].mT, error[:, :begin])
        unit = factor.unit[:, part, part].mT.contiguous()
        for j in range(wanted.shape[1]):
            w = wanted[:, j]
            if j:
                w = w + torch.bmm(unit[:, j : j + 1, :j], error[:, begin : begin + j])[:, 0]
            q = rule(w, factor.cost[:, begin + j, None])
            rounded[:, begin + j] = q
            error[:, begin + j] = weight[:, begin + j] - q
    return rounded
