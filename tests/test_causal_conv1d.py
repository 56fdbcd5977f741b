"""What is special to causal_conv1d."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from levels import at

import effvlm


def test_agrees_with_conv1d_and_takes_its_weight(level: str) -> None:
    conv = torch.nn.Conv1d(20, 20, 4, groups=20, padding=3)
    x = torch.randn(2, 20, 33)
    with at(level) as device, torch.no_grad():
        out = effvlm.causal_conv1d(x.to(device), conv.weight.to(device), conv.bias.to(device), activation="swish")
        expected = F.silu(conv(x)[..., :33])
    assert torch.allclose(out.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [3, 4, 9])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_split_gives_the_same_bits(level: str, dtype: torch.dtype, M: int, channels_last: bool) -> None:
    """One call, pieces with the state carried over, and single steps."""
    with at(level) as device:
        x, weight = torch.randn(2, 21, 30, device=device).to(dtype), torch.randn(21, 4, device=device).to(dtype)
        x = x.mT.contiguous().mT if channels_last else x
        whole = effvlm.causal_conv1d(x, weight, activation="silu")
        for cuts in ((0, 30), (0, 2, 2, 19, 30), tuple(range(31))):
            state = torch.zeros(2, 21, M, dtype=dtype, device=device)
            parts = [
                effvlm.causal_conv1d(x[..., a:b], weight, state=state, activation="silu") for a, b in itertools.pairwise(cuts)
            ]
            assert torch.equal(torch.cat(parts, -1), whole)
            assert torch.equal(state, x[..., -M:])


def test_packed_sequences_are_sequences(level: str) -> None:
    with at(level) as device:
        x, weight, state = (torch.randn(*s, device=device) for s in ((1, 18, 25), (18, 7), (3, 18, 6)))
        starts = torch.tensor([0, 4, 4, 25], dtype=torch.int32, device=device)
        apart = state.clone()
        expected = [
            effvlm.causal_conv1d(x[..., a:b], weight, state=apart[i : i + 1])
            for i, (a, b) in enumerate(((0, 4), (4, 4), (4, 25)))
        ]
        before = state[1].clone()
        out = effvlm.causal_conv1d(x, weight, state=state, cu_seqlens=starts)
    assert torch.equal(out, torch.cat(expected, -1))
    assert torch.equal(state, apart)
    assert torch.equal(state[1], before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_result_is_stored_as_the_input_is(channels_last: bool) -> None:
    x = torch.randn(2, 5, 7)
    x = x.mT.contiguous().mT if channels_last else x
    assert effvlm.causal_conv1d(x, torch.randn(5, 3)).stride() == x.stride()


def test_nan_reaches_its_own_outputs_only(level: str) -> None:
    with at(level) as device:
        x = torch.randn(1, 20, 40, device=device)
        x[0, 3, 10] = float("nan")
        out = effvlm.causal_conv1d(x, torch.randn(20, 4, device=device), activation="silu")
    assert out[0, 3, 10:14].isnan().all()
    assert int(out.isnan().sum()) == 4


def test_extremes_stay_finite(level: str) -> None:
    with at(level) as device:
        x = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30] * 5, device=device).view(1, 1, 35)
        weight = torch.tensor([[0.0, 1.0]], device=device)
        out = effvlm.causal_conv1d(x, weight, activation="silu")
    assert torch.allclose(out, F.silu(x), rtol=1e-6, atol=1e-7)


def test_wrong_activation() -> None:
    with pytest.raises(ValueError, match="causal_conv1d: expected activation None, 'silu' or 'swish', got 'relu'"):
        effvlm.causal_conv1d(torch.randn(1, 4, 5), torch.randn(4, 3), activation="relu")


def test_as_transformers_has_it() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    x, weight, bias = torch.randn(2, 24, 11), torch.randn(24, 4), torch.randn(24)
    expected = modeling.causal_conv1d_fn(x, weight, bias, "silu")
    assert torch.allclose(effvlm.causal_conv1d(x, weight, bias, activation="silu"), expected, rtol=1e-5, atol=1e-6)
    for M in (3, 4):
        state = torch.randn(2, 24, M)
        same = state.clone()
        expected = modeling.causal_conv1d_update(x[..., :1], state, weight, bias, "silu")
        out = effvlm.causal_conv1d(x[..., :1], weight, bias, state=same, activation="silu")
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(state, same)


def test_gradients_run_the_reference_which_writes_the_state_too() -> None:
    x, weight = torch.randn(1, 6, 8), torch.randn(6, 4, requires_grad=True)
    state = torch.zeros(1, 6, 3)
    with pytest.warns(UserWarning, match="causal_conv1d") if "causal_conv1d" not in effvlm._library._said else _nothing():
        effvlm.causal_conv1d(x, weight, state=state).sum().backward()
    assert weight.grad is not None
    assert torch.equal(state, x[..., -3:])


def _nothing() -> object:
    import contextlib

    return contextlib.nullcontext()


def test_silu_for_bfloat16_is_right_before_it_is_rounded() -> None:
    """A shorter exponential and no division, but what is stored is the nearest number in all but some of a thousand places."""
    x = torch.linspace(-80, 80, 200_001).bfloat16()
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0]).bfloat16()])
    found = effvlm.causal_conv1d(x[None, :, None], torch.tensor([[0, 1]]).bfloat16().expand(len(x), 2), activation="silu")
    expected = F.silu(x.double()).bfloat16()
    wrong = found.flatten() != expected
    assert wrong[:-6].float().mean() < 0.005
    torch.testing.assert_close(found.flatten(), expected, rtol=2**-7, atol=0, equal_nan=True)
