"""effvlm.enable: every family of routed experts computes what it did, on our kernels, and is restored exactly."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from moe_families import EXPERTS, expert_classes, families, tiny

import effvlm
from effvlm import _library, demo
from effvlm.hf import experts, own_experts

UNFUSED = {"Inkling2Experts", "MuseSparkExperts"}  # a gate with parameters; a norm after each expert


def run(module: Any, implementation: str, *args: torch.Tensor) -> torch.Tensor:
    module.config._experts_implementation_internal = implementation
    with torch.no_grad():
        return module(*args)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.setattr(_library, "_said", set())  # what was said once is said again

    ALL_EXPERTS_FUNCTIONS.register(experts.KEY, experts.experts_forward)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of our kernel had."""
    made: list[int] = []

    def count(name: str) -> None:
        kernel = getattr(experts, name)

        def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            made.append(len(x))
            return kernel(x, *args, **kwargs)

        monkeypatch.setattr(experts, name, counted)

    count("moe_ffn")
    count("experts_in_parts")
    return made


@pytest.mark.filterwarnings("ignore:effvlm. ")
@pytest.mark.parametrize("family", families())
def test_every_family_computes_what_it_did(family: str, calls: list[int]) -> None:
    for cls in expert_classes(family):
        module = tiny(cls)
        width = experts._weights(module)[0].shape[2]
        generator = torch.Generator().manual_seed(1)
        for tokens in (1, 3, 40, 0):
            x = torch.randn(tokens, width, generator=generator)
            ids = torch.rand(tokens, EXPERTS, generator=generator).topk(2).indices
            weights = torch.rand(tokens, 2, generator=generator)
            eager = run(module, "eager", x, ids, weights) if tokens else torch.zeros(0, width)
            calls.clear()
            got = run(module, experts.KEY, x, ids, weights)
            assert calls == [tokens], experts.why_not(module)
            assert (experts._fused_gate(module) is None) == (cls.__name__ in UNFUSED)
            torch.testing.assert_close(got, eager, rtol=2e-5, atol=2e-5)


def test_the_list_of_families_is_not_empty() -> None:
    assert len(families()) >= 40
    assert all(expert_classes(family) for family in families())


def test_a_gate_nobody_knows_is_called_between_our_products(calls: list[int]) -> None:
    (cls,) = expert_classes("mixtral.modeling_mixtral")
    module = tiny(cls)
    module._apply_gate = lambda rows: rows.chunk(2, dim=-1)[0].sin() * rows.chunk(2, dim=-1)[1]
    x, ids, weights = torch.randn(5, 32), torch.randint(EXPERTS, (5, 2)), torch.rand(5, 2)
    got = run(module, experts.KEY, x, ids, weights)
    assert calls == [5]
    torch.testing.assert_close(got, run(module, "grouped_mm", x, ids, weights), rtol=1e-5, atol=1e-5)
    report = experts.EnableReport()
    experts._select("it", module, report, [])
    assert report.modules == {"it": "grouped_linear twice, with the module's own gate"}


