"""What is special to selective_scan: states that carry over, paths, extreme steps, memory, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import at
from specs import selective_scan as spec
from tolerance import assert_close

import effvlm
from effvlm import _core, _library
from effvlm.ops.selective_scan import reference
from effvlm.ops.traversals import Traversal, backward, columns, rows


def _random(B: int, D: int, L: int, N: int, K: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k = (K,) if K else ()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "u": random(B, D, L),
        "delta": random(B, *k, D, L),
        "A": -torch.exp(random(*k, D, N)),
        "B": random(B, *k, N, L),
        "C": random(B, *k, N, L),
        "D": random(*k, D),
        "z": random(B, D, L),
        "delta_bias": random(*k, D),
    }


OVER_TIME = ("u", "delta", "B", "C", "z")


def _on(device: torch.device, args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(device) for name, x in args.items()}


def _steps(args: dict[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    return {name: x[..., index] if name in OVER_TIME else x for name, x in args.items()}


def _close(got: effvlm.SelectiveScan, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-5), (a - b).abs().max()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 150), st.integers(0, 150), st.integers(1, 20), st.integers(0, 2**31))
def test_the_state_carries_over_a_split(D: int, before: int, after: int, N: int, seed: int) -> None:
    args = _random(2, D, before + after, N, seed=seed)
    first = effvlm.selective_scan(**_steps(args, slice(before)), delta_softplus=True)
    second = effvlm.selective_scan(**_steps(args, slice(before, None)), delta_softplus=True, initial_state=first.final_state)
    whole = effvlm.selective_scan(**args, delta_softplus=True)
    assert torch.equal(torch.cat([first.out, second.out], -1), whole.out)
    assert torch.equal(second.final_state, whole.final_state)


def test_left_padding_changes_nothing(level: str) -> None:
    args = _random(2, 21, 30, 16)
    padded = {name: F.pad(x, (11, 0), value=0.0 if name == "u" else 0.7) if name in OVER_TIME else x for name, x in args.items()}
    with at(level) as device:
        got = effvlm.selective_scan(**_on(device, padded), delta_softplus=True)
        alone = effvlm.selective_scan(**_on(device, args), delta_softplus=True)
    assert not got.out[..., :11].any()
    assert torch.equal(got.out[..., 11:], alone.out)
    assert torch.equal(got.final_state, alone.final_state)


def test_packed_sequences_are_what_they_are_alone(level: str) -> None:
    args, cuts = _random(1, 37, 150, 5), [0, 1, 1, 70, 149, 150]
    start = torch.randn(5, 37, 5)
    with at(level) as device:
        args, start = _on(device, args), start.to(device)
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32, device=device)
        packed = effvlm.selective_scan(**args, delta_softplus=True, initial_state=start, cu_seqlens=cu_seqlens)
        for s, (a, b) in enumerate(itertools.pairwise(cuts)):
            alone = effvlm.selective_scan(**_steps(args, slice(a, b)), delta_softplus=True, initial_state=start[s : s + 1])
            assert torch.equal(packed.out[..., a:b], alone.out)
            assert torch.equal(packed.final_state[s], alone.final_state[0])


@pytest.mark.parametrize("value", [-float("inf"), -1e4, -100.0, 50.0, 1e4])
def test_extreme_steps(level: str, value: float) -> None:
    args = _random(1, 19, 12, 16)
    args["delta"][..., 3::4] = value
    with at(level) as device:
        out, final = effvlm.selective_scan(**_on(device, args), delta_softplus=True)
    wide = {name: x.double() for name, x in args.items()}
    lifted = [wide["u"], *(wide[n].unsqueeze(d) for n, d in (("delta", 1), ("A", 0), ("B", 1), ("C", 1), ("D", 0)))]
    oracle, state = reference(*lifted, wide["z"], wide["delta_bias"][None], None, None, True, None)
    assert torch.isfinite(out).all()
    assert torch.allclose(out.cpu().double(), oracle, rtol=1e-5, atol=1e-5 * oracle.abs().max().item())
    assert torch.allclose(final.cpu().double(), state[:, 0], rtol=1e-5, atol=1e-5 * state.abs().max().item())


@pytest.mark.parametrize("step", [1e3, 1e30])
def test_what_decays_away_is_zero(level: str, step: float) -> None:
    args = _random(1, 16, 2, 4)
    args["u"].zero_()
    args["A"].fill_(-1)
    args["delta"].fill_(step)
    with at(level) as device:
        final = effvlm.selective_scan(**_on(device, args), initial_state=torch.full((1, 16, 4), 1e38, device=device)).final_state
    assert not final.any()


def _one_by_one(args: dict[str, torch.Tensor], orders: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each path by permuted copies and a scan of its own, merged and gated by hand."""
    out, finals = torch.zeros_like(args["u"]), []
    for k, order in enumerate(orders):
        one = {n: x if n == "u" else x[:, k] if x.dim() == 4 else x[k] for n, x in args.items() if n != "z"}
        y, final = effvlm.selective_scan(**_steps(one, order), delta_softplus=True)
        out[..., order] += y
        finals.append(final)
    return out * F.silu(args["z"]), torch.stack(finals, 1)


