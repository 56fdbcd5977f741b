"""What is special to token_match."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm


def test_equal_tokens_match_the_first_and_merge_from_the_first(level: str) -> None:
    with at(level) as device:
        match = effvlm.token_match(torch.ones(2, 301, 70, device=device), 4)
    assert (match.partner == 1).all()
    assert torch.allclose(match.score.cpu(), torch.ones(2, 151))
    assert match.group[0, :10].tolist() == [0, 0, 0, 1, 0, 2, 0, 3, 4, 5]


def test_scores_are_scale_invariant_by_powers_of_two(level: str) -> None:
    with at(level) as device:
        x = torch.randn(1, 260, 96, device=device)
        scale = 2.0 ** torch.randint(-20, 20, (1, 260, 1), device=device)
        a, b = effvlm.token_match(x, 50), effvlm.token_match(x * scale, 50)
    assert torch.equal(a.partner, b.partner)
    assert torch.allclose(a.score, b.score, rtol=1e-6)


def test_zero_tokens_score_zero(level: str) -> None:
    with at(level) as device:
        x = torch.randn(1, 200, 64, device=device)
        x[0, ::2] = 0
        match = effvlm.token_match(x, 0)
    assert not match.score.any()
    assert (match.partner == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_tokens_that_are_not_finite_are_named(value: float) -> None:
    x = torch.randn(3, 140, 64)
    x[1, 77, 3] = value
    with pytest.raises(ValueError, match="batch 1, token 77"):
        effvlm.token_match(x, 3)


def test_metric_must_be_known() -> None:
    with pytest.raises(ValueError, match="'cosine' or 'dot', got 'l2'"):
        effvlm.token_match(torch.randn(1, 4, 4), 1, metric="l2")


def test_memory_grows_with_tokens_not_their_square() -> None:
    from effvlm import _core

    def workspace(N: int) -> int:
        return int(_core.token_match_workspace((0, (1, N, 64), (N * 64, 64, 1), 0, -1), 0, True, (-1, 0, 2)))

    assert workspace(64_000) < 4.2 * workspace(16_000)
    assert workspace(64_000) < 64_000 * 2_000  # the similarities alone would be 4 GB


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(2, 300), st.integers(1, 130), st.booleans(), st.integers(0, 2**31))
def test_groups_are_dense_ordered_and_right_in_size(B: int, N: int, C: int, cosine: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, r = torch.randn(B, N, C, generator=g), int(torch.randint(0, N // 2 + 1, (), generator=g))
    score, partner, group = effvlm.token_match(x, r, metric="cosine" if cosine else "dot")
    for b in range(B):
        assert group[b].unique().tolist() == list(range(N - r))
        merged = [i for i in range(len(score[b])) if group[b, 2 * i] == group[b, partner[b, i]]]
        assert len(merged) == r
        kept = [i for i in range(len(score[b])) if i not in set(merged)]
        assert not merged or not kept or score[b, merged].min() >= score[b, kept].max()
        anchors = [n for n in range(N) if n % 2 or n // 2 not in set(merged)]
        assert group[b, anchors].tolist() == list(range(N - r))
