"""grouped_linear: what the generic suite does not know of layers chosen by id."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from levels import at

import effvlm
from effvlm import _library


def _parts(T: int, E: int, C: int, out: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, C, generator=g), torch.randn(E, out, C, generator=g) * C**-0.5, torch.randn(E, out, generator=g)


def test_a_mask_of_kinds_is_two_layers(level: str) -> None:
    """Text and image tokens through layers of their own, as modality experts do it."""
    x, weight, bias = _parts(50, 2, 24, 40)
    image = torch.arange(50) % 7 < 4
    with at(level) as device:
        got = effvlm.grouped_linear(x.to(device), image.long().to(device), weight.to(device), bias=bias.to(device)).cpu()
    for kind in (0, 1):
        mine = image == bool(kind)
        torch.testing.assert_close(got[mine], F.linear(x[mine], weight[kind], bias[kind]), rtol=1e-5, atol=1e-5)


def test_no_token_is_computed_by_two_layers(level: str) -> None:
    """A layer of NaN leaves every token alone that is not its own."""
    x, weight, bias = _parts(40, 3, 24, 20)
    ids = torch.arange(40) % 3
    weight[1], bias[1] = float("nan"), float("nan")
    with at(level) as device:
        got = effvlm.grouped_linear(x.to(device), ids.to(device), weight.to(device), bias=bias.to(device)).cpu()
    assert got[ids == 1].isnan().all()
    assert not got[ids != 1].isnan().any()


def test_nan_stays_in_its_token(level: str) -> None:
    x, weight, _ = _parts(40, 2, 33, 20)
    ids = torch.zeros(40, dtype=torch.int64)
    with at(level) as device:
        clean = effvlm.grouped_linear(x.to(device), ids.to(device), weight.to(device)).cpu()
        x[5, 3] = float("nan")
        got = effvlm.grouped_linear(x.to(device), ids.to(device), weight.to(device)).cpu()
    others = torch.arange(40) != 5
    assert got[5].isnan().all()
    assert torch.equal(got[others], clean[others])


def test_a_mixture_of_lora_experts_is_moe_ffn_without_a_gate(level: str) -> None:
    """Σ weight·B·A·x by one call, against grouped_linear twice."""
    g = torch.Generator().manual_seed(4)
    x, a, b = (torch.randn(*s, generator=g) * 0.3 for s in ((18, 32), (5, 4, 32), (5, 32, 4)))
    ids, weight = torch.randint(5, (18, 2), generator=g), torch.rand(18, 2, generator=g)
    with at(level) as device:
        x, a, b, ids, weight = (t.to(device) for t in (x, a, b, ids, weight))
        got = effvlm.moe_ffn(x, ids, weight, a, b, act="identity", gated=False)
        low = effvlm.grouped_linear(x.repeat_interleave(2, 0), ids.flatten(), a)
        wanted = (effvlm.grouped_linear(low, ids.flatten(), b).view(18, 2, 32) * weight[..., None]).sum(1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_grad_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_said", set())  # what was said once is said again
    x, weight, _ = _parts(5, 2, 8, 6)
    x.requires_grad_()
    with pytest.warns(UserWarning, match="grouped_linear: an input requires grad"):
        effvlm.grouped_linear(x, torch.tensor([0, 1, -1, 1, 0]), weight).sum().backward()
    assert x.grad is not None
    assert not x.grad[2].any()
    assert x.grad[0].abs().sum() > 0
