"""Tolerance classes. A spec names one per output; there are no numbers to loosen.

exact          the same bits
one_rounding   16-bit outputs of float32 arithmetic: one unit in the last place of the oracle, plus float32's own rounding
reduction      at most twice the error that plain PyTorch makes in the same dtype, plus a floor of a few float32 roundings
"""

from __future__ import annotations

import torch

_FLOOR = 16 * 2.0**-24  # of the largest magnitude that was summed


def reduction_limit(name: str, oracle: torch.Tensor, same: torch.Tensor, terms: float = 0.0) -> float:
    """The largest error that ``reduction`` allows.

    Args:
        name: of the output, for the message when the reference itself is broken.
        oracle: the float64 result.
        same: PyTorch's result in the dtype of the call.
        terms: magnitude of what is summed, where the result may be smaller than its parts.
    """
    if not oracle.numel():
        return 0.0
    assert torch.isfinite(oracle).all(), f"{name}: the oracle is not finite"
    return 2 * (same.double() - oracle).abs().max().item() + _FLOOR * max(oracle.abs().max().item(), terms)


def assert_close(name: str, got: torch.Tensor, oracle: torch.Tensor, same: torch.Tensor, kind: str) -> None:
    """Raise with count, first coordinate, both values and the share of the limit, when ``got`` is outside its class."""
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    if not got.numel():
        return
    if kind == "exact":
        error, limit = (got != oracle.to(got.dtype)).double(), torch.zeros(())
    else:
        error = (got.double() - oracle).abs()
        limit = torch.tensor(reduction_limit(name, oracle, same), dtype=torch.float64)
        if kind == "one_rounding" and got.dtype != torch.float32:
            info = torch.finfo(got.dtype)
            ulp = torch.exp2(torch.floor(torch.log2(oracle.abs().clamp_min(info.tiny)))) * info.eps
            limit = ulp + _FLOOR * oracle.abs().max()
    wrong = ~(error <= limit)  # a NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        share = (error / limit).max().item()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} outside {kind}; first at {at}: got {got[at].item()}, "
            f"expected {oracle[at].item()}; worst error is {share:.3g} of the limit"
        )
