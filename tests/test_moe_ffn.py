"""moe_ffn: what the generic suite does not know of routed experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import at
from specs.moe_ffn import SPEC, grouped_mm

import effvlm
from effvlm import _library


def _args(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    case = next(c for c in SPEC.cases if c.name == name)
    return list(SPEC.inputs(case, dtype, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_nan_stays_in_its_token(level: str, dtype: torch.dtype) -> None:
    for name in ("few", "many_tokens"):
        args = _args(name, dtype)
        with at(level) as device:
            clean = SPEC.call(*_to(args, device))[0].cpu()
            args[0] = args[0].clone()
            args[0][3, 5] = float("nan")
            got = SPEC.call(*_to(args, device))[0].cpu()
        others = torch.arange(len(got)) != 3
        assert got[3].isnan().all()
        assert torch.equal(got[others], clean[others])


def _to(args: list[Any], device: torch.device) -> list[Any]:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_a_token_does_not_depend_on_its_company(level: str, dtype: torch.dtype) -> None:
    """Alone or with many others, which decides between rows and blocks: within rounding."""
    args = _args("many_tokens", dtype)
    with at(level) as device:
        together = SPEC.call(*_to(args, device))[0].cpu()
        alone = SPEC.call(*_to([a[7:8] if i < 3 else a for i, a in enumerate(args)], device))[0].cpu()
    torch.testing.assert_close(together[7:8], alone)


def test_as_transformers_computes_it() -> None:
    for name in ("few", "gpt_oss", "all_to_one"):
        args = _args(name)
        torch.testing.assert_close(SPEC.call(*args)[0], grouped_mm(*args), rtol=1e-5, atol=1e-5)


def test_skipped_choices_are_as_if_they_were_not_there(level: str) -> None:
    args = _args("few")
    with at(level) as device:
        alone = SPEC.call(*_to([a[:, :1].contiguous() if i in (1, 2) else a for i, a in enumerate(args)], device))[0]
        for sentinel in (-1, 4):
            args[1][:, 1] = sentinel
            assert torch.equal(SPEC.call(*_to(args, device))[0], alone)
        args[1][:] = 4
        assert not SPEC.call(*_to(args, device))[0].any()


def test_static_routing_by_kind_of_token(level: str) -> None:
    """Vision and language experts (Mono-InternVL, VLMo): ids from a mask. No token is computed by two: the other may be NaN."""
    g = torch.Generator().manual_seed(5)
    x, up, down = (torch.randn(*s, generator=g) * 0.2 for s in ((40, 32), (2, 48, 32), (2, 32, 24)))
    image = torch.arange(40) % 5 < 3
    ids, ones = image.long()[:, None], torch.ones(40, 1)
    with at(level) as device:
        both = effvlm.moe_ffn(*(t.to(device) for t in (x, ids, ones, up, down))).cpu()
        up[1], down[1] = float("nan"), float("nan")
        text = effvlm.moe_ffn(*(t.to(device) for t in (x, ids, ones, up, down))).cpu()
    gate, linear = (x[~image] @ up[0].T).chunk(2, dim=-1)
    torch.testing.assert_close(both[~image], (torch.nn.functional.silu(gate) * linear) @ down[0].T, rtol=1e-5, atol=1e-5)
    assert torch.equal(text[~image], both[~image])
    assert text[image].isnan().all()


def test_the_keywords_are_the_schema() -> None:
    x, ids, weight, up, up_bias, down, down_bias, *gate = _args("gpt_oss")
    names = ("act", "gated", "interleaved", "alpha", "limit", "offset")
    got = effvlm.moe_ffn(x, ids, weight, up, down, up_bias=up_bias, down_bias=down_bias, **dict(zip(names, gate, strict=True)))
    assert torch.equal(got, SPEC.call(*_args("gpt_oss"))[0])


def test_grad_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_said", set())  # what was said once is said again
    args = _args("few")
    args[0].requires_grad_()
    x, ids, weight, up, _, down, *_ = args
    with pytest.warns(UserWarning, match="moe_ffn: an input requires grad"):
        effvlm.moe_ffn(x, ids, weight, up, down).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_memory_does_not_grow() -> None:
    resource = pytest.importorskip("resource", reason="no resource module")
    args = _args("many_tokens")
    for _ in range(50):
        SPEC.call(*args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        SPEC.call(*args)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB
