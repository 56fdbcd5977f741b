"""What is special to chunk_scan."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from levels import at
from specs import Case
from specs.chunk_scan import SPEC
from tolerance import assert_close

import effvlm
from effvlm import _core, _library
from effvlm.ops import discretize


def _inputs(L: int, dtype: torch.dtype = torch.float32, seed: int = 3, **options: Any) -> list[Any]:
    sizes = {"B": 1, "L": L, "G": 1, "H": 2, "K": 20, "V": 17} | {k: v for k, v in options.items() if len(k) == 1}
    rest = {k: v for k, v in options.items() if len(k) > 1}
    return list(SPEC.inputs(Case("special", sizes, rest), dtype, torch.Generator().manual_seed(seed)))


def _on(device: torch.device, args: list[Any]) -> list[Any]:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def _check(got: Any, args: list[Any]) -> None:
    oracle, same = SPEC.oracle(*args), SPEC.refer(*args)
    for name, x, y, z in zip(("out", "final_state"), got, oracle, same, strict=True):
        assert_close(name, x.cpu(), y, z, "reduction")


def _steps(args: list[Any], first: int, end: int, state: torch.Tensor | None) -> list[Any]:
    """The arguments for steps [first, end), going on from `state`."""
    part = [a[:, first:end] if isinstance(a, torch.Tensor) and i < 6 else a for i, a in enumerate(args)]
    part[7] = state
    return part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scan_goes_on_where_another_ended(level: str, dtype: torch.dtype) -> None:
    cuts = random.Random(4)
    for L in (9, 66, 131):
        args = _inputs(L, dtype, gain=True, skip=True, initial=True)
        bounds = [0, *sorted(cuts.sample(range(1, L), 2)), L]
        with at(level) as device:
            outs, state = [], args[7].to(device)
            for first, end in pairwise(bounds):
                out, state = SPEC.call(*_on(device, _steps(args, first, end, state)))
                outs.append(out)
        _check((torch.cat(outs, 1), state), args)


def test_any_length(level: str) -> None:
    for L in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 80, 127, 129):
        args = _inputs(L, gain=True, l2norm=L % 2 == 1)
        with at(level) as device:
            _check(SPEC.call(*_on(device, args)), args)


def _parallel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: torch.Tensor, scale: float) -> torch.Tensor:
    """Σ_{s ≤ l} scale·(q_l·k_s)·exp((l − s)·d)·v_s with an L×L matrix per head; d (H)."""
    steps = torch.arange(v.shape[1])
    apart = (steps[:, None] - steps).to(v.dtype)
    decay = torch.exp(apart * d.to(v.dtype)[:, None, None]).masked_fill(apart < 0, 0)
    return torch.einsum("blhk,bshk,hls,bshv->blhv", scale * q, k, decay, v)


DECAYS = {
    "retention": lambda h: torch.log1p(-torch.exp2(-5 - h)),  # Sun et al. 2023
    "lightning": lambda h: -torch.exp2(-8 * (h + 1) / 3),  # Qin et al. 2024
}


@pytest.mark.parametrize("kind", sorted(DECAYS))
def test_parallel_recurrent_and_chunkwise_forms_agree(level: str, kind: str) -> None:
    L = 100
    args = _inputs(L, G=3, H=3)
    rates = DECAYS[kind](torch.arange(3.0))
    args[3] = rates.expand(1, L, 3)
    q, k, v, scale = *args[:3], args[9]
    oracle = _parallel(*(x.double() for x in (q, k, v, rates)), scale)
    same = _parallel(q, k, v, rates, scale)
    with at(level) as device:
        chunkwise, final = SPEC.call(*_on(device, args))
        outs, state = [], None
        for t in range(L):
            out, state = SPEC.call(*_on(device, _steps(args, t, t + 1, state)))
            outs.append(out)
    assert_close("chunkwise", chunkwise.cpu(), oracle, same, "reduction")
    assert_close("recurrent", torch.cat(outs, 1).cpu(), oracle, same, "reduction")
    for x in (final, state):
        assert_close("state", x.cpu(), SPEC.oracle(*args)[1], SPEC.refer(*args)[1], "reduction")


def _mlstm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, log_f: torch.Tensor, scale: float) -> torch.Tensor:
    """Beck et al. 2024, step by step, stabilised by m; all (B, L, H, …)."""
    B, L, H, K = q.shape
    C, n, m = q.new_zeros(B, H, K, v.shape[3]), q.new_zeros(B, H, K), q.new_full((B, H), -torch.inf)
    outs = []
    for t in range(L):
        new = torch.maximum(log_f[:, t] + m, i[:, t])
        forget, write, m = torch.exp(log_f[:, t] + m - new), torch.exp(i[:, t] - new), new
        C = forget[..., None, None] * C + (write[..., None] * k[:, t])[..., None] * v[:, t, :, None]
        n = forget[..., None] * n + write[..., None] * k[:, t]
        weight = scale * (n * q[:, t]).sum(-1)
        total = scale * torch.einsum("bhkv,bhk->bhv", C, q[:, t])
        outs.append(total / torch.maximum(weight.abs(), torch.exp(-m))[..., None])
    return torch.stack(outs, 1)


def test_mlstm_with_its_normaliser_as_a_column_of_v(level: str) -> None:
    args = _inputs(90, G=2)
    q, k, v, scale = *args[:3], args[9]
    i, log_f = torch.randn(1, 90, 2) * 2, F.logsigmoid(torch.randn(1, 90, 2) + 3)
    oracle = _mlstm(*(x.double() for x in (q, k, v, i, log_f)), scale)
    same = _mlstm(q, k, v, i, log_f, scale)
    with at(level) as device:
        q, k, v, i, log_f = _on(device, [q, k, v, i, log_f])
        ones = torch.ones_like(v[..., :1])
        both = effvlm.chunk_scan(q, k, torch.cat([v, ones], -1), log_f, gain=i.exp(), scale=scale).out
    assert_close("mlstm", (both[..., :-1] / both[..., -1:].abs().clamp_min(1)).cpu(), oracle, same, "reduction")


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.5)])
def test_transformers_mamba2_agrees(level: str, limit: tuple[float, float]) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    q, k, v, _, _, _, skip, initial, _, _, _ = _inputs(75, B=2, G=2, H=4, skip=True, initial=True)
    dt, A, bias = torch.randn(2, 75, 4) - 1, -torch.rand(4) * 4, torch.rand(4)
    theirs, state = mamba2_chunk_scan(v, dt, A, k, q, 32, D=skip, dt_bias=bias, initial_states=initial.mT, dt_softplus=True,
                                      dt_limit=limit, return_final_states=True)  # fmt: skip
    d, gain = discretize(dt, A, dt_bias=bias, dt_softplus=True, dt_limit=limit)
    args = [q, k, v, d, gain, None, skip, initial, None, 1.0, False]
    with at(level) as device:
        got = SPEC.call(*_on(device, args))
    for x, oracle, other in zip(got, SPEC.oracle(*args), (theirs, state.mT), strict=True):
        torch.testing.assert_close(other.double(), oracle, rtol=1e-3, atol=1e-4)
        assert_close("ssd", x.cpu(), oracle, other, "reduction")


@pytest.mark.parametrize("pad", [1, 5, 64, 70])
def test_padding_on_the_left_changes_nothing(level: str, pad: int) -> None:
    args = _inputs(60, gain=True, skip=True)
    padded = [
        F.pad(a, (0, 0) * (a.dim() - 2) + (pad, 0)) if isinstance(a, torch.Tensor) and i < 6 else a for i, a in enumerate(args)
    ]
    with at(level) as device:
        out, state = SPEC.call(*_on(device, padded))
    assert not out[:, :pad].any()
    _check((out[:, pad:], state), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_are_what_each_is_alone(level: str, dtype: torch.dtype) -> None:
    bounds = (0, 9, 9, 80, 81, 150)
    args = _inputs(150, dtype, gain=True, skip=True, initial=True, packed=bounds)
    with at(level) as device:
        out, state = SPEC.call(*_on(device, args))
        for s, (first, end) in enumerate(pairwise(bounds)):
            part = _steps(args, first, end, args[7][s : s + 1])
            part[8] = None
            alone = SPEC.call(*_on(device, part))
            assert torch.equal(out[:, first:end], alone[0])
            assert torch.equal(state[s : s + 1], alone[1])


def test_extreme_time_steps(level: str) -> None:
    """Δ from nothing to 1e4: what is forgotten is gone, and what is not is not touched by it."""
    args = _inputs(100, skip=True)
    dt = torch.logspace(-6, 4, 200)[torch.randperm(200)].view(1, 100, 2)
    args[3], args[4] = discretize(dt, torch.tensor([-1.0, -16.0]))
    with at(level) as device:
        got = SPEC.call(*_on(device, args))
    assert all(x.isfinite().all() for x in got)
    _check(got, args)


def test_nan_goes_forward_only(level: str) -> None:
    for where, at_step in ((2, 70), (3, 20), (4, 5), (0, 90)):
        args = _inputs(100, gain=True)
        clean = SPEC.refer(*args)[0]
        args[where][0, at_step, 0] = torch.nan
        with at(level) as device:
            out = SPEC.call(*_on(device, args))[0].cpu()
        if where != 0:  # v, log_decay and gain of the first head; the query is of both, for one step
            assert out[0, at_step:, 0].isnan().all()
        else:
            assert out[0, at_step].isnan().all()
            out[0, at_step] = clean[0, at_step] = 0
        known = torch.cat([out[:, :at_step, 0], out[:, :at_step, 1]]), torch.cat([clean[:, :at_step, 0], clean[:, :at_step, 1]])
        torch.testing.assert_close(*known, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[:, :, 1], clean[:, :, 1], rtol=1e-4, atol=1e-4)


KINDS = {
    "decay": {"gain": True, "skip": True},
    "delta": {"beta": True, "l2norm": True},
    "channel": {"beta": True, "l2norm": True, "decay": "channel"},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_threads_and_groups_do_not_matter(kind: str) -> None:
    args = _inputs(70, torch.bfloat16, G=1, H=13, initial=True, **KINDS[kind])
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(SPEC.call(*args))
    alone = [*(args[i].expand(1, 70, 13, 20) for i in (0, 1)), *args[2:]]
    runs.append(SPEC.call(*alone))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients(kind: str) -> None:
    args = _inputs(6, K=3, V=2, initial=True, **KINDS[kind])
    wrt = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    wide = [a.double().requires_grad_() if i in wrt else a for i, a in enumerate(args)]
    reference = _library.OPS["chunk_scan"].reference

    def of(*some: torch.Tensor) -> Any:
        full = list(wide)
        for i, x in zip(wrt, some, strict=True):
            full[i] = x
        return reference(*full)

    assert torch.autograd.gradcheck(of, tuple(wide[i] for i in wrt))
    single = [a.clone().requires_grad_() if i in wrt else a for i, a in enumerate(args)]
    for run, inputs in ((reference, wide), (SPEC.call, single)):
        out, state = run(*inputs)
        (out.square().sum() + state.square().sum()).backward()
    for i in wrt:
        torch.testing.assert_close(single[i].grad, wide[i].grad.float(), rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph() -> None:
    q, k, v, _, _, _, skip, initial, _, _, _ = _inputs(70, skip=True, initial=True)
    dt, A = torch.randn(1, 70, 2), -torch.rand(2)

    def mixer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dt: torch.Tensor) -> Any:
        d, gain = discretize(dt, A, dt_softplus=True)
        return effvlm.chunk_scan(q, k, v, d, gain=gain, skip=skip, initial_state=initial)

    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(q, k, v, dt), mixer(q, k, v, dt), strict=True):
        torch.testing.assert_close(x, y)


def test_workspace_does_not_grow_with_length() -> None:
    def workspace(L: int, **options: Any) -> int:
        args = _inputs(L, K=128, V=64, **options)
        return int(_core.chunk_scan_workspace(*_library.views(args), (-1, 0, 2)))

    for options in KINDS.values():
        assert workspace(64, **options) == workspace(4096, **options) < 2 * 2**20


@pytest.mark.parametrize("bounds", [(1, 8), (0, 7), (0, 5, 4, 8), (0, -3, 8), (0, 9, 8)])
def test_bounds_that_do_not_ascend_are_refused(bounds: tuple[int, ...]) -> None:
    q, v, decay = torch.randn(1, 8, 1, 16), torch.randn(1, 8, 1, 16), -torch.rand(1, 8, 1)
    good = torch.tensor((0, *(8 for _ in bounds[1:])), dtype=torch.int32)
    effvlm.chunk_scan(q, q, v, decay, cu_seqlens=good)  # that calls of this kind have passed says nothing of values
    with pytest.raises((ValueError, RuntimeError), match="expected cu_seqlens to ascend from 0 to L = 8"):
        effvlm.chunk_scan(q, q, v, decay, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
