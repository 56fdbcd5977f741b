"""The price of a non-zero at which trits cost a wanted rate: a secant in logarithms between bounds (regula falsi)."""

from __future__ import annotations

import torch

PRICE_MIN, PRICE_MAX = 1e-2, 1e2  # in units of the weights' mean square times the mean of H's diagonal
SLOPE = (-3.0, -0.05)  # d log(rate) / d log(price) that is believed


class PriceSearch:
    """Prices for B matrices at once.

    Args:
        rate: (B,) wanted, in bits per weight of the code alone, without scales and directory.

    Attributes:
        price: (B,) float32, to try next.
        slope: (B,) float32, d log(rate) / d log(price) as last seen.
    """

    def __init__(self, rate: torch.Tensor) -> None:
        self.goal = rate.float().clamp(min=0.01).log()
        self.price = (4 * torch.exp(-2 * rate.float())).clamp(PRICE_MIN, PRICE_MAX)
        self.slope = torch.full_like(self.goal, -0.7)
        self.renew()

    def take(self, which: torch.Tensor) -> PriceSearch:
        """The same for some matrices, (B,) bool, renewed."""
        made = PriceSearch(self.goal[which].exp())
        made.price, made.slope = self.price[which], self.slope[which]
        return made

    def renew(self) -> None:
        """Keep price and slope, forget what was seen: the rates that follow are of something else."""
        self.low, self.high = torch.full_like(self.goal, -torch.inf), torch.full_like(self.goal, torch.inf)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.off = torch.full_like(self.goal, torch.inf)

    def saw(self, rate: torch.Tensor) -> None:
        """(B,) what came at ``price``; sets ``price`` to what follows from it."""
        at, y = self.price.log(), rate.clamp(min=1e-3).log()
        if self.last is not None:
            step = at - self.last[0]
            slope = (y - self.last[1]) / torch.where(step.abs() > 0.02, step, torch.inf)
            self.slope = torch.where((slope > SLOPE[0]) & (slope < SLOPE[1]), slope, self.slope)
        self.last = (at, y)
        self.off = y - self.goal
        self.low = torch.where(self.off > 0, torch.maximum(self.low, at), self.low)
        self.high = torch.where(self.off < 0, torch.minimum(self.high, at), self.high)
        new = at - (self.off / self.slope).clamp(-1.5, 1.5)
        middle = (self.low + self.high) / 2
        outside = (new <= self.low) | (new >= self.high)
        self.price = torch.where(outside & torch.isfinite(middle), middle, new).exp().clamp(PRICE_MIN, PRICE_MAX)

    def met(self, tolerance: float) -> torch.Tensor:
        """(B,) bool: the last rate was as wanted, or is the most that there is."""
        return (self.off.abs() < tolerance) | ((self.off < 0) & self.exhausted())

    def exhausted(self) -> torch.Tensor:
        """(B,) bool: non-zeros were free of charge already."""
        return torch.zeros_like(self.off, dtype=torch.bool) if self.last is None else self.last[0].exp() <= 1.01 * PRICE_MIN
