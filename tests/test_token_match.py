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


def test_roles_that_alternate_are_those_without(level: str) -> None:
    with at(level) as device:
        x = torch.randn(2, 301, 70, device=device)
        role = (1 + torch.arange(301, device=device) % 2).to(torch.uint8)
        plain, match = effvlm.token_match(x, 60), effvlm.token_match(x, 60, role=role)
    assert torch.equal(match.score[:, ::2], plain.score)
    assert torch.equal(match.partner[:, ::2], plain.partner)
    assert torch.equal(match.group, plain.group)
    assert (match.score[:, 1::2] == -torch.inf).all()
    assert (match.partner[:, 1::2] == -1).all()


def test_what_has_no_role_may_be_anything_and_stays(level: str) -> None:
    """Padding: entries of several lengths give what each gives alone."""
    lengths, g = (260, 97, 1), torch.Generator().manual_seed(2)
    with at(level) as device:
        x = torch.randn(3, 260, 64, generator=g)
        role = torch.randint(1, 3, (3, 260), generator=g, dtype=torch.int8)
        for b, n in enumerate(lengths):
            x[b, n:], role[b, n:] = torch.nan, 0
        x, role = x.to(device), role.to(device)
        match = effvlm.token_match(x, 0, metric="dot", role=role)
        for b, n in enumerate(lengths):
            alone = effvlm.token_match(x[b : b + 1, :n], 0, metric="dot", role=role[b : b + 1, :n])
            assert torch.allclose(match.score[b, :n], alone.score[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(match.partner[b, :n], alone.partner[0])
            assert (match.partner[b, n:] == -1).all()
    assert torch.equal(match.group.cpu(), torch.arange(260, dtype=torch.int32).expand(3, -1))


def test_more_pairs_than_sources(level: str) -> None:
    """The CPU says so; CUDA, where counting would wait for the device, merges what there is."""
    with at(level) as device:
        x, role = torch.ones(1, 9, 8, device=device), torch.tensor([0, 1, 2, 1, 2, 0, 1, 0, 2], dtype=torch.uint8, device=device)
        if level in ("simt", "cuda"):
            assert effvlm.token_match(x, 5, role=role).group.tolist() == [[0, 1, 1, 1, 2, 3, 1, 4, 5]]
            assert effvlm.token_match(x, 5, role=role.clamp_max(1)).group.tolist() == [list(range(9))]
        else:
            with pytest.raises(ValueError, match="3 at batch 0, got r = 5"):
                effvlm.token_match(x, 5, role=role)


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
        return int(_core.token_match_workspace((0, (1, N, 64), (N * 64, 64, 1), 0, -1), 0, True, None, (-1, 0, 2)))

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
