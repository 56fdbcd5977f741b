"""Methods: counts, order, sizes, identity."""

from __future__ import annotations

import pytest
import torch

from effvlm.tokens import Stride, Tokens, ToMe
from effvlm.tokens.base import kept

METHODS = [ToMe, Stride]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [1, 2, 3, 9, 144, 577])
def test_counts_order_and_sizes(method: type, N: int) -> None:
    x = torch.randn(2, N, 24)
    for keep in (0.001, 0.1, 0.25, 0.5, 0.77, 1.0):
        out = method(keep=keep)(Tokens.of(x))
        M = kept(keep, N)
        assert out.x.shape == (2, M, 24)
        assert out.size.shape == out.position.shape == (2, M)
        assert (out.position.diff(dim=1) > 0).all()
        assert out.position.min() >= 0
        assert out.position.max() < N
        if method is ToMe:
            assert torch.equal(out.size.sum(1), torch.full((2,), float(N)))
            mean = (out.x * out.size[..., None]).sum(1) / N
            assert torch.allclose(mean, x.mean(1), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_nothing(method: type) -> None:
    tokens = Tokens.of(torch.randn(1, 20, 8))
    out = method(keep=1.0)(tokens)
    assert out.x is tokens.x


def test_tome_merges_what_is_alike_first() -> None:
    x = torch.eye(8)[None].repeat(1, 1, 1)
    x[0, 4] = x[0, 1]  # the only pair that is alike
    out = ToMe(keep=7 / 8)(Tokens.of(x))
    assert out.position[0].tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert out.size[0].tolist() == [1, 2, 1, 1, 1, 1, 1]
    assert torch.equal(out.x[0, 1], x[0, 1])


def test_tome_anchors_stay_in_place_over_rounds() -> None:
    """With all tokens alike, each round merges the first sources into the first destination."""
    out = ToMe(keep=0.25)(Tokens.of(torch.ones(1, 16, 4)))
    assert out.x.shape[1] == 4
    assert out.size.sum() == 16
    assert torch.equal(out.x, torch.ones(1, 4, 4))


def test_singletons_keep_their_own_features() -> None:
    x = torch.randn(1, 100, 16)
    out = ToMe(keep=0.6)(Tokens.of(x))
    single = out.size[0] == 1
    assert single.any()
    assert torch.equal(out.x[0, single], x[0, out.position[0, single]])


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_keep_outside_its_range(method: type, keep: float) -> None:
    with pytest.raises(ValueError, match=rf"{method.__name__}: expected keep in \(0, 1\]"):
        method(keep=keep)


def test_keep_of_a_wrong_type_and_unknown_metric() -> None:
    with pytest.raises(TypeError, match="number in"):
        ToMe(keep="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cosine' or 'dot', got 'l2'"):
        ToMe(metric="l2")


def test_features_must_be_finite_and_of_rank_three() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        Tokens.of(torch.full((1, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"\(B, N, C\)"):
        Tokens.of(torch.zeros(4, 4))
