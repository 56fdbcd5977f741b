"""Matrices to round and the Hessians to round them under, brought into a form that search and descent like."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from effvlm.quant.gptq import Factor, factor

TINY = 1e-30
DIRECTIONS, ROUNDS = 4, 8  # of the inputs' largest principal components, and of the iteration that finds them
LARGEST = 0.1  # share of the trace that one direction keeps while trits are sought
FLOOR = 1e-4  # of the mean diagonal, added to all of it
FEW = 64  # rows that prices are found on


@dataclass(frozen=True)
class Problem:
    """B matrices of mean square 1, and Hessians whose diagonals have mean 1.

    A direction that holds most of the inputs' energy, as their mean often does, makes every single trit expensive to change, so
    that descent stops early. GPTQ and annealing therefore see it clipped; the last descents restore it.

    Attributes:
        weight: (B, C, R) float32: transposed, a column of the matrix is contiguous.
        hessian: (B, C, C) float32, clipped and damped.
        whole: (B, C, C) float32, damped but not clipped.
        lift: (B, C, 4) float32; ``whole`` − ``hessian`` is ``lift`` ``lift``ᵀ.
        damping: (B, C) float32, in the diagonal of ``hessian``.
        factor: of ``hessian``.
        product: (B, C, R) float32, ``hessian`` Wᵀ.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    whole: torch.Tensor
    lift: torch.Tensor
    damping: torch.Tensor
    factor: Factor
    product: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, hessian: torch.Tensor, damp: torch.Tensor) -> Problem:
        """Set up (B, R, C) weights under (B, C, C) Hessians with a diagonal of positive mean.

        The damping is a share (B,) of each diagonal entry, of what is left of it when the largest directions are clipped: the
        same whatever units the input channels have, and whatever their mean (Marquardt, 1963; Schäfer and Strimmer, 2005).
        """
        hessian = hessian.float()
        lift = largest_directions(hessian)
        own = hessian.diagonal(dim1=1, dim2=2) - lift.square().sum(2)
        damping = damp[:, None].float() * own.clamp(min=0) + FLOOR * own.mean(1, keepdim=True)
        unit = (own + damping).mean(1)[:, None, None]
        whole = hessian / unit
        lift, damping = lift / unit.sqrt(), damping / unit[:, 0]
        whole.diagonal(dim1=1, dim2=2).add_(damping)
        clipped = torch.baddbmm(whole, lift, lift.mT, alpha=-1)
        transposed = weight.float().mT.contiguous()
        transposed /= transposed.square().mean((1, 2), keepdim=True).sqrt().clamp(min=TINY)
        return cls(transposed, clipped, whole, lift, damping, factor(clipped), torch.bmm(clipped, transposed))

    def rows(self) -> tuple[Problem, torch.Tensor]:
        """The same with a few of the R rows, evenly spaced, and which."""
        R = self.weight.shape[2]
        places = torch.linspace(0, R - 1, min(R, FEW), device=self.weight.device).round().long()
        few = replace(self, weight=self.weight[:, :, places], product=self.product[:, :, places])
        return few, places

    def take(self, which: torch.Tensor) -> Problem:
        """Only some of the B matrices; (B,) bool."""
        if bool(which.all()):
            return self
        names = ("weight", "hessian", "whole", "lift", "damping", "product")
        return replace(self, factor=self.factor.take(which), **{name: getattr(self, name)[which] for name in names})

    def whole_product(self) -> torch.Tensor:
        """(B, C, R) float32, ``whole`` Wᵀ."""
        return torch.baddbmm(self.product, self.lift, torch.bmm(self.lift.mT, self.weight))

    def share_lost(self, trits: torch.Tensor) -> torch.Tensor:
        """(B,) share of tr(W H Wᵀ) that (B, R, C) trits lose at their least-squares scales; neither damped nor clipped."""
        w, t = self.weight, trits.mT.float()
        damping = self.damping[:, :, None]
        hw, ht = self.whole_product() - damping * w, torch.bmm(self.whole, t) - damping * t
        own, cross, energy = ((a * b).sum(1) for a, b in ((w, hw), (t, hw), (t, ht)))
        return 1 - (cross.square() / energy.clamp(min=TINY)).sum(1) / own.sum(1).clamp(min=TINY)


def largest_directions(hessian: torch.Tensor) -> torch.Tensor:
    """What to clip, by subspace iteration: eigenvectors times √(eigenvalue − a tenth of the trace), zeros below that.

    Args:
        hessian: (B, C, C) float32, positive semidefinite.

    Returns:
        (B, C, 4) float32 (fewer for C < 4).
    """
    B, C, _ = hessian.shape
    k = min(DIRECTIONS, C)
    place = torch.arange(C, device=hessian.device, dtype=torch.float32)[:, None] + 0.5
    basis = torch.cos(math.pi / C * place * torch.arange(k, device=hessian.device)).expand(B, C, k)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(torch.bmm(hessian, basis)).Q
    values, turn = torch.linalg.eigh(torch.bmm(basis.mT, torch.bmm(hessian, basis)))
    most = LARGEST * hessian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    lift: torch.Tensor = torch.bmm(basis, turn) * (values - most).clamp(min=0).sqrt()[:, None]
    return lift