@pytest.mark.parametrize("N", [1, 6])
def test_cross_scan_is_four_permuted_scans(level: str, N: int) -> None:
    H, W = 7, 67
    args, places = _random(2, 18, H * W, N, K=4), torch.arange(H * W).view(H, W)
    orders = [places.flatten(), places.T.flatten(), places.flatten().flip(0), places.T.flatten().flip(0)]
    with at(level) as device:
        got = effvlm.selective_scan(**_on(device, args), delta_softplus=True, traversals=effvlm.cross_scan(H, W))
    _close(got, _one_by_one(args, orders))


def test_bidirectional_is_two_scans(level: str) -> None:
    args, places = _random(1, 20, 71, 16, K=2), torch.arange(71)
    with at(level) as device:
        got = effvlm.selective_scan(**_on(device, args), delta_softplus=True, traversals=effvlm.bidirectional(71))
    _close(got, _one_by_one(args, [places, places.flip(0)]))


def test_multi_scale_and_strided_scans(level: str) -> None:
    args, places = _random(1, 17, 48 + 12, 3, K=4), torch.arange(60)
    low = places[48:].view(3, 4)
    orders = [places[:48], low.T.flatten(), low.flatten().flip(0), low.T.flatten().flip(0)]
    with at(level) as device:
        got = effvlm.selective_scan(**_on(device, args), delta_softplus=True, traversals=effvlm.multi_scale_scan(6, 8, 3, 4))
    _close(got, _one_by_one(args, orders))
    every_other = [(3, 4, 0, 16, 2), (4, 3, 0, 2, 16), backward((3, 4, 0, 16, 2)), (1, 12, 48, 0, 1)]
    map_ = places[:48].view(6, 8)[::2, ::2]
    orders = [map_.flatten(), map_.T.flatten(), map_.flatten().flip(0), places[48:]]
    with at(level) as device:
        got = effvlm.selective_scan(**_on(device, args), delta_softplus=True, traversals=every_other)
    _close(got, _one_by_one(args, orders))
    assert not got.out[..., 1:48:2].any()


def test_helpers_visit_every_place_once() -> None:
    def places(path: Traversal) -> list[int]:
        outer, inner, offset, o, i = path
        return [offset + t // inner * o + t % inner * i for t in range(outer * inner)]

    for path in (*effvlm.cross_scan(5, 3), *effvlm.bidirectional(15), rows(15, 1), columns(1, 15)):
        assert sorted(places(path)) == list(range(15))
    assert places(backward(columns(3, 5, 2))) == places(columns(3, 5, 2))[::-1]
    assert backward((0, 4, 7, 1, 1)) == (0, 4, 7, -1, -1)


def test_what_is_not_supported_says_so() -> None:
    args = _random(1, 4, 6, 2)
    cuts = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="for all tokens"):
        effvlm.selective_scan(**(args | {"B": torch.randn(4, 2)}))
    with pytest.raises(ValueError, match="do not go together"):
        effvlm.selective_scan(**_random(1, 4, 6, 2, K=2), cu_seqlens=cuts, traversals=effvlm.bidirectional(6))
    with pytest.raises(ValueError, match="1 to 256 states"):
        effvlm.selective_scan(**_random(1, 4, 6, 257))
    with pytest.raises(ValueError, match="K = 9"):
        effvlm.selective_scan(**_random(1, 4, 6, 2, K=9), traversals=effvlm.bidirectional(6) * 4 + ((1, 6, 0, 0, 1),))


