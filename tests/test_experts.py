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
from effvlm.hf import experts

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
        width = experts.weights_of(module)[0].shape[2]
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
    assert sum("moe_ffn" in what for what in report.modules.values()) == 6
    assert sum("chunk_scan" in what for what in report.modules.values()) == 3  # the other half of its layers
    assert not report.fallbacks
    assert "12 modules run effvlm kernels, 0 do not" in str(report)  # and three linear layers
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


def test_a_changed_gate_is_seen() -> None:
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
