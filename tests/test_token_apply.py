"""What is special to token_apply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_single_sources_are_copies(level: str, dtype: torch.dtype, mean: bool) -> None:
    with at(level) as device:
        x = torch.randn(30, 37, device=device).to(dtype)
        x[4, 5], x[4, 6] = -0.0, float("inf")
        source = torch.randint(30, (50,), dtype=torch.int32, device=device)
        source[7] = 4
        start = torch.arange(51, dtype=torch.int32, device=device)
        weight = torch.rand(50, device=device) + 0.1 if mean else torch.ones(50, device=device)
        for w in (None, weight):
            out = effvlm.token_apply(x, start, source, weight=w, mean=mean)
            same = out.view(torch.int16 if out.itemsize == 2 else torch.int32)
            assert torch.equal(same, x[source.long()].view(same.dtype))


def test_sums_weights_and_empty_rows(level: str) -> None:
    with at(level) as device:
        x = torch.arange(20.0, device=device).view(4, 5)
        plan = _ints(0, 2, 2, 3, 6).to(device), _ints(3, 1, 2, 0, 0, 1).to(device)
        weight = torch.tensor([1.0, 3, 2, -1, 1, 0], device=device)
        total = effvlm.token_apply(x, *plan, weight=weight, mean=False)
        mean = effvlm.token_apply(x, *plan, weight=weight)
    assert torch.equal(total, torch.stack([x[3] + 3 * x[1], 0 * x[0], 2 * x[2], 0 * x[0]]))
    assert torch.equal(mean, torch.stack([(x[3] + 3 * x[1]) / 4, 0 * x[0], x[2], 0 * x[0]]))


def test_it_is_token_merge_for_the_plan_of_its_groups(level: str) -> None:
    with at(level) as device:
        x, group = torch.randn(1, 60, 48, device=device), torch.randint(-1, 20, (1, 60), dtype=torch.int32, device=device)
        weight = torch.rand(1, 60, device=device)
        merged = effvlm.token_merge(x, group, 20, weight=weight).out[0]
        order = group[0].argsort(stable=True)[int((group == -1).sum()) :].int()
        start = torch.cat([_ints(0).to(device), torch.bincount(group[0][order.long()], minlength=20).cumsum(0).int()])
        assert torch.equal(effvlm.token_apply(x[0], start, order, weight=weight[0][order.long()]), merged)


def test_start_may_be_strided(level: str) -> None:
    with at(level) as device:
        x, source = torch.randn(9, 24, device=device), torch.randint(9, (12,), dtype=torch.int32, device=device)
        wide = torch.tensor([[0, 77], [5, 77], [5, 77], [12, 77]], dtype=torch.int32, device=device)
        out = effvlm.token_apply(x, wide[:, 0], source)
        assert torch.equal(out, effvlm.token_apply(x, wide[:, 0].contiguous(), source))
        assert not effvlm.token_apply(x, wide[:1, 0].expand(4), source[:0]).any()


def test_nan_stays_in_the_rows_that_take_it(level: str) -> None:
    with at(level) as device:
        x = torch.randn(3, 20, device=device)
        x[1] = float("nan")
        out = effvlm.token_apply(x, _ints(0, 2, 4, 5).to(device), _ints(0, 1, 0, 2, 1).to(device))
    assert out[[0, 2]].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("level", ["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_cuda_clamps_starts_and_drops_sources(level: str) -> None:
    if level == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with at(level) as device:
        x = torch.randn(4, 16, device=device)
        start, source = _ints(-5, 2, 1, 99, 99).to(device), _ints(3, 4, -1, 2).to(device)
        out = effvlm.token_apply(x, start, source)
    assert torch.equal(out, torch.stack([x[3], 0 * x[0], x[2], 0 * x[0]]))


def test_it_has_a_gradient() -> None:
    x, weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, dtype=torch.float64, requires_grad=True)
    reference = effvlm.ops.token_apply.__globals__["reference"]
    for mean in (True, False):
        assert torch.autograd.gradcheck(lambda x, w: reference(x, _ints(0, 3, 3, 4), _ints(0, 2, 2, 4), w, mean)[0], (x, weight))  # noqa: B023


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 60), st.integers(1, 80), st.booleans(), st.integers(0, 2**31))
def test_rows_do_not_depend_on_each_other(N: int, M: int, E: int, C: int, mean: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, source = torch.randn(N, C, generator=g), torch.randint(N, (E,), generator=g, dtype=torch.int32)
    start = torch.cat([_ints(0), torch.randint(E + 1, (max(M - 1, 0),), generator=g).sort().values.int(), _ints(E)])
    out = effvlm.token_apply(x, start, source, mean=mean)
    for m in range(len(start) - 1):
        own = source[start[m] : start[m + 1]]
        assert torch.equal(effvlm.token_apply(x, _ints(0, len(own)), own, mean=mean)[0], out[m])
