"""What is special to token_score."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def test_every_row_gives_its_weight(level: str) -> None:
    """Rows of softmax sum to one, so all keys together receive the sum of weights."""
    with at(level) as device:
        query, key = torch.randn(2, 4, 37, 20, device=device), torch.randn(2, 2, 53, 20, device=device)
        weight = torch.rand(2, 37, device=device)
        c = effvlm.token_score(query, key, weight=weight, causal=True, heads="none")
    assert torch.allclose(c.sum(-1), weight.sum(-1, keepdim=True).expand(2, 4), rtol=1e-5)


def test_lse_of_flash_attention_fits() -> None:
    query, key, value = (torch.randn(1, 4, 90, 64).bfloat16() for _ in range(3))
    lse = FLASH(query, key, value, 0.0, True)[1]
    given = effvlm.token_score(query, key, lse=lse, causal=True)
    assert torch.allclose(given, effvlm.token_score(query, key, causal=True), rtol=1e-4)


def test_packed_sequences_are_sequences(level: str) -> None:
    places = (0, 7, 7, 8, 27)
    with at(level) as device:
        query, key = torch.randn(1, 2, 27, 12, device=device), torch.randn(1, 2, 27, 12, device=device)
        start = torch.tensor(places, dtype=torch.int32, device=device)
        packed = effvlm.token_score(query, key, start=start, causal=True)
        for a, b in itertools.pairwise(places):
            alone = effvlm.token_score(query[:, :, a:b], key[:, :, a:b], causal=True)
            assert torch.allclose(packed[:, a:b], alone, rtol=1e-5)


def test_a_lone_key_receives_exactly_one(level: str) -> None:
    with at(level) as device:
        query, key = 30 * torch.randn(1, 3, 21, 16, device=device), torch.randn(1, 3, 21, 16, device=device)
        start = torch.arange(22, dtype=torch.int32, device=device)
        out = effvlm.token_score(query, key, start=start)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_nobody_sees_does_no_harm(level: str, bad: float) -> None:
    """Rows of weight 0, keys after the diagonal, and rows and keys of other sequences may hold anything."""
    with at(level) as device:
        query, key = torch.randn(1, 2, 40, 16, device=device), torch.randn(1, 2, 40, 16, device=device)
        weight = torch.ones(1, 40, device=device)
        weight[:, 30:] = 0
        clean = effvlm.token_score(query, key, weight=weight, causal=True)
        query[:, :, 30:], key[:, :, 30:] = bad, bad
        out = effvlm.token_score(query, key, weight=weight, causal=True)
        start = torch.tensor([0, 30, 40], dtype=torch.int32, device=device)
        packed = effvlm.token_score(query, key, start=start)
    assert torch.equal(out[:, :30], clean[:, :30])
    assert not out[:, 30:].any()
    assert packed[:, :30].isfinite().all()
    assert packed[:, 30:].isnan().all()


def test_nan_of_a_visible_key_is_seen(level: str) -> None:
    with at(level) as device:
        query, key = torch.randn(1, 3, 20, 16, device=device), torch.randn(1, 3, 20, 16, device=device)
        key[0, 1, 5] = float("nan")
        lse = torch.zeros(1, 3, 20, device=device)
        out = {heads: effvlm.token_score(query, key, lse=lse, heads=heads) for heads in ("mean", "sum", "max", "none")}
    for result in out.values():
        assert result[..., 5].isnan().any()
        assert result[..., :5].isfinite().all()


def test_scores_beyond_float32_exponents(level: str) -> None:
    """Softmax needs no range: the largest score of each row is what counts."""
    with at(level) as device:
        query, key = torch.full((1, 1, 5, 4), 100.0, device=device), torch.randn(1, 1, 9, 4, device=device)
        out = effvlm.token_score(query, key, scale=1.0)
    assert out.isfinite().all()
    assert torch.allclose(out.sum(), torch.tensor(5.0, device=device), rtol=1e-5)


def test_workspace_stays_small() -> None:
    """2 MB beside 32 heads of 2944 rows, whose matrix would be half a gigabyte."""
    from effvlm import _core, _library

    tensors = (torch.empty(1, 32, 2944, 128, dtype=torch.bfloat16),) * 2 + (torch.empty(1, 32, 2944),)
    assert _core.token_score_workspace(*_library.views(tensors), None, None, True, 0.1, "mean", (-1, 0, 2)) < 2**20


def test_gradients_come_from_the_reference() -> None:
    query, key = torch.randn(1, 2, 6, 4, requires_grad=True), torch.randn(1, 2, 9, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the reference runs, said once per process
        out = effvlm.token_score(query, key, causal=True, heads="max")
    out.square().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 90), st.integers(1, 120), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_any_shape(L: int, S: int, D: int, causal: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(1, 2, L, D, generator=g), torch.randn(1, 1, S, D, generator=g)
    out = effvlm.token_score(query, key, causal=causal)
    with effvlm._library.backend("reference"):
        expected = effvlm.token_score(query, key, causal=causal)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