def test_nan_stays_in_its_channel_from_its_step_on(level: str) -> None:
    args = _random(2, 20, 80, 16)
    args["u"][1, 7, 33] = float("nan")
    with at(level) as device:
        out = effvlm.selective_scan(**_on(device, args), delta_softplus=True).out.isnan()
    assert out[1, 7, 33:].all()
    assert int(out.sum()) == 80 - 33


def test_memory_of_a_thread_is_bounded() -> None:
    place = (-1, 0, 2)

    def extra(L: int, N: int, K: int, paths: list[int] | None) -> int:
        shapes = ((1, 5120, L), (1, K, 5120, L), (K, 5120, N), (1, K, N, L), (1, K, N, L))
        views = _library.views([torch.zeros(1).expand(shape) for shape in shapes])
        return _core.selective_scan_workspace(*views, None, None, None, None, None, True, paths, place) // 2

    assert extra(10**6, 16, 1, None) == extra(100, 16, 1, None) < 1 << 16
    assert extra(10**6, 256, 1, None) < 1 << 18
    assert extra(3136, 1, 4, [0] * 20) < 1 << 20


def test_gradients() -> None:
    """Of the reference against differences, across its segments; of the op against the reference."""
    args = spec.inputs(next(c for c in spec.CASES if c.name == "gaps"), torch.float64, torch.Generator().manual_seed(0))
    args = tuple(a.double()[..., :] if isinstance(a, torch.Tensor) else a for a in args)
    inputs = [a[:, :2] if i in (0, 6) else a for i, a in enumerate(args)]
    inputs[1], inputs[2], inputs[8] = args[1][:, :, :2], args[2][:, :2], args[8][:, :, :2]
    inputs[5], inputs[7] = args[5][:, :2], args[7][:, :2]
    inputs = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in inputs]
    assert torch.autograd.gradcheck(reference, inputs)

    single = [a.detach().float().requires_grad_() if isinstance(a, torch.Tensor) else a for a in inputs]
    for outputs in (torch.ops.effvlm.selective_scan(*single), reference(*inputs)):
        (outputs[0].square().sum() + outputs[1].square().sum()).backward()
    for a, b in zip(single, inputs, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.allclose(a.grad.double(), b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item())


def test_compiles_whole() -> None:
    args = _random(1, 16, 12, 4, K=4)

    def run(args: dict[str, torch.Tensor]) -> effvlm.SelectiveScan:
        return effvlm.selective_scan(**args, delta_softplus=True, traversals=effvlm.cross_scan(3, 4))

    for a, b in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(args), run(args), strict=True):
        assert torch.equal(a, b)


def test_out_has_its_channels_together() -> None:
    assert effvlm.selective_scan(**_random(2, 16, 12, 4)).out.stride() == (192, 1, 16)


def test_agrees_with_transformers() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    args = _random(2, 48, 90, 16)
    out, state = mamba_selective_scan(*args.values(), delta_softplus=True, return_last_state=True)
    got = effvlm.selective_scan(**args, delta_softplus=True)
    wide = {name: x.double() for name, x in args.items()}
    lifted = [wide["u"], *(wide[n].unsqueeze(d) for n, d in (("delta", 1), ("A", 0), ("B", 1), ("C", 1), ("D", 0)))]
    oracle, final = reference(*lifted, wide["z"], wide["delta_bias"][None], None, None, True, None)
    assert_close("out", got.out, oracle, out, "reduction")
    assert_close("state", got.final_state, final[:, 0], state, "reduction")
