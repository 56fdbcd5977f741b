"""Every op, at every level, on every case of its spec: nothing here knows an op by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from levels import at
from specs import Case, Spec, specs
from tolerance import assert_close

from effvlm import _library

OPS = [s for s in specs() if s.run is None]
CASES = [pytest.param(s, c, id=f"{s.op}-{c}") for s in OPS for c in s.tested()]
FIRST = [pytest.param(s, id=s.op) for s in OPS]


def _inputs(spec: Spec, case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return spec.inputs(case, dtype, torch.Generator().manual_seed(1))


def _to(args: Any, device: torch.device) -> list[Any]:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def _check(spec: Spec, args: Any, got: Any) -> None:
    oracle, same = spec.oracle(*args), spec.refer(*args)
    if spec.compare:
        spec.compare(tuple(args), got, oracle, same)
        return
    for i, kind in enumerate(spec.tolerance):
        assert_close(f"{spec.op}[{i}]", got[i].cpu(), oracle[i], same[i], kind)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_values(spec: Spec, case: Case, level: str) -> None:
    """Against the float64 oracle, in each dtype."""
    if level == "simt" and spec.flops(case) > 3e6:
        pytest.skip("more work than the CUDA emulator needs to see the same edges")
    for dtype in spec.dtypes:
        args = _inputs(spec, case, dtype)
        with at(level) as device:
            _check(spec, args, spec.call(*_to(args, device)))


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values under other strides and alignments."""
    wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
    wide[..., 1:-2] = x
    spread = x.repeat_interleave(2, min(1, x.dim() - 1))
    first = x[:1].clone().expand(x.shape)
    return {
        "unaligned": wide[..., 1:-2],
        "every_other": spread[:, ::2] if x.dim() > 1 else spread[::2],
        "transposed": x.mT.contiguous().mT if x.dim() > 1 else x,
        "expanded": first,
    }


@pytest.mark.parametrize("layout", ["unaligned", "every_other", "transposed", "expanded"])
@pytest.mark.parametrize("spec", FIRST)
def test_strides(spec: Spec, layout: str, level: str) -> None:
    """Any strides give what contiguous tensors of the same values give, bit for bit, and inputs stay as they were."""
    for case in (spec.cases[0], next(c for c in spec.cases if c.name == "tails")):
        for dtype in spec.dtypes:
            args = [
                _layouts(a)[layout] if isinstance(a, torch.Tensor) and i not in _left_as_is(spec, layout) else a
                for i, a in enumerate(_inputs(spec, case, dtype))
            ]
            with at(level) as device:
                args = [a if not isinstance(a, torch.Tensor) else _keep_strides(a, device) for a in args]
                before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                got = spec.call(*args)
                plain = spec.call(*(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args))
            assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor))
            _check(spec, _to(before, torch.device("cpu")), got)
            if layout != "transposed":  # a different, documented path for strided channels may round differently
                assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def _left_as_is(spec: Spec, layout: str) -> tuple[int, ...]:
    """Formats of their own, and, where one element would be written twice, what is written in place."""
    return spec.opaque + (_library.OPS[spec.op].mutates if layout == "expanded" else ())


def _keep_strides(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    if x.device == device:
        return x
    storage = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype)
    storage.copy_(torch.as_strided(x, storage.shape, (1,), 0))
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("spec", FIRST)
def test_writes_stay_inside(spec: Spec, level: str) -> None:
    """Outputs at odd addresses between sentinels: all of them written, nothing around them touched."""
    op = _library.OPS[spec.op]
    for case in spec.cases[:1] + tuple(c for c in spec.cases if "tails" in c.name):
        for dtype in spec.dtypes:
            with at(level) as device:
                args = _to(_inputs(spec, case, dtype), device)
                outer: list[torch.Tensor] = []

                def guarded(*a: Any, store: list[torch.Tensor] = outer) -> tuple[torch.Tensor, ...]:
                    for t in op.allocate(*a):
                        store.append(torch.full((t.numel() + 34,), 77, dtype=t.dtype, device=t.device))
                    return tuple(b[17 : 17 + t.numel()].view(t.shape) for b, t in zip(store, op.allocate(*a), strict=True))

                watched = replace(op, allocate=guarded)
                fresh = spec.fresh(tuple(args))
                got = _library._run(watched, *fresh)
                plain = spec.call(*args)
            assert all(map(torch.equal, spec.written(fresh), plain[len(got) :]))
            for buffer, a, b in zip(outer, got, plain[: len(got)], strict=True):
                sentinel = buffer.new_tensor(77)  # True, if that is what there is
                assert (buffer[:17] == sentinel).all()
                assert (buffer[-17:] == sentinel).all()
                assert torch.equal(a, b)


@pytest.mark.parametrize("spec", FIRST)
def test_deterministic(spec: Spec, level: str) -> None:
    """The same bits from every run, for any number of threads."""
    for case in spec.cases[:3] + tuple(c for c in spec.cases if c.name in ("strips", "clip_l")):
        for dtype in spec.dtypes:
            with at(level) as device:
                args = _to(_inputs(spec, case, dtype), device)
                runs = []
                for threads in (1, 2, 3, 2):
                    torch.set_num_threads(threads)
                    runs.append(spec.call(*args))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


BAD = [pytest.param(s, b, id=f"{s.op}-{b.label}") for s in OPS for b in s.bad]


@pytest.mark.parametrize(("spec", "bad"), BAD)
def test_bad_arguments(spec: Spec, bad: Any) -> None:
    """A sentence with the op's name, what was expected and what came."""
    args = list(_inputs(spec, spec.cases[0]))
    bad.change(args)
    with pytest.raises(bad.error) as caught:
        spec.call(*args)
    assert spec.op in str(caught.value)
    assert bad.text in str(caught.value)
    assert "\n" not in str(caught.value)
