"""Compressed experts inside transformers: the same outputs as dense ones, saved, loaded, moved and made dense again."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import EXPERTS, expert_classes, families, tiny
from test_own_experts import OWN, _own_args
from tiny_moe import MODELS, inputs_of, make
from transformers import AutoModel, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

import effvlm
from effvlm.compression import compress
from effvlm.hf import planes as planes_module
from effvlm.hf import ternary_experts
from effvlm.hf.planes import Planes
from effvlm.hf.quantizer import EffvlmConfig
from effvlm.ops.ternary_weight import PARTS
from effvlm.quant import TernaryRecipe


def _rounded(weight: torch.Tensor) -> Planes:
    """Some ternary weights near these."""
    scale = weight.abs().mean(-1)
    trits = (weight > scale[..., None]).to(torch.int8) - (weight < -scale[..., None]).to(torch.int8)
    return Planes(effvlm.ternary_pack(trits, scale))


def _compressed(module: Any) -> tuple[Any, Any]:
    """A copy on compressed weights, and one on dense ones of the same values."""
    ours = copy.deepcopy(module)
    slots = ternary_experts.slots_of(module)
    ternary_experts.install(ours, {s.path: _rounded(s.read(module, 0, s.experts)) for s in slots})
    dense = copy.deepcopy(ours)
    ternary_experts.uninstall(dense, torch.float32)
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (dense, module)]
    assert shapes[0] == shapes[1]
    return copy.deepcopy(ours), dense


def _near(ours: Any, dense: Any) -> None:
    ours, dense = (t[0] if isinstance(t, tuple) else t for t in (ours, dense))
    assert float((ours - dense.view(ours.shape)).abs().max()) <= 1e-5 * float(dense.abs().max())


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_registered_families_compute_what_dense_weights_do(family: str) -> None:
    for cls in expert_classes(family):
        module = tiny(cls)
        ours, dense = _compressed(module)
        dense.config._experts_implementation_internal = "batched_mm"
        x = torch.randn(7, ternary_experts.slots_of(module)[0].shape(module)[2])
        ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(7)])
        weight = torch.rand(7, 2)
        _near(ours(x, ids, weight), dense(x, ids, weight))


@pytest.mark.parametrize("name", sorted(ternary_experts.KINDS))
@torch.no_grad()
def test_families_with_experts_of_their_own_do(name: str) -> None:
    ours, dense = _compressed(OWN[name]())
    _near(ours(*_own_args(name)), dense(*_own_args(name)))


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_models_run_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = make(name), inputs_of(name)
    report = compress(model, {"target_bits": 1.0})
    assert len(report.layers) == len([m for m in model.modules() if ternary_experts.kind_of(m)]) > 0
    logits = model(**inputs)[0]
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "one", max_shard_size="200KB")
    loaded = type(model).from_pretrained(tmp_path / "one")
    assert torch.equal(loaded(**inputs)[0], logits)
    loaded.save_pretrained(tmp_path / "two")
    again = type(model).from_pretrained(tmp_path / "two")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(**inputs)[0], logits)
    again.dequantize()
    assert not any(isinstance(m, Planes) for m in again.modules())
    _near(logits, again(**inputs)[0])
    assert torch.equal(again.generate(**prompt, max_new_tokens=5, do_sample=False), answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A compressed model of one layer's experts, on disk."""
    out = Path(tmp_path_factory.mktemp("small"))
    compress(make("qwen3_moe"), out=out / "model")
    return out / "model"


