"""moe_route: what the generic suite does not know of routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import at

import effvlm
from effvlm import _library


def _logits(T: int, E: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2


def _as_sets(ids: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' routers do not sort; by ascending expert."""
    order = ids.argsort(1)
    return ids.gather(1, order), weight.gather(1, order)


def _router(family: str, name: str, config: str, **sizes: Any) -> Any:
    import importlib

    package = importlib.import_module(f"transformers.models.{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    made = getattr(module, name)(getattr(package, config)(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*made.parameters(), *made.buffers()):
        torch.nn.init.normal_(tensor, std=0.3, generator=generator)
    return made


ROUTERS = {
    "mixtral": (
        lambda: _router("mixtral", "MixtralTopKRouter", "MixtralConfig", hidden_size=32, num_local_experts=8,
                        num_experts_per_tok=3),
        {"k": 3, "renormalize": True},
    ),
    "gpt_oss": (
        lambda: _router("gpt_oss", "GptOssTopKRouter", "GptOssConfig", hidden_size=32, num_local_experts=8,
                        num_experts_per_tok=3),
        {"k": 3, "renormalize": True},
    ),
    "deepseek_v2": (
        lambda: _router("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", hidden_size=32, n_routed_experts=16,
                        num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=16.0,
                        topk_method="group_limited_greedy"),
        {"k": 4, "groups": 4, "top_groups": 2, "scale": 16.0},
    ),
    "deepseek_v3": (
        lambda: _router("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", hidden_size=32, n_routed_experts=16,
                        num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True),
        {"k": 4, "score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "renormalize": True, "bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTERS)
def test_as_transformers_routes(family: str, level: str) -> None:
    make, options = ROUTERS[family]
    router = make()
    with torch.no_grad():
        logits, weight, ids = router(torch.randn(40, 32, generator=torch.Generator().manual_seed(1)))
    options = {**options, "bias": router.e_score_correction_bias if options.get("bias") else None}
    with at(level) as device:
        bias = None if options["bias"] is None else options["bias"].to(device)
        got = effvlm.moe_route(logits.to(device), **{**options, "bias": bias})
    for a, b in zip(_as_sets(got.ids.cpu(), got.weight.cpu()), _as_sets(ids, weight.float()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_switch_with_a_full_expert(level: str) -> None:
    """transformers' Switch router on one sequence: tokens over the capacity go nowhere."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(d_model=16, num_experts=3, expert_capacity=5, router_jitter_noise=0.0)
    router = SwitchTransformersTop1Router(config).eval()
    with torch.no_grad():
        dispatch, weight, logits = router(torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(2)))
    with at(level) as device:
        got = effvlm.moe_route(logits[0].to(device), 1, capacity=5)
    taken = dispatch[0].sum(1) > 0
    assert 10 < int(taken.sum()) < 40
    assert torch.equal(got.ids[:, 0].cpu(), torch.where(taken, dispatch[0].argmax(1), -1))
    torch.testing.assert_close(got.weight[taken.to(device), 0].cpu(), weight[0, taken, 0])


def test_expert_choice_is_what_each_expert_would_take(level: str) -> None:
    logits = _logits(30, 6)
    with at(level) as device:
        got = effvlm.moe_route(logits.to(device), 6, by_expert=True, capacity=7)
    taken = torch.zeros(30, 7, dtype=torch.bool).scatter(1, got.ids.cpu().where(got.ids.cpu() >= 0, 6), True)[:, :6]
    wanted = torch.zeros(30, 6, dtype=torch.bool).scatter(0, logits.softmax(1).topk(7, dim=0).indices, True)
    assert torch.equal(taken, wanted)


def test_nan_goes_first_and_stays_in_its_token(level: str) -> None:
    logits = _logits(6, 40)
    logits[2, 33], logits[4, 0] = float("nan"), float("inf")
    with at(level) as device:
        for options in ({"score": "sigmoid"}, {"score": "softmax"}, {"score": "none", "renormalize": True}):
            got, clean = (effvlm.moe_route(x.to(device), 4, **options) for x in (logits, _logits(6, 40)))
            others = torch.tensor([0, 1, 3, 5], device=device)
            assert torch.equal(got.ids[others], clean.ids[others])
            assert torch.equal(got.weight[others], clean.weight[others])
            assert int(got.ids[2, 0]) == 33
            assert got.weight[2, 0].isnan()
            assert int(got.ids[4, 0]) == 0


def test_what_comes_out_goes_into_moe_ffn(level: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, up, down = (torch.randn(*s, generator=generator) * 0.2 for s in ((12, 16), (4, 16, 16), (4, 16, 8)))
    logits, mask = _logits(12, 4), torch.arange(12) % 3 > 0
    with at(level) as device:
        route = effvlm.moe_route(logits.to(device), 2, renormalize=True, mask=mask.to(device))
        out = effvlm.moe_ffn(x.to(device), route.ids, route.weight, up.to(device), down.to(device)).cpu()
    assert not out[~mask].any()
    assert out[mask].abs().sum(1).min() > 0


def test_grad_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_said", set())  # what was said once is said again
    logits = _logits(5, 8).requires_grad_()
    with pytest.warns(UserWarning, match="moe_route: an input requires grad"):
        effvlm.moe_route(logits, 2, renormalize=True).weight.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