def test_weights_that_are_elsewhere_are_delegated(calls: list[int]) -> None:
    (cls,) = expert_classes("mixtral.modeling_mixtral")
    module = tiny(cls).to("meta")
    assert "weights are on meta (offloaded?)" in experts.why_not(module)
    report = experts.EnableReport()
    experts._select("it", module, report, [])
    assert "offloaded" in report.fallbacks["it"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_doubled_expert_changes_the_output(dtype: torch.dtype) -> None:
    """The comparison above can fail: our kernel reads the module's own parameters, as they are now."""
    (cls,) = expert_classes("qwen3_moe.modeling_qwen3_moe")
    module = tiny(cls).to(dtype)
    x, ids, weights = torch.randn(6, 32).to(dtype), torch.randint(EXPERTS, (6, 2)), torch.rand(6, 2)
    before = run(module, experts.KEY, x, ids, weights)
    with torch.no_grad():
        module.down_proj.mul_(2)
    torch.testing.assert_close(run(module, experts.KEY, x, ids, weights), 2 * before)


def test_sentinels_of_expert_parallelism_are_skipped() -> None:
    (cls,) = expert_classes("mixtral.modeling_mixtral")
    module = tiny(cls)
    x, weights = torch.randn(4, 32), torch.rand(4, 2)
    ids = torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [1, 2], [EXPERTS, 3]])
    module._is_expert_parallel = True
    torch.testing.assert_close(
        run(module, experts.KEY, x, ids, weights), run(module, "grouped_mm", x, ids, weights), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:effvlm. training")
def test_training_has_a_backward(calls: list[int]) -> None:
    (cls,) = expert_classes("qwen3_moe.modeling_qwen3_moe")
    module = tiny(cls)
    module.config._experts_implementation_internal = experts.KEY
    module(torch.randn(5, 32), torch.randint(EXPERTS, (5, 2)), torch.rand(5, 2)).sum().backward()
    assert not calls
    assert module.down_proj.grad.abs().sum() > 0


def test_compiled_without_graph_breaks() -> None:
    (cls,) = expert_classes("gpt_oss.modeling_gpt_oss")
    module = tiny(cls)
    x, ids, weights = torch.randn(9, 32), torch.randint(EXPERTS, (9, 2)), torch.rand(9, 2)
    plain = run(module, experts.KEY, x, ids, weights)
    assert torch.equal(run(torch.compile(module, fullgraph=True), experts.KEY, x, ids, weights), plain)


# ---- families that compute their experts themselves ----


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


# ---- whole models ----


@pytest.fixture
def vlm() -> Any:
    return demo.load()


def test_the_demo_model_generates_the_same_on_our_kernels(vlm: tuple[Any, Any], calls: list[int]) -> None:
    model, processor = vlm
    some = demo.samples(16)
    arguments = [s.image for s in some], [s.question for s in some]
    plain = demo.answer(model, processor, *arguments)
    report = effvlm.enable(model)
    assert len(report.modules) == 6
    assert not report.fallbacks
    assert "6 modules of experts run effvlm kernels, 0 do not" in str(report)
    assert demo.answer(model, processor, *arguments) == plain
    assert len(calls) % 6 == 0
    assert max(calls) > 16 * 144
    assert min(calls) == 16  # decoding stays on it
    assert effvlm.enable(model) is report
    effvlm.disable(model)
    calls.clear()
    assert demo.answer(model, processor, *arguments) == plain
    assert not calls
    with pytest.raises(RuntimeError, match=r"expected a model that effvlm\.enable was called on"):
        effvlm.disable(model)


def test_another_model_of_the_family_is_left_alone(vlm: tuple[Any, Any], calls: list[int]) -> None:
    other, processor = demo.load()
    effvlm.enable(vlm[0])
    demo.answer(other, processor, [demo.samples(1)[0].image], ["where is the ring ?"])
    assert not calls


def test_logits_are_close_and_saving_forgets(vlm: tuple[Any, Any], tmp_path: Any) -> None:
    model, processor = vlm
    sample = demo.samples(1)[0]
    inputs = processor(images=[sample.image], text=[demo.prompt(sample.question)], return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits
        effvlm.enable(model)
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "effvlm" not in (tmp_path / "config.json").read_text()


def test_enabled_and_reduced(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    with effvlm.reduce(model, effvlm.tokens.ToMe(keep=0.5)):
        plain = demo.evaluate(model, 40, processor=processor)["right"]
    effvlm.enable(model)
    with effvlm.reduce(model, effvlm.tokens.ToMe(keep=0.5)):
        assert demo.evaluate(model, 40, processor=processor)["right"] == plain


def test_the_model_can_be_freed() -> None:
    model, _ = demo.load()
    effvlm.enable(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_copy_of_a_replaced_module_works_and_a_changed_gate_is_seen() -> None:
    module = OWN["JetMoeMoE"]()
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        wanted = module(x)
        replace(module)
        torch.testing.assert_close(copy.deepcopy(module)(x), wanted, rtol=1e-5, atol=1e-4)
    (cls,) = expert_classes("mixtral.modeling_mixtral")
    decorated = tiny(cls)
    assert experts._fused_gate(decorated) is not None
    decorated.act_fn = torch.nn.Tanh()
    assert experts._fused_gate(decorated, again=True) is None


def test_copies_and_models_without_experts() -> None:
    model, _ = demo.load()
    effvlm.enable(model)
    with pytest.raises(RuntimeError):
        effvlm.disable(copy.deepcopy(model))
    from transformers import SiglipVisionConfig, SiglipVisionModel

    small = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    report = effvlm.enable(SiglipVisionModel(small))
    assert "no routed experts" in str(report)
    with pytest.raises(TypeError, match="expected a Hugging Face model, got Linear"):
        effvlm.enable(torch.nn.Linear(2, 2))


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
