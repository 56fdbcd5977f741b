"""Plain linear layers of a model under ``effvlm.enable``: few tokens run our kernel, all else torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import effvlm
from effvlm.hf import linears

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of ours had."""
    seen: list[int] = []

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(x))
        return effvlm.ops.grouped_linear(x, *args, **kwargs)

    monkeypatch.setattr(linears, "grouped_linear", counted)
    return seen


def _model(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options)).to(dtype).eval()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_are_ours_and_equal(dtype: torch.dtype, bias: bool, tokens: list[int]) -> None:
    model = _model(dtype, attention_bias=bias, mlp_bias=bias)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    ids = torch.arange(2 * 9).view(2, 9) + 1
    with torch.no_grad():
        expected = [model(ids[:b, :n]).logits for b, n in ((1, 1), (1, 7), (2, 4), (2, 5))]
        report = effvlm.enable(model)
        found = [model(ids[:b, :n]).logits for b, n in ((1, 1), (1, 7), (2, 4), (2, 5))]
        effvlm.disable(model)
        again = model(ids[:1, :7]).logits
    for a, b in zip(expected, found, strict=True):
        scale = float(a.float().abs().max())
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 0.03))
    assert torch.equal(again, expected[1])
    assert len(report.modules) == 2 * 7 + 1
    one = 15 if dtype == torch.bfloat16 else 0  # torch's products with a single vector are good in the other dtypes
    assert sorted(tokens) == [1] * one + [7] * 15 + [8] * 15


def test_generation_is_the_same(tokens: list[int]) -> None:
    model, ids = _model(torch.float32), torch.arange(12)[None]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    effvlm.enable(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert set(tokens) == {3}  # beams; the prompt has 36 tokens with them


def test_training_and_autocast_stay_with_torch(tokens: list[int]) -> None:
    model, ids = _model(torch.float32), torch.arange(5)[None]
    effvlm.enable(model)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.lm_head(torch.randn(2, 512)).dtype == torch.bfloat16
    assert tokens == []


def test_what_the_layers_are_given(tokens: list[int]) -> None:
    layer = nn.Linear(512, 513).bfloat16()
    torch.nn.init.normal_(layer.weight)
    shapes = ((512,), (3, 512), (2, 2, 512), (0, 512), (1, 1, 2, 512))
    model = _model()
    model.extra = layer
    with torch.no_grad():
        inputs = [torch.randn(shape).bfloat16() for shape in shapes] + [torch.randn(512, 4).bfloat16().T]
        expected = [layer(x) for x in inputs]
        effvlm.enable(model)
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(layer(x), y, rtol=0.02, atol=0.1)
        assert sorted(tokens) == [1, 2, 3, 4, 4]
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(2, 5).bfloat16())
        with pytest.raises(RuntimeError, match="dtype"):
            model.lm_head(torch.randn(2, 512))  # float32 into bfloat16, without a bias


def test_copies_compiles_and_leaves_others_alone() -> None:
    model, ids = _model(torch.float32), torch.arange(3)[None]
    effvlm.enable(model)
    copied = copy.deepcopy(model)
    assert copied.lm_head.forward.__self__ is copied.lm_head
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager")(ids).logits
    torch.testing.assert_close(compiled, expected)
    assert "forward" not in vars(_model().lm_head)
    effvlm.disable(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_replaced_forwards_and_small_layers_are_left() -> None:
    model = _model()
    model.small = nn.Linear(512, 127)
    model.lm_head.forward = model.lm_head.forward
    report = effvlm.enable(model)
    assert "something else" in report.fallbacks["lm_head"]
    assert "small" not in report.modules | report.fallbacks
    assert "model.layers.0.self_attn.q_proj" in report.modules


class _Own(nn.Linear):
    pass


def test_subclasses_are_left() -> None:
    model = _model()
    model.extra = _Own(512, 512)
    report = effvlm.enable(model)
    assert "extra" not in report.modules | report.fallbacks