def _edited(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a folder whose tensors a function has changed."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_names_of_saved_tensors_and_the_config(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"model.layers.0.mlp.experts.gate_up_proj.{part}" for part in PARTS} <= names
    assert not any(".experts." in name and name.rpartition(".")[2] not in PARTS for name in names)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "effvlm"
    assert config["version"] == 1
    assert config["recipe"]["method"] == "rtn"
    assert config["tensors"]["model.layers.0.mlp.experts.down_proj"][:3] == [6, 64, 48]


@torch.no_grad()
def test_a_model_without_its_head_loads(folder: Path) -> None:
    whole, body = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = inputs_of("qwen3_moe")
    assert torch.equal(body(**inputs)[0], whole.model(**inputs)[0])


@torch.no_grad()
def test_other_dtypes_leave_the_weights_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    planes = model.model.layers[0].mlp.experts.gate_up_proj
    before = {name: planes.get_buffer(name).clone() for name in PARTS}
    model.to(torch.float16)
    assert model.lm_head.weight.dtype == torch.float16
    assert all(torch.equal(planes.get_buffer(name).view(torch.uint8), before[name].view(torch.uint8)) for name in PARTS)
    assert model(**inputs_of("qwen3_moe"))[0].isfinite().all()
    model.dequantize(torch.bfloat16)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16


def test_dtypes_that_a_class_wants_for_its_parameters_are_not_for_ours(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    ours, theirs = WeightRenaming(f"{name}.scales", f"{name}.scales"), WeightRenaming("lm_head.weight", "lm_head.weight")
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    assert model.hf_quantizer.get_new_dtype(ours, tensor, torch.float32) is None
    assert model.hf_quantizer.get_new_dtype(theirs, tensor, torch.float32) == torch.float32


def test_matrices_that_are_needed_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(planes_module, "_advise", lambda address, size, what: asked.append((address, address + size)))
    planes = _rounded(torch.randn(6, 200, 300))
    ends = planes.base[:: (len(planes.base) - 1) // 6].tolist()
    start = planes.data.data_ptr()

    def call(*experts: int) -> list[int]:
        asked.clear()
        planes.prefetch(torch.tensor([experts]))
        return [e for e in range(6) if any(a <= start + 4 * ends[e] and b == start + 4 * ends[e + 1] for a, b in asked)]

    assert call(0, 3, 6, -1) == [0, 3]
    assert len(asked) == 4 + 2  # the directory and the like, once
    assert call(3, 5) == [5]
    for _ in range(planes_module.RECENT):
        assert call(3) == []
    assert call(0, 3) == [0]


def test_int8_activations_are_saved(tmp_path: Path) -> None:
    compress(make("qwen3_moe"), out=tmp_path / "out", activations="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {planes.activations for _, planes in ternary_experts.planes_of(model)} == {"int8"}


def test_layers_left_dense_are_saved_as_transformers_saves_them(tmp_path: Path) -> None:
    model = make("qwen3_moe")
    model.model.layers[1].mlp.experts.double()  # a dtype that we do not take
    report = compress(model)
    assert report.left_alone == {"model.layers.1.mlp.experts": "Qwen3MoeExperts: weights are float64 Parameter"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        same = loaded.state_dict()[name]
        assert torch.equal(same.view(torch.uint8) if tensor.dtype == torch.uint32 else same.double(),
                           tensor.view(torch.uint8) if tensor.dtype == torch.uint32 else tensor.double())  # fmt: skip


def test_a_damaged_weight_is_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.data"].view(torch.uint8)[40] ^= 4

    model = AutoModelForCausalLM.from_pretrained(_edited(folder, tmp_path / "flipped", flip))
    with pytest.raises(ValueError, match=r"corrupt weights: the checksum of matrix \d is wrong"):
        model(**inputs_of("qwen3_moe", batch=8))

    def behead(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}.header"]

    with pytest.raises(ValueError, match=rf"effvlm: {name} was not loaded, or is damaged"):
        AutoModelForCausalLM.from_pretrained(_edited(folder, tmp_path / "headless", behead))


def test_what_the_config_says_is_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="compressed in version 1, got 2; a newer effvlm reads it"):
        EffvlmConfig(version=2)
    with pytest.raises(ValueError, match="expected activations 'exact' or 'int8', got 'fp4'"):
        EffvlmConfig(activations="fp4")
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": (6, 96, 32, 100)}
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.quantization_config = EffvlmConfig(tensors=tensors).to_dict()
    with pytest.raises(ValueError, match=r"gate_up_proj of shape \(6, 96, 64\) by its config, got \(6, 96, 32\)"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_dense_models_are_not_compressed_while_they_load(tmp_path: Path) -> None:
    make("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"effvlm\.compress makes one"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=EffvlmConfig())


_LOAD = """
import re, sys
import torch
import effvlm
from transformers import AutoModelForCausalLM
from effvlm.hf.ternary_experts import planes_of

def private():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what loading takes anyway, with few experts
before = private()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
with torch.no_grad():
    model(torch.zeros(1, 4, dtype=torch.int64))
grown, experts = private() - before, sum(w.weight.nbytes for _, w in planes_of(model))
place = next(planes_of(model))[1].data.data_ptr()
maps = [line for line in open("/proc/self/maps") if "-" in line.split()[0]]
inside = [l for l in maps if int(l.split("-")[0], 16) <= place < int(l.split()[0].split("-")[1], 16)]
print(grown, experts, inside[0].split()[-1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loaded_experts_are_views_of_the_mapped_file(folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")}
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 96, "num_hidden_layers": 3}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, **sizes))
    for module in (layer.mlp.experts for layer in model.model.layers):  # some 10 MB, quickly
        slots = ternary_experts.slots_of(module)
        ternary_experts.install(module, {s.path: _rounded(s.read(module, 0, s.experts)) for s in slots})
    from effvlm.compression.in_place import _mark

    _mark(model, TernaryRecipe(), "exact")
    model.save_pretrained(tmp_path)
    run = [sys.executable, "-c", _LOAD, str(folder), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown, experts, file = re.split(r"\s+", done.stdout.strip().splitlines()[-1])
    assert int(experts) > 8e6
    assert int(grown) < 0.4 * int(experts)
    assert file == str(tmp_path / "model.safetensors")
