"""The kinds of chunk_scan with a delta rule or with decays per channel: what is special to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import at
from tolerance import reduction_limit

from effvlm.ops.chunk_scan import chunk_scan, reference

Tensors = tuple[torch.Tensor, ...]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(L: int, G: int, H: int, K: int, V: int, *, channel: bool = False, strongest: float = 0.5, B: int = 1) -> Tensors:
    """q, k, v, log_decay, beta and a state."""
    g = _seeded(L + K)
    q, k, v = (torch.randn(B, L, heads, size, generator=g) for heads, size in ((G, K), (G, K), (H, V)))
    d = -strongest * torch.rand((B, L, H, K) if channel else (B, L, H), generator=g)
    return q, k, v, d, torch.rand(B, L, H, generator=g), torch.randn(B, H, K, V, generator=g)


def _scan(level: str, *args: torch.Tensor | None, cu_seqlens: torch.Tensor | None = None, l2norm: bool = True) -> Tensors:
    """chunk_scan of (q, k, v, log_decay, beta, state) at a level, back on the CPU."""
    with at(level) as device:
        q, k, v, d, beta, state, cu = (None if x is None else x.to(device) for x in (*args, cu_seqlens))
        found = chunk_scan(q, k, v, d, beta=beta, initial_state=state, cu_seqlens=cu, scale=q.shape[3] ** -0.5, l2norm=l2norm)  # type: ignore[arg-type, union-attr]
    return tuple(x.cpu() for x in found)


def _close(got: Tensors, oracle: Tensors, same: Tensors) -> None:
    for name, a, b, c in zip(("out", "final_state"), got, oracle, same, strict=True):
        assert a.shape == b.shape
        error, limit = (a.double() - b).abs(), reduction_limit(name, b.double(), c)
        assert (error <= limit).all(), f"{name}: {error.max().item() / limit:.3g} of the limit"


def _refer(wide: bool, *args: torch.Tensor | None, l2norm: bool = True) -> Tensors:
    q, k, v, d, beta, state = (x.double() if wide and x is not None else x for x in args)
    return reference(q, k, v, d, None, beta, None, state, None, q.shape[3] ** -0.5, l2norm)  # type: ignore[arg-type, union-attr]


def _against_float64(level: str, *args: torch.Tensor | None, l2norm: bool = True) -> None:
    _close(_scan(level, *args, l2norm=l2norm), *(_refer(wide, *args, l2norm=l2norm) for wide in (True, False)))


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_gated_delta_rule_of_transformers(level: str, name: str) -> None:
    """Grouped heads, a state to start from, 16 steps and a rest."""
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    args = _inputs(39, 2, 4, 24, 20)
    *most, state = args
    theirs = getattr(modeling, name)(*most, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    _close(_scan(level, *args), _refer(True, *args), theirs)


def _forget_gate(strength: float, shape: tuple[int, ...]) -> torch.Tensor:
    """What Kimi's gate makes of a projection: decay rates of 1 … 16 per head, or, with a strength, up to that per step."""
    if strength:
        return -strength * torch.rand(shape, generator=_seeded(2))
    rate = torch.linspace(1, 16, shape[2])[:, None]
    bias = torch.log(torch.expm1(torch.logspace(-3, -1, shape[3])))
    return -rate * torch.nn.functional.softplus(torch.randn(shape, generator=_seeded(3)) + bias)


