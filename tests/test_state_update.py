"""What is special to state_update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from levels import at

import effvlm
from effvlm import _library


def _randn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in shapes]


def test_mamba_as_transformers_has_it(level: str) -> None:
    step = pytest.importorskip("transformers.models.mamba.modeling_mamba").mamba_selective_state_update
    state, x, dt, z, B, C = _randn((3, 40, 16), (3, 40), (3, 40), (3, 40), (3, 16), (3, 16))
    A, D, bias = -torch.rand(40, 16), torch.randn(40), torch.randn(40)
    expected_state = state.clone()
    expected = step(expected_state, x, dt, A, B, C, D, bias, True, z)
    with at(level) as device:
        state, *rest = (t.to(device) for t in (state, x, dt, A, B, C, D, z, bias))
        out = effvlm.state_update(state, *rest, dt_softplus=True)
    assert torch.allclose(out.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(state.cpu(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("G", [1, 2])
def test_mamba2_as_transformers_has_it_all_expanded(level: str, G: int) -> None:
    step = pytest.importorskip("transformers.models.mamba2.modeling_mamba2").mamba2_selective_state_update
    S, H, P, N = 9, 6, 20, 32  # more heads than parts of the work: a thread goes from sequence to sequence
    state, x, z, B, C = _randn((S, H, P, N), (S, H, P), (S, H, P), (S, G, N), (S, G, N))
    dt, D, bias = (torch.randn(*s, 1).expand(*s, P) for s in ((S, H), (H,), (H,)))
    A = -torch.rand(H, 1, 1).expand(H, P, N)
    expected_state = state.clone()
    expected = step(expected_state, x, dt, A, B, C, D, bias, True, z)
    with at(level) as device:
        state, *rest = (t.to(device) for t in (state, x, dt, A, B, C, D, z, bias))
        out = effvlm.state_update(state, *rest, dt_softplus=True)
    assert torch.allclose(out.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(state.cpu(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("l2norm", [False, True])
def test_delta_rule_as_transformers_has_it(level: str, l2norm: bool) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    state, q, k, v = _randn((3, 4, 24, 40), (3, 2, 24), (3, 2, 24), (3, 4, 40))
    g, beta = -torch.rand(3, 4), torch.rand(3, 4)
    expected, expected_state = modeling.torch_recurrent_gated_delta_rule(
        *(t[:, None] for t in (q, k, v, g, beta)), state, True, l2norm
    )
    with at(level) as device:
        state, *rest = (t.to(device) for t in (state, q, k, v, g, beta))
        out = effvlm.delta_update(state, *rest, l2norm=l2norm)
    scale = expected.abs().max()
    assert torch.allclose(out.cpu(), expected[:, 0], rtol=1e-5, atol=1e-5 * scale)
    assert torch.allclose(state.cpu(), expected_state, rtol=1e-5, atol=1e-5 * expected_state.abs().max())


def test_a_decay_per_key_is_one_per_head_if_all_are_equal(level: str) -> None:
    state, q, k, v = _randn((1, 4, 24, 40), (1, 4, 24), (1, 4, 24), (1, 4, 40))
    g, beta = -torch.rand(1, 4), torch.rand(1, 4)
    with at(level):
        apart = state.clone()
        out = effvlm.delta_update(state, q, k, v, g, beta, scale=0.5, l2norm=True)
        other = effvlm.delta_update(apart, q, k, v, g[..., None].expand(1, 4, 24).contiguous(), beta, scale=0.5, l2norm=True)
    assert torch.equal(out, other)
    assert torch.equal(state, apart)


def test_twenty_steps_are_the_recurrence(level: str) -> None:
    """On a state with strides of its own, between others that must stay as they are."""
    memory = torch.randn(2, 3, 10, 34)
    before = memory.clone()
    state, exact = memory[..., 1:33:2], memory[..., 1:33:2].double()
    x, dt, B, C = _randn((20, 2, 3, 10), (20, 2, 3, 10), (20, 2, 1, 16), (20, 2, 1, 16))
    A = -torch.rand(3, 10, 16)
    with at(level) as device:
        if device.type == "cuda":
            pytest.skip("strides of host memory")
        for i in range(20):
            out = effvlm.state_update(state, x[i], dt[i], A, B[i], C[i], dt_softplus=True)
            t = F.softplus(dt[i].double())[..., None]
            exact = torch.exp(t * A) * exact + t * x[i].double()[..., None] * B[i].double()[:, :, None]
            assert torch.allclose(out.double(), (exact * C[i].double()[:, :, None]).sum(-1), rtol=1e-5, atol=1e-4)
    assert torch.allclose(state.double(), exact, rtol=1e-5, atol=1e-5)
    untouched = torch.ones(34, dtype=torch.bool)
    untouched[1:33:2] = False
    assert torch.equal(memory[..., untouched], before[..., untouched])


@pytest.mark.parametrize("H", [1, 4])
def test_extreme_steps_stay_finite(level: str, H: int) -> None:
    P, N = 8, 16
    state, x, B, C = _randn((1, H, P, N), (1, H, P), (1, 1, N), (1, 1, N))
    dt = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e4]).expand(1, H, P)
    A = -torch.rand(H, P, N) - 0.1
    args = (state, x, dt[..., None].expand(1, H, P, N), A, B, C, None, None, None, None, True, False, 1.0)
    expected, expected_state = _library.OPS["state_update"].reference(*args)
    with at(level) as device:
        there = state.to(device)
        out = effvlm.state_update(there, *(t.to(device) for t in (x, dt, A, B, C)), dt_softplus=True)
    assert torch.allclose(out.cpu(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert torch.allclose(there.cpu(), expected_state, rtol=1e-5, atol=1e-6)


def test_compiles_with_its_state() -> None:
    def step(conv: torch.Tensor, state: torch.Tensor, delta: torch.Tensor, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        u = effvlm.causal_conv1d(x[..., None], x.new_ones(24, 4), state=conv, activation="silu")[..., 0]
        y = effvlm.state_update(state, u, x, -x.new_ones(24, 16), keys, keys, dt_softplus=True)
        z = effvlm.delta_update(delta, keys[:, None], keys[:, None], y[:, None], -x[:, :1].abs(), x[:, :1].abs())
        return z + state.sum()

    states = torch.randn(2, 24, 3), torch.randn(2, 24, 16), torch.randn(2, 1, 16, 24)
    apart = tuple(s.clone() for s in states)
    x, keys = torch.randn(2, 24), torch.randn(2, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(*states, x, keys)
        assert torch.equal(out, step(*apart, x, keys))
    assert all(map(torch.equal, states, apart))


def test_gradients_run_the_reference_which_writes_the_state_too() -> None:
    state, x, dt, B, C = _randn((1, 5, 16), (1, 5), (1, 5), (1, 16), (1, 16))
    A = -torch.rand(5, 16)
    apart, x = state.clone(), x.requires_grad_()
    _library._said.discard("state_update")
    with pytest.warns(UserWarning, match="state_update"):
        out = effvlm.state_update(state, x, dt.abs(), A, B, C)
    out.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.allclose(effvlm.state_update(apart, x, dt.abs(), A, B, C), out, rtol=1e-5, atol=1e-5)
    assert torch.allclose(state, apart, rtol=1e-5, atol=1e-6)
