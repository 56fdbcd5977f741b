"""effvlm.enable on families that compute their experts themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import effvlm
from effvlm.hf import experts, own_experts


def _own(family: str, name: str, config: str, options: Any = None, **sizes: Any) -> Any:
    import importlib

    package = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(
        getattr(package, config)(**sizes), **(options or {})
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made.eval()


OWN = {
    "Llama4TextMoe": lambda: _own(
        "llama4", "Llama4TextMoe", "Llama4TextConfig", hidden_size=32, intermediate_size=24, intermediate_size_mlp=24,
        num_local_experts=4, num_experts_per_tok=2,
    ),
    "JetMoeMoE": lambda: _own(
        "jetmoe", "JetMoeMoE", "JetMoeConfig", hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    ),
    "LongcatFlashExperts": lambda: _own(
        "longcat_flash", "LongcatFlashExperts", "LongcatFlashConfig", hidden_size=32, expert_ffn_hidden_size=24,
        n_routed_experts=4, zero_expert_num=2,
    ),
    "Step3p7Experts": lambda: _own(
        "step3p7", "Step3p7Experts", "Step3p7TextConfig", hidden_size=32, moe_intermediate_size=24, num_local_experts=4
    ),
    "DbrxExperts": lambda: _own(
        "dbrx", "DbrxExperts", "DbrxFFNConfig", hidden_size=32, ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2
    ),
    "SwitchTransformersExperts": lambda: _own(
        "switch_transformers", "SwitchTransformersExperts", "SwitchTransformersConfig", d_model=32, d_ff=24, num_experts=4
    ),
    "NllbMoeExperts": lambda: _own(
        "nllb_moe", "NllbMoeExperts", "NllbMoeConfig", {"ffn_dim": 24}, d_model=32, num_experts=4, moe_token_dropout=0.2
    ),
    "VitPoseNaiveMoe": lambda: _own(
        "vitpose_backbone", "VitPoseNaiveMoe", "VitPoseBackboneConfig", hidden_size=16, mlp_ratio=2, part_features=6,
        num_experts=4,
    ),
}  # fmt: skip


def _own_args(name: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 7, 32, generator=generator), torch.rand(14, 4, generator=generator)
    if name in ("Llama4TextMoe", "JetMoeMoE"):
        return (x,)
    if name == "VitPoseNaiveMoe":
        return x, torch.tensor([3, 1]).view(2, 1, 1)
    ids = torch.stack([torch.randperm(6 if "Longcat" in name else 4, generator=generator)[:2] for _ in range(14)])
    one_hot = torch.nn.functional.one_hot(ids % 4, 4)
    if name == "SwitchTransformersExperts":
        one_hot[3] = 0  # no room
        return x.flatten(0, 1), one_hot[:, :1], weight[:, :1]
    if name == "NllbMoeExperts":
        return x.flatten(0, 1), one_hot[:, 0], weight
    return x.flatten(0, 1), ids, weight[:, :2]


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of a kernel by a forward of ours."""
    made: list[int] = []
    for name in ("moe_ffn", "grouped_linear", "experts_in_parts"):
        kernel = getattr(own_experts, name)
        monkeypatch.setattr(own_experts, name, lambda *a, kernel=kernel, **k: made.append(1) or kernel(*a, **k))
    return made


def replace(module: Any, *, free_original: bool = False) -> tuple[experts.EnableReport, list[Any]]:
    report, undo = experts.EnableReport(), []
    experts._replace("it", module, report, undo, {}, free_original)
    return report, undo


@pytest.mark.parametrize("free_original", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_own_forwards_compute_what_they_did(name: str, free_original: bool, own_calls: list[int]) -> None:
    module, args = OWN[name](), _own_args(name)
    assert type(module).__name__ == name
    state = torch.random.get_rng_state()
    with torch.no_grad():
        wanted = module(*args)
        report, undo = replace(module, free_original=free_original)
        assert f"in place of {name}.forward" in report.modules["it"]
        packs = name in ("SwitchTransformersExperts", "NllbMoeExperts", "VitPoseNaiveMoe")
        assert ("packed copy of" in report.modules["it"]) == (packs and not free_original)
        own_calls.clear()
        got = module(*args)
        assert len(own_calls) == 1
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
        next(module.parameters()).add_(0.5)  # what is packed follows
        torch.testing.assert_close(module(*args), type(module).forward(module, *args), rtol=1e-5, atol=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(own_calls) == 2
    assert module(*(a.requires_grad_(a.is_floating_point()) for a in args)) is not None
    assert len(own_calls) == 2  # with grad, the class's own forward
    undo[0]()
    assert "forward" not in vars(module)


def test_a_clamp_after_the_activation_is_not_taken_for_one_before(own_calls: list[int]) -> None:
    module, args = OWN["Step3p7Experts"](), _own_args("Step3p7Experts")
    module.limit = 0.5
    with torch.no_grad():
        wanted = module(*args)
        replace(module)
        torch.testing.assert_close(module(*args), wanted, rtol=1e-5, atol=1e-5)
    assert own_experts.gate_of(module, own_experts._find_gate) is None


@pytest.mark.parametrize("name", OWN)
def test_a_class_that_computes_something_else_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade of transformers: found by trying, and said."""
    module, args = OWN[name](), _own_args(name)
    cls, plain = type(module), type(module).forward

    def changed(self: Any, *args: Any) -> Any:
        out = plain(self, *args)
        return (out[0] * 1.05, *out[1:]) if isinstance(out, tuple) else out * 1.05

    monkeypatch.setattr(cls, "forward", changed)
    report, undo = replace(module)
    assert "it computes something else" in report.fallbacks["it"]
    assert not undo
    with torch.no_grad():
        first = [o[0] if isinstance(o, tuple) else o for o in (module(*args), plain(module, *args))]
    torch.testing.assert_close(first[0], first[1] * 1.05)


def test_packed_experts_are_said_once_and_saved_as_ever(tmp_path: Any) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=3, vocab_size=32,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ids = torch.randint(2, 32, (2, 9))
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    values = {k: v.clone() for k, v in model.state_dict().items()}
    report = effvlm.enable(model, free_original=True)
    assert len(report.modules) == 2
    assert not report.fallbacks
    assert "MiB" not in str(report)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
    model.save_pretrained(tmp_path)
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, values[name]), name
    effvlm.disable(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
    again.eval()
    assert "packed copy of 0.0 MiB" in str(effvlm.enable(again))
    assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), plain)


def test_llama4_generates_the_same() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=4, num_hidden_layers=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        interleave_moe_layer_step=1, attn_scale=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 50, (2, 9))
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    report = effvlm.enable(model)
    assert len(report.modules) == 2
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
    effvlm.disable(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_copy_of_a_replaced_module_works() -> None:
    for name in ("JetMoeMoE", "SwitchTransformersExperts"):
        module, args = OWN[name](), _own_args(name)
        with torch.no_grad():
            wanted = module(*args)
            replace(module)
            torch.testing.assert_close(copy.deepcopy(module)(*args), wanted, rtol=1e-5, atol=1e-4)


def test_families_that_are_left_alone_are_named() -> None:
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
        is_moe=True, num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    report = effvlm.enable(DogeForCausalLM(config))
    assert not report.modules
    assert len(report.fallbacks) == 2
    assert "single neurons" in str(report)
