"""What is special to token_select."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm
from effvlm.ops.token_select import RULES

INF = math.inf


def _kept(level: str, score: list[float], limit: float, rule: str) -> list[int]:
    with at(level) as device:
        kept, count = effvlm.token_select(torch.tensor(score, dtype=torch.float32, device=device), limit, rule=rule)
    assert count.tolist() == [int(kept.sum())]
    return kept.nonzero()[:, 0].tolist()


def test_top(level: str) -> None:
    score = [1.0, 3, 3, -INF, 2, 3, INF, -0.0, 0.0]
    for limit, expected in ((0, [6]), (2.9, [1, 6]), (3, [1, 2, 6]), (6, [0, 1, 2, 4, 5, 6]), (7, [0, 1, 2, 4, 5, 6, 7])):
        assert _kept(level, score, limit, "top") == expected
    for limit in (8, 9, 1e30, INF):
        assert _kept(level, score, limit, "top") == [0, 1, 2, 4, 5, 6, 7, 8]
    assert _kept(level, [INF, 1, INF, INF], 2, "top") == [0, 2, 3]  # +inf is always kept
    assert _kept(level, [1, 2], -1, "top") == []


def test_above(level: str) -> None:
    score = [1.0, -0.0, -INF, 0.0, INF, -2]
    for limit, expected in ((0.0, [0, 1, 3, 4]), (-0.0, [0, 1, 3, 4]), (1, [0, 4]), (-INF, [0, 1, 3, 4, 5]), (INF, [4])):
        assert _kept(level, score, limit, "above") == expected


def test_iqr(level: str) -> None:
    assert _kept(level, [1.0, 2, 3, 4, INF, -INF], 0, "iqr") == [3, 4]  # Q3 = 3.25
    assert _kept(level, [1.0, 2, 3, 4, 5], 0, "iqr") == [4]  # Q3 = 4, not above itself
    assert _kept(level, [1.0, 2, 3, 4, 5], -0.5, "iqr") == [3, 4]
    assert _kept(level, [-INF, INF], 0, "iqr") == [1]
    assert _kept(level, [2.0, 2, 2], 1.5, "iqr") == []
    assert _kept(level, [2.0, 2, 2], INF, "iqr") == []  # inf·0
    assert _kept(level, [1.0, 2, 3], -INF, "iqr") == [0, 1, 2]


def test_top_p(level: str) -> None:
    score = [1.0, 4, 2, -INF, 1, INF, 0]
    for limit, expected in (
        (0, [1, 5]),
        (0.5, [1, 5]),
        (0.501, [1, 2, 5]),
        (0.75, [1, 2, 5]),
        (0.76, [0, 1, 2, 5]),
        (1, [0, 1, 2, 4, 5]),
    ):
        assert _kept(level, score, limit, "top_p") == expected
    assert _kept(level, score, 7, "top_p") == [0, 1, 2, 4, 5]
    assert _kept(level, [0.0, -0.0, -INF], 1, "top_p") == []
    assert _kept(level, [1e-45, 0, 1e-45], 1, "top_p") == [0, 2]
    assert _kept(level, [3e38, 3e38, 3e38], 0.5, "top_p") == [0, 1]
    assert _kept(level, [1, 2, 2, 2, 1], 0.5, "top_p") == [1, 2]  # 4 of 8, exactly
    assert _kept(level, [1, 1, 1, 1], 0.5, "top_p") == [0, 1]


def test_quartiles_are_numpys(level: str) -> None:
    for n in (1, 2, 3, 4, 5, 6, 7, 50, 401):
        score = torch.randn(n, dtype=torch.float32)
        q1, q3 = np.quantile(score.numpy().astype(np.float64), [0.25, 0.75])
        for limit in (0.0, 0.5, 1.0):
            expected = (score.double() > q3 + limit * (q3 - q1)).nonzero()[:, 0].tolist()
            assert _kept(level, score.tolist(), limit, "iqr") == expected


@pytest.mark.parametrize("rule", RULES)
def test_segments_do_not_see_each_other_and_any_strides_will_do(level: str, rule: str) -> None:
    with at(level) as device:
        score = (torch.randint(0, 9, (3, 200), device=device) / 4).float().T[:, 1]
        start = torch.tensor([[0, 9], [3, 9], [3, 9], [150, 9], [200, 9]], dtype=torch.int32, device=device)[:, 0]
        limit = torch.tensor([0.5, 9, 1.0, 0.9], device=device)
        kept, count = effvlm.token_select(score, limit, rule=rule, start=start)
        for s in range(4):
            a, b = int(start[s]), int(start[s + 1])
            alone = effvlm.token_select(score[a:b].contiguous(), float(limit[s]), rule=rule)
            assert torch.equal(alone.kept, kept[a:b])
            assert alone.count.tolist() == count[s : s + 1].tolist()


@pytest.mark.parametrize("level", ["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_the_cpu_refuses_cuda_takes_for_minus_infinity(level: str) -> None:
    if level == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    nan = math.nan
    assert _kept(level, [1, nan, 2, nan, 3], 2, "top") == [2, 4]
    assert _kept(level, [1, nan, -2, nan, 3], 1, "top_p") == [0, 4]
    for rule in RULES:
        assert _kept(level, [1, INF, 2], nan, rule) == [1]
    with at(level) as device:
        start = torch.tensor([-7, 2, 99], dtype=torch.int32, device=device)
        kept, count = effvlm.token_select(torch.tensor([1.0, 2, 3, 4], device=device), 1, start=start)
    assert kept.tolist() == [False, True, False, True]
    assert count.tolist() == [1, 1]


def test_levels_agree_to_the_bit(level: str) -> None:
    generator = torch.Generator().manual_seed(3)
    score = 10 ** (8 * torch.rand(1500, generator=generator) - 6)
    with at("scalar"):
        expected = [effvlm.token_select(score, limit, rule="top_p").kept for limit in (0.3, 0.9, 0.999999, 1.0)]
    with at(level) as device:
        got = [effvlm.token_select(score.to(device), limit, rule="top_p").kept.cpu() for limit in (0.3, 0.9, 0.999999, 1.0)]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 1.0, 1e-30, 3e38, INF]), max_size=40), st.integers(-1, 42))
def test_top_is_what_a_stable_sort_gives(score: list[float], limit: int) -> None:
    x = torch.tensor(score, dtype=torch.float32)
    best = set(x.argsort(descending=True, stable=True)[: max(limit, 0)].tolist())
    kept, _ = effvlm.token_select(x, limit)
    assert kept.tolist() == [x[i] == INF or (x[i] != -INF and i in best) for i in range(len(score))]
