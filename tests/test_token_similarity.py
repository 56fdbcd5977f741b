"""What is special to token_similarity."""

from __future__ import annotations

import math

import pytest
import torch
from levels import at

import effvlm

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_rows_are_alike_exactly(level: str, dtype: torch.dtype) -> None:
    with at(level) as device:
        x = (10 ** (6 * torch.rand(40, 1) - 3) * torch.randn(40, 333)).to(device, dtype)
        assert (effvlm.token_similarity(x, x.clone()) == 1).all()
        assert (effvlm.token_similarity(x, -x) == -1).all()
        assert effvlm.token_similarity(x, 2 * x).max() <= 1


def test_views_of_one_storage_give_what_copies_give(level: str) -> None:
    with at(level) as device:
        for frames, P, C in ((5, 7, 300), (40, 3, 24), (2, 90, 65), (4, 1, 9)):
            x = torch.randn(frames * P, C, device=device)
            for a, b in ((x[P:], x[:-P]), (x[:-P], x[P:]), (x[P:].flip(0), x[:-P].flip(0))):
                assert torch.equal(effvlm.token_similarity(a, b), effvlm.token_similarity(a.clone(), b.clone()))
            assert torch.equal(effvlm.token_similarity(x[2:], x[1:-1]), effvlm.token_similarity(x[1:], x[:-1])[1:])
            every = effvlm.token_similarity(x[P:, ::2], x[:-P, ::2])
            assert torch.equal(every, effvlm.token_similarity(x[P:, ::2].clone(), x[:-P, ::2].clone()))


def test_a_row_of_all_rows(level: str) -> None:
    with at(level) as device:
        x = torch.randn(30, 48, device=device)
        one = effvlm.token_similarity(x, x[3:4].clone().expand(30, 48))
        assert torch.equal(one, effvlm.token_similarity(x, x[3:4].repeat(30, 1)))
        assert one[3] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_nan_stays_in_its_row(level: str, value: float) -> None:
    with at(level) as device:
        a, b = torch.randn(9, 50, device=device), torch.randn(9, 50, device=device)
        a[2, 7] = b[5, 0] = value
        out = effvlm.token_similarity(a, b)
    assert out.isnan().nonzero()[:, 0].tolist() == [2, 5]


def test_rows_of_zeros(level: str) -> None:
    with at(level) as device:
        a, b = torch.randn(4, 20, device=device), torch.randn(4, 20, device=device)
        a[1], b[2] = 0, 0
        out = effvlm.token_similarity(a, b)
    assert (out == 0).tolist() == [False, True, True, False]


def test_it_has_a_gradient_at_zero_too() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    a[1] = 0
    a.requires_grad_()
    with pytest.warns(UserWarning, match="token_similarity"):
        effvlm.token_similarity(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
