"""Descent on whole matrices of trits: mean-field annealing, then one trit after the other (coordinate descent).

Both lower J = tr((W − aT) H (W − aT)ᵀ) + λ · (non-zeros of T). GPTQ corrects only weights that come after; here every trit is
chosen again given all others. Annealing replaces each trit by its mean under 2^(−J / τ) while τ falls (Peterson and Anderson,
"A mean field theory learning algorithm for neural networks", 1987; for quantisers: Rose, "Deterministic annealing", 1998),
which avoids the poor local minima that plain descent ends in.
"""

from __future__ import annotations

import torch

TINY = 1e-30


class Descent:
    """Trits under way. Everything is transposed, (B, C, R): a column of the matrix is contiguous.

    Args:
        hessian: (B, C, C) float32, damped, with a diagonal of mean 1.
        product: (B, C, R) float32, H Wᵀ.
        trits: (B, C, R) float32 integers; from :meth:`sweep` at a temperature on, their means.
        scale: (B, 1, R) float32, a.
        top: 1 for three levels, 2 for five.
        block: columns per matrix product.
    """

    def __init__(
        self, hessian: torch.Tensor, product: torch.Tensor, trits: torch.Tensor, scale: torch.Tensor, top: int, block: int
    ) -> None:
        self.hessian, self.product, self.trits, self.scale, self.top, self.block = hessian, product, trits, scale, top, block
        self.diagonal = hessian.diagonal(dim1=1, dim2=2)[:, :, None].clamp(min=TINY)
        B, C, R = trits.shape
        self._wanted, self._change = trits.new_empty(2, B, min(block, C), R)  # large and short-lived: allocated once

    def select(self, which: torch.Tensor) -> Descent:
        """Copies of some matrices of the batch; (B,) bool."""
        return Descent(self.hessian[which], self.product[which], self.trits[which], self.scale[which], self.top, self.block)

    def rounded(self) -> torch.Tensor:
        """(B, R, C) int8, the nearest trits."""
        return self.trits.round().to(torch.int8).mT.contiguous()

    def refit(self) -> None:
        """Round the trits, and fit the scales by least squares: a = tᵀHw / tᵀHt. A row without trits keeps its own."""
        self.trits.round_()
        cross = (self.trits * self.product).sum(1, keepdim=True)
        energy = (self.trits * torch.bmm(self.hessian, self.trits)).sum(1, keepdim=True)
        self.scale = torch.where((cross > 0) & (energy > 0), cross / energy.clamp(min=TINY), self.scale)

    def sweep(self, price: torch.Tensor, temperature: float = 0.0) -> None:
        """Choose every trit once, column after column.

        Args:
            price: (B, 1, 1) float32, λ.
            temperature: τ / a²; 0 takes the best trit.
        """
        unit = 1 / temperature if temperature else 1.0  # energies are divided by τ a²
        price = (price / self.scale.square().clamp(min=TINY) * unit)[:, 0]
        for begin in range(0, self.trits.shape[1], self.block):
            part = slice(begin, begin + self.block)
            trits, hessian, h = self.trits[:, part], self.hessian[:, part], self.diagonal[:, part] * unit
            wanted, change = self._wanted[:, : trits.shape[1]], self._change[:, : trits.shape[1]]
            torch.mul(self.product[:, part], 2 * unit / self.scale, out=wanted)
            wanted.baddbmm_(hessian, self.trits, alpha=-2 * unit).addcmul_(trits, h, value=2)
            coupling = hessian[:, :, part] * (2 * unit)
            for j in range(trits.shape[1]):
                field = wanted[:, j]
                if j:
                    field = field - torch.bmm(coupling[:, j : j + 1, :j], change[:, :j])[:, 0]
                new = (expected if temperature else best)(field, price, h[:, j], self.top)
                torch.sub(new, trits[:, j], out=change[:, j])
                trits[:, j] = new


def best(field: torch.Tensor, price: torch.Tensor, h: torch.Tensor, top: int) -> torch.Tensor:
    """The t in −top … top of least h t² − field · t + price · (t ≠ 0)."""
    size = field.abs()
    if top == 1:
        return torch.where(size > price + h, field.sign(), 0.0)
    level = torch.where(size > 3 * h, 2.0, 1.0)
    return torch.where((size - level * h) * level > price, level.copysign_(field), 0.0)


def expected(field: torch.Tensor, price: torch.Tensor, h: torch.Tensor, top: int) -> torch.Tensor:
    """The mean of t in −top … top under 2^−(h t² − field · t + price · (t ≠ 0))."""
    size = field.abs()
    if top == 1:
        down = (size * -2).exp2_()
        total = (price - size).add_(h).exp2_().add_(down).add_(1)
        return down.neg_().add_(1).div_(total).copysign_(field)
    one, two = (size - price).sub_(h), (size * 2).sub_(price).sub_(4 * h)
    shift = torch.maximum(one, two).clamp_(min=0)
    total, mean = (-shift).exp2_(), torch.zeros_like(size)
    for t, logit in enumerate((one, two), 1):
        up = logit.sub_(shift).exp2()
        down = logit.sub_(size, alpha=2 * t).exp2_()
        total.add_(up).add_(down)
        mean.add_(up.sub_(down), alpha=t)
    return mean.div_(total).copysign_(field)
