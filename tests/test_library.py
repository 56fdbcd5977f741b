"""Each op as a citizen of torch: fake tensors, opcheck, compile, autograd, more than 2³¹ elements."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from specs import Case, Spec, specs

import effvlm
from effvlm import _library

OPS = [pytest.param(s, id=s.op) for s in specs() if s.run is None]


def _args(spec: Spec, dtype: torch.dtype = torch.float32, case: Case | None = None) -> tuple:
    return spec.inputs(case or spec.cases[0], dtype, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("spec", OPS)
def test_opcheck(spec: Spec) -> None:
    torch.library.opcheck(getattr(torch.ops.effvlm, spec.op).default, _args(spec))


@pytest.mark.parametrize("spec", OPS)
def test_fake_and_real_agree(spec: Spec) -> None:
    for case in spec.tested():
        for dtype in spec.dtypes:
            args = _args(spec, dtype, case)
            real = spec.call(*args)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = spec.call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("spec", OPS)
def test_compiles_without_graph_break(spec: Spec) -> None:
    args = _args(spec)
    fresh, op = spec.fresh(args), getattr(torch.ops.effvlm, spec.op)
    torch._dynamo.reset()  # all ops share this lambda, and compilations of one function are limited to eight
    outputs = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager", dynamic=True)(*fresh)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for a, b in zip((*outputs, *spec.written(fresh)), spec.call(*args), strict=True):
        assert torch.equal(a, b)


def test_public_functions_compile() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        match = effvlm.token_match(x, 20)
        return effvlm.token_merge(x, match.group, x.shape[1] - 20).out

    x = torch.randn(2, 64, 32)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


def test_gradients_come_from_the_reference_and_say_so_once() -> None:
    x = torch.randn(1, 6, 4, dtype=torch.float32, requires_grad=True)
    group = torch.tensor([[0, 1, 0, 1, 2, -1]], dtype=torch.int32)
    _library._said.discard("token_merge")
    with pytest.warns(UserWarning, match="token_merge"):
        out = effvlm.token_merge(x, group, 3).out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effvlm.token_merge(x, group, 3)
    out.sum().backward()
    expected = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.0])
    assert torch.equal(x.grad[0], expected[:, None].expand(6, 4))


def test_reference_backend_runs_the_reference() -> None:
    x = torch.randn(1, 64, 32)
    calls = []
    op = _library.OPS["token_match"]
    watched = _library.Op(op.name, op.check, op.allocate, lambda *a: calls.append(1) or op.reference(*a))
    with _library.backend("reference"):
        _library._run(watched, x, 3, True, None)
    _library._run(watched, x, 3, True, None)
    assert calls == [1]


def test_offsets_beyond_32_bits() -> None:
    """A tensor of 2³¹ + elements of which few pages are ever touched."""
    C, stride = 64, 2**29 + 64
    memory = torch.empty(6 * stride, dtype=torch.bfloat16)  # 6.4 GB of addresses; the kernel gives pages on first touch
    x = memory.as_strided((1, 6, C), (0, stride, 1))
    small = torch.randn(1, 6, C).bfloat16()
    x.copy_(small)
    match = effvlm.token_match(x, 3)
    assert all(torch.equal(a, b) for a, b in zip(match, effvlm.token_match(small, 3), strict=True))
    out = effvlm.token_merge(x, match.group, 3).out
    assert torch.equal(out, effvlm.token_merge(small, match.group, 3).out)


def test_cuda_tensors_without_cuda_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library._core, "cuda_version", "", raising=False)
    op = _library.OPS["token_match"]
    meta = _library.Op(op.name, lambda *a: None, lambda *a: (_Cuda(),), op.reference)
    with pytest.raises(RuntimeError, match="EFFVLM_CUDA=ON"):
        _library._run(meta, torch.zeros(1, 4, 4), 1, True, None)


class _Cuda:
    device = torch.device("cuda", 0)


def test_a_call_is_checked_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has passed passes again; anything but other addresses and values is looked at."""
    passed: set = set()
    monkeypatch.setattr(_library, "_passed", passed)
    monkeypatch.setattr(_library, "_MOST_PASSED", 2)
    x = torch.randn(1, 6, 4)
    with torch.no_grad():
        for _ in range(2):
            effvlm.token_match(x, 1)
        assert len(passed) == 1
        for wrong, kind in ((x.double(), TypeError), (x[0], ValueError), (x.numpy(), TypeError), ([1], TypeError)):
            with pytest.raises(kind, match="token_match: expected x"):
                effvlm.token_match(wrong, 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected 0 <= r"):
            effvlm.token_match(x, 4)
        token, ids, weight = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64), torch.randn(1, 4, 8)
        effvlm.grouped_linear(token, ids, weight)
        with pytest.raises(TypeError, match="expected weight on the device of x, cpu, got meta"):  # as offloaded weights are
            effvlm.grouped_linear(token, ids, weight.to("meta"))
        passed.clear()
        effvlm.token_match(x, 1)
        assert len(passed) == 1
        effvlm.token_match(x, 2)
        effvlm.token_match(x.mT, 2)  # the third kind is over the limit
        assert len(passed) == 1


def _dispatched(run: Callable[[], object]) -> bool:
    with torch.profiler.profile() as profiled:
        run()
    return any(e.key.startswith("effvlm::") for e in profiled.key_averages())


def test_calls_skip_the_dispatcher_unless_autograd_wants_them() -> None:
    q, v, decay = torch.randn(1, 3, 1, 2), torch.randn(1, 3, 1, 2), -torch.rand(1, 3, 1)
    assert not _dispatched(lambda: effvlm.chunk_scan(q, q, v, decay))
    assert _dispatched(lambda: effvlm.chunk_scan(q, q, v.requires_grad_(), decay))
    with torch.no_grad():
        assert not _dispatched(lambda: effvlm.chunk_scan(q, q, v, decay))


def test_autograd_notices_what_is_written_in_place() -> None:
    x, weight, state = torch.randn(1, 4, 3), torch.randn(4, 2), torch.randn(1, 4, 1)
    scaled = state * torch.ones(1, requires_grad=True)  # saves the state for its backward
    effvlm.causal_conv1d(x, weight, state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scaled.sum().backward()
    with torch.inference_mode():
        made = torch.randn(1, 4, 1)
        effvlm.causal_conv1d(x, weight, state=made)
    with torch.no_grad():
        effvlm.causal_conv1d(x, weight, state=made)