@pytest.mark.parametrize("strength", [0, 2, 20])
@pytest.mark.parametrize("name", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
def test_kimi_delta_attention_of_transformers(level: str, name: str, strength: float) -> None:
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q, k, v, _, beta, state = _inputs(37, 3, 3, 24, 20)
    args = (q, k, v, _forget_gate(strength, (1, 37, 3, 24)), beta, state)
    theirs = getattr(modeling, name)(
        *args[:5], initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )  # its sums of log decays are float32: no closer to the truth than their size allows
    _close(_scan(level, *args), _refer(True, *args), theirs)
    _against_float64(level, *args)


@pytest.mark.parametrize("kind", ["delta", "kda", "gla"])
@pytest.mark.parametrize("L", [0, 1, 15, 16, 17, 63, 65])
def test_lengths_around_chunks(level: str, kind: str, L: int) -> None:
    q, k, v, d, beta, state = _inputs(L, 1, 2, 19, 21, channel=kind != "delta", B=2)
    _against_float64(level, q, k, v, d, None if kind == "gla" else beta, state)


@pytest.mark.parametrize("kind", ["delta", "kda", "gla"])
def test_the_state_carries_over_a_split(level: str, kind: str) -> None:
    q, k, v, d, beta, state = _inputs(70, 1, 2, 20, 17, channel=kind != "delta")
    strength = None if kind == "gla" else beta
    whole = (q, k, v, d, strength, state)
    for at_step in (16, 23, 64):
        first, S = _scan(level, *(None if x is None else x[:, :at_step] for x in whole[:5]), state)
        second, S = _scan(level, *(None if x is None else x[:, at_step:] for x in whole[:5]), S)
        _close((torch.cat((first, second), 1), S), _refer(True, *whole), _refer(False, *whole))


@pytest.mark.parametrize("kind", ["delta", "kda"])
def test_packed_sequences_are_the_single_ones(level: str, kind: str) -> None:
    """Bit for bit: a sequence's chunks start where it starts."""
    bounds = (0, 1, 18, 18, 50, 67)
    q, k, v, d, beta, _ = _inputs(67, 1, 2, 20, 17, channel=kind == "kda")
    states = torch.randn(5, 2, 20, 17, generator=_seeded())
    out, final = _scan(level, q, k, v, d, beta, states, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for i in range(5):
        part = slice(bounds[i], bounds[i + 1])
        single, S = _scan(level, *(x[:, part] for x in (q, k, v, d, beta)), states[i : i + 1])
        assert torch.equal(out[:, part], single)
        assert torch.equal(final[i : i + 1], S)


@pytest.mark.parametrize("strength", [None, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("channel", [False, True])
def test_extreme_decays_and_strengths(level: str, channel: bool, strength: float | None) -> None:
    """Steps that forget all or nearly all, β of nothing, of a full correction and of the edge of stability (β·|k|² = 2)."""
    q, k, v, d, beta, state = _inputs(75, 1, 2, 16, 16, channel=channel)
    d = torch.where(torch.rand(d.shape, generator=_seeded(7)) < 0.1, -1e4, d)
    d[:, 20] = float("-inf")
    d[:, 40:60] = 0
    if strength is not None:
        beta = torch.full_like(beta, strength)
    _against_float64(level, q, k, v, d, beta, state)


def test_repeated_keys_at_the_edge_of_stability(level: str) -> None:
    """The same key, of length 1 to the last bit, at every step: β = 2 turns the state over again and again, without any decay."""
    q, _, v, d, beta, state = _inputs(64, 1, 1, 16, 16)
    k = torch.full_like(q, 0.25)
    _against_float64(level, q, k, v, torch.zeros_like(d), torch.full_like(beta, 2), state, l2norm=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_one_projection(level: str, dtype: torch.dtype) -> None:
    """q, k and v as models have them, side by side in the rows of one tensor; decays and β in another's."""
    H, K, V = 2, 24, 20
    mixed = torch.randn(1, 50, H * (2 * K + V), generator=_seeded()).to(dtype)
    gates = torch.rand(1, 50, 2 * H, generator=_seeded(1))
    q, k, v = mixed.split((H * K, H * K, H * V), -1)
    d, beta = (-gates).split(H, -1)
    args = q.view(1, 50, H, K), k.view(1, 50, H, K), v.view(1, 50, H, V), d, -beta, None
    got, plain = (_scan(level, *(x if x is None else f(x) for x in args)) for f in (lambda x: x, torch.Tensor.contiguous))
    assert all(map(torch.equal, got, plain))
    _close(got, _refer(True, *args), _refer(False, *args))


@pytest.mark.parametrize("kind", ["delta", "kda", "gla"])
@pytest.mark.parametrize(("what", "value"), [(what, float(x)) for what in range(4) for x in ("nan", "inf")][:-1])
def test_nan_goes_forwards_only(level: str, kind: str, what: int, value: float) -> None:
    """Steps before it, in its own chunk too, other heads and, where v brings it in, other columns are as without it."""
    args: list[Any] = list(_inputs(40, 2, 2, 20, 35, channel=kind != "delta"))
    if kind == "gla":
        args[4] = None
    clean = _scan(level, *args)
    args[what] = args[what].clone()
    args[what][(0, 21, 1, 3)[: args[what].dim()]] = value
    out, S = _scan(level, *args)
    assert torch.allclose(out[:, :21], clean[0][:, :21], rtol=1e-4, atol=1e-5)
    assert torch.equal(out[:, :, 0], clean[0][:, :, 0])
    assert torch.equal(S[:, 0], clean[1][:, 0])
    assert not out[:, 21, 1].isfinite().all()
    if what == 2:
        others = [c for c in range(35) if c != 3]
        assert torch.allclose(out[..., others], clean[0][..., others], rtol=1e-4, atol=1e-5)
