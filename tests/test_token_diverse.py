"""What is special to token_diverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at

import effvlm


def _on_axes(n: int, C: int, generator: torch.Generator) -> torch.Tensor:
    """(n, C) multiples of unit vectors: all cosines are 0 or ±1."""
    x = torch.zeros(n, C)
    x[torch.arange(n), torch.randint(C, (n,), generator=generator)] = 2.0 ** torch.randint(-9, 9, (n,), generator=generator)
    return x


def test_dpp_takes_one_of_each_direction_and_then_the_rest_by_relevance(level: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, relevance = _on_axes(40, 6, g)[None], torch.randint(1, 5, (1, 40), generator=g).float()
    with at(level) as device:
        out = effvlm.token_diverse(x.to(device), 40, method="dpp", relevance=relevance.to(device))[0].cpu()
    r, axis = relevance[0], x[0].argmax(-1)
    leaders = [max((i for i in range(40) if axis[i] == a), key=lambda i: (r[i], -i)) for a in axis.unique().tolist()]
    leaders.sort(key=lambda i: (-r[i], i))
    rest = sorted((i for i in range(40) if i not in leaders), key=lambda i: (-r[i], i))
    assert out.tolist() == leaders + rest


def test_zero_tokens_are_at_right_angles_to_all_in_max_min_and_last_in_dpp(level: str) -> None:
    x = torch.tensor([[[1.0, 0], [0, 0], [1, 0], [-1, 0]]])
    with at(level) as device:
        assert effvlm.token_diverse(x.to(device), 4).tolist() == [[1, 0, 3, 2]]
        assert effvlm.token_diverse(x.to(device), 4, method="dpp").tolist() == [[0, 1, 2, 3]]


def test_relevance_of_any_scale_gives_the_same_picks(level: str) -> None:
    with at(level) as device:
        x, relevance = torch.randn(1, 80, 48, device=device), torch.rand(1, 80, device=device)
        a, b = (effvlm.token_diverse(x, 30, method="dpp", relevance=relevance * s) for s in (1.0, 2.0**-30))
    assert torch.equal(a, b)


def test_batch_entries_do_not_know_each_other(level: str) -> None:
    with at(level) as device:
        x = torch.randn(5, 60, 40, device=device)
        for method in ("max_min", "dpp"):
            out = effvlm.token_diverse(x, 20, method=method)
            assert torch.equal(out, torch.cat([effvlm.token_diverse(x[b : b + 1], 20, method=method) for b in range(5)]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 80), st.booleans(), st.integers(0, 2**31))
def test_fewer_picks_are_the_beginning_of_more(N: int, C: int, dpp: bool, seed: int) -> None:
    """What is put off, and until when, depends on k and on what was picked before; the picks do not."""
    g = torch.Generator().manual_seed(seed)
    x, method = torch.randn(1, N, C, generator=g), "dpp" if dpp else "max_min"
    whole = effvlm.token_diverse(x, N, method=method)[0].tolist()
    assert sorted(whole) == list(range(N))
    for k in (0, 1, N // 3, N - 1):
        assert effvlm.token_diverse(x, k, method=method)[0].tolist() == whole[:k]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_tokens_that_are_not_finite_are_named(value: float) -> None:
    x = torch.randn(3, 140, 64)
    x[1, 77, 3] = value
    with pytest.raises(ValueError, match="batch 1, token 77"):
        effvlm.token_diverse(x, 3)


def test_method_must_be_known() -> None:
    with pytest.raises(ValueError, match="'max_min' or 'dpp', got 'l2'"):
        effvlm.token_diverse(torch.randn(1, 4, 4), 1, method="l2")


def test_memory_on_the_cpu_grows_with_tokens_not_their_square() -> None:
    from effvlm import _core

    def workspace(N: int, dpp: bool) -> int:
        view = (0, (1, N, 64), (N * 64, 64, 1), 0, -1)
        return int(_core.token_diverse_workspace(view, 100, None, dpp, (-1, 0, 2)))

    for dpp in (False, True):
        assert workspace(64_000, dpp) < 4.2 * workspace(16_000, dpp)
    assert workspace(64_000, False) < 64_000 * 50
    assert workspace(64_000, True) < 64_000 * 50 * 10
