"""What is special to token_merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_identity_grouping_is_a_copy(level: str, dtype: torch.dtype) -> None:
    with at(level) as device:
        x = torch.randn(2, 9, 37, device=device).to(dtype)
        group = torch.arange(9, dtype=torch.int32, device=device).expand(2, 9)
        weight = torch.rand(2, 9, device=device) + 0.1
        out, total = effvlm.token_merge(x, group, 9, weight=weight)
    assert torch.equal(out, x)
    assert torch.equal(total, weight)


def test_weighted_sum_is_conserved(level: str) -> None:
    with at(level) as device:
        x, weight = torch.randn(2, 50, 24, device=device), torch.randint(1, 9, (2, 50), device=device).float()
        group = torch.randint(0, 7, (2, 50), device=device, dtype=torch.int32)
        out, total = effvlm.token_merge(x, group, 7, weight=weight)
    before, after = (x * weight[..., None]).double().sum(1), (out * total[..., None]).double().sum(1)
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-4)
    assert torch.equal(total.sum(1), weight.sum(1))


def test_drops_and_empty_groups(level: str) -> None:
    with at(level) as device:
        x = torch.randn(1, 4, 5, device=device)
        group = torch.tensor([[2, -1, 2, -1]], dtype=torch.int32, device=device)
        out, total = effvlm.token_merge(x, group, 4)
    assert torch.equal(total, torch.tensor([[0.0, 0, 2, 0]], device=device))
    assert torch.equal(out[0, 2], (x[0, 0] + x[0, 2]) / 2)
    assert not out[0, [0, 1, 3]].any()


def test_nan_stays_in_its_group(level: str) -> None:
    with at(level) as device:
        x = torch.randn(1, 6, 20, device=device)
        x[0, 1] = float("nan")
        group = torch.tensor([[0, 1, 2, 0, 1, 2]], dtype=torch.int32, device=device)
        out = effvlm.token_merge(x, group, 3).out
    assert out[0, 1].isnan().all()
    assert not out[0, [0, 2]].isnan().any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_order_within_a_group_does_not_matter(N: int, M: int, C: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, group = torch.randn(1, N, C, generator=g), torch.randint(-1, M, (1, N), generator=g, dtype=torch.int32)
    shuffle = torch.randperm(N, generator=g)
    a, b = effvlm.token_merge(x, group, M), effvlm.token_merge(x[:, shuffle], group[:, shuffle], M)
    assert torch.allclose(a.out, b.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(a.weight, b.weight)
