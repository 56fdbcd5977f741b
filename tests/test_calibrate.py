"""Compressing with calibration data: what each layer is compressed for, and what is said of data that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compress import _hashes, _same_tensors
from tiny_moe import inputs_of, make
from transformers import AutoModelForCausalLM

import effvlm
from effvlm.compression import compress
from effvlm.compression.calibrate import Session, _same
from effvlm.compression.modules import Inputs, compress_module
from effvlm.hf import ternary_experts
from effvlm.quant import TernaryRecipe

QUICK = {"sweeps": 1, "iterations": 1}


def _batches(name: str) -> list[dict[str, torch.Tensor]]:
    return [inputs_of(name, seed, 2, 30) for seed in range(3)]


@pytest.mark.parametrize("name", ["qwen3_moe", "switch", "llava", "dbrx", "qwen3_vl_moe"])
def test_blocks_that_are_skipped_change_nothing(name: str) -> None:
    model, done = make(name), []
    with Session(model, _batches(name), ternary_experts.found(model)[0]) as session:
        for module in session.order:
            calls = session.see(module)
            for i, seen in enumerate(calls):
                assert _same(seen, session._run(module, i, skip=False))
            assert session._skips
            done.append(module)
            experts = model.get_submodule(module)
            parameter = experts.get_parameter(ternary_experts.slots_of(experts)[-1].parameters[0])
            parameter.data *= -1  # what comes behind sees another input from here on
    assert len(done) >= 2


def test_calibration_lowers_the_error_and_a_folder_gives_the_same(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    make("qwen3_moe").save_pretrained(dense)
    rounded, calibrated, batches = make("qwen3_moe"), make("qwen3_moe"), _batches("qwen3_moe")
    recipe = {"target_bits": 1.0, "min_tokens": 4} | QUICK
    compress(rounded, recipe)
    seen: list[tuple[int, int, str]] = []
    report = compress(calibrated, recipe, batches, progress=lambda *told: seen.append(told))
    assert seen[-1][0] == seen[-1][1] == sum(layer.bytes_before for layer in report.layers)
    assert all(0 < layer.output_error < 0.9 for layer in report.layers)
    original = make("qwen3_moe")
    with torch.no_grad():
        wanted, *got = (m(**batches[0])[0] for m in (original, rounded, calibrated))
    errors = [float((g - wanted).norm() / wanted.norm()) for g in got]
    assert errors[1] < 0.95 * errors[0]
    compress(dense, recipe, batches, out=tmp_path / "out")
    _same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), calibrated)
    lost = tmp_path / "out/model-experts-00001.safetensors"
    before = _hashes(tmp_path / "out")
    lost.unlink()
    compress(dense, recipe, batches, out=tmp_path / "out")
    assert _hashes(tmp_path / "out") == before


def test_hessians_are_those_of_the_tokens_that_an_expert_gets() -> None:
    model = make("qwen3_moe")
    name, inputs = "model.layers.0.mlp.experts", inputs_of("qwen3_moe", 0, 2, 30)
    inputs["attention_mask"][0, :11] = 0
    with Session(model, [inputs], [name]) as session:
        calls = session.see(name)
    module = model.get_submodule(name)
    x, ids, _ = calls[0].args
    kept = inputs["attention_mask"].flatten().bool()
    sums, tokens = Inputs(module, calls, TernaryRecipe(max_tokens_factor=100)).grams(64, {})(1, 3)
    for i, e in enumerate((1, 2)):
        rows = x[kept & (ids == e).any(1)]
        assert int(tokens[i]) == len(rows)
        torch.testing.assert_close(sums[i], rows.T @ rows)
    few = Inputs(module, calls, TernaryRecipe(max_tokens_factor=1)).grams(64, {})(0, 6)[1]
    assert int(few.max()) == -(-49 * 2 // 6)


def test_the_second_product_is_seen_behind_the_compressed_first() -> None:
    model, name = make("gpt_oss"), "model.layers.0.mlp.experts"
    with Session(model, [inputs_of("gpt_oss", 0, 2, 30)], [name]) as session:
        calls = session.see(name)
    module = model.get_submodule(name)
    planes, _ = compress_module(name, module, TernaryRecipe(method="rtn"), "exact", 1 << 30, None, lambda size: None)
    up = planes["gate_up_proj"]
    x, ids, _ = calls[0].args
    sums, tokens = Inputs(module, calls, TernaryRecipe()).grams(48, {"gate_up_proj": up})(2, 4)
    for i, e in enumerate((2, 3)):
        rows = x[(ids == e).any(1)]
        made = module._apply_gate(rows @ up.dequantized(torch.float32)[e].T + module.gate_up_proj_bias[e])
        assert int(tokens[i]) == len(rows)
        torch.testing.assert_close(sums[i], (made.T @ made).detach(), rtol=1e-4, atol=1e-4)


def test_a_model_that_was_enabled_is_compressed() -> None:
    model, plain = make("switch"), make("switch")
    effvlm.enable(model)
    compress(model)
    compress(plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of("switch"))[0], plain(**inputs_of("switch"))[0])
    with pytest.raises(RuntimeError, match=r"expected a model that effvlm\.enable was called on"):
        effvlm.disable(model)


def test_bits_are_shared_out_by_routing_weight() -> None:
    model = make("qwen3_moe")
    name, batches = "model.layers.0.mlp.experts", _batches("qwen3_moe")
    with Session(model, batches, [name]) as session:
        calls = session.see(name)
    inputs = Inputs(model.get_submodule(name), calls, TernaryRecipe(target_bits=1.0))
    weights = torch.zeros(6, dtype=torch.float64)
    for call in calls:
        for ids, values in zip(call.args[1].flatten(), call.args[2].flatten(), strict=True):
            weights[ids] += values.double()
    torch.testing.assert_close(inputs.weights(), weights)
    slot = ternary_experts.slots_of(inputs.module)[0]
    bits = inputs.bits(lambda begin, end: slot.read(inputs.module, begin, end), 6, inputs.grams(64, {}))
    assert float(bits.mean()) == pytest.approx(1.0)
    assert float(bits.std()) > 0.05
    calls[0].args = (calls[0].args[0], torch.full_like(calls[0].args[1], 2), calls[0].args[2])
    only = Inputs(inputs.module, calls[:1], inputs.recipe)
    shared = only.bits(lambda begin, end: slot.read(inputs.module, begin, end), 6, only.grams(64, {}))
    assert shared[2] == shared.max() > shared[0]


def test_starved_experts_are_rounded_and_reported() -> None:
    report = compress(make("qwen3_moe"), {"min_tokens": 60} | QUICK, _batches("qwen3_moe"))  # 60 is the mean
    for layer in report.layers:
        assert 0 < len(layer.starved) < 6
        assert layer.methods == {"gptq": 12 - 2 * len(layer.starved), "rtn": 2 * len(layer.starved)}
    assert "starved" in str(report)


@pytest.mark.parametrize(
    ("calibration", "error", "text"),
    [
        (
            [{"input_ids": torch.zeros(2, 3, 4, dtype=torch.int64)}],
            ValueError,
            "inputs that Qwen3MoeForCausalLM takes; batch 0 gave",
        ),
        ([{"input_ids": torch.full((1, 3), 999)}], ValueError, "inputs that Qwen3MoeForCausalLM takes; batch 0 gave"),
        ([{"words": 1}], ValueError, "inputs that Qwen3MoeForCausalLM takes; batch 0 gave"),
        ([torch.zeros(1, 3)], TypeError, "expected calibration as dicts for"),
        ([], ValueError, "expected calibration inputs, got none"),
    ],
)
def test_wrong_calibration_is_told(calibration: Any, error: type, text: str) -> None:
    model = make("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        compress(model, calibration=calibration)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
