"""The pass over a model or a folder: what it writes, that it goes on where it was killed, and what it says when it cannot."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moe import MODELS, inputs_of, make
from transformers import AutoModelForCausalLM

from effvlm.compression import compress, parse_memory
from effvlm.ops import ternary_pack
from effvlm.quant import TernaryRecipe, quantize

ONE_MATRIX = 200_000  # bytes of max_memory that let only one of these tiny matrices be under way


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    """A folder with a dense model, a card and a tokenizer's file."""
    folder = Path(tmp_path_factory.mktemp("dense"))
    make("qwen3_moe").save_pretrained(folder, max_shard_size="300KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Original\nWords.\n")
    return folder


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: Any) -> Path:
    """It, compressed without interruption."""
    out = Path(tmp_path_factory.mktemp("finished")) / "out"
    compress(dense, out=out)
    return out


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def _same_tensors(one: Any, other: Any) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)), name


# ---- what is made ----


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("original", [True, False])
def test_a_folder_becomes_what_a_model_in_memory_does(name: str, original: bool, tmp_path: Path) -> None:
    """In the layouts of checkpoints, and in that of parameters."""
    model = make(name)
    model.save_pretrained(tmp_path / "dense", save_original_format=original, max_shard_size="300KB")
    report = compress(tmp_path / "dense", out=tmp_path / "out", max_memory=ONE_MATRIX)
    in_memory = compress(model)
    _same_tensors(type(model).from_pretrained(tmp_path / "out"), model)
    for one, other in zip(report.layers, in_memory.layers, strict=True):
        assert one == other
    assert report.bytes_after < report.bytes_before


def test_trits_are_those_of_the_quantiser(finished: Path, dense: Path) -> None:
    experts = load_file(finished / "model-experts-00001.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(dense).model.layers[1].mlp.experts.down_proj.detach()
    made = quantize(loaded, None, TernaryRecipe(method="rtn", levels=3))
    for part, tensor in ternary_pack(made.trits, made.scales).tensors().items():
        assert torch.equal(experts[f"model.layers.1.mlp.experts.down_proj.{part}"].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("bits", [0.5, 0.8, 1.3])
def test_the_rate_is_met(bits: float) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2, vocab_size=32))
    report = compress(model, {"target_bits": bits})
    assert report.layers[0].bits_per_weight == pytest.approx(bits, rel=0.03)


def test_files_beside_the_weights(finished: Path, dense: Path) -> None:
    card = (finished / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert "import effvlm" in card
    assert "| model.layers.2.mlp.experts | 6 |" in card
    assert "Words." in card
    assert (finished / "tokenizer.json").read_text() == "{}"
    index = json.loads((finished / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):
        assert set(load_file(finished / file)) == {name for name, where in index.items() if where == file}
    assert not [p for p in finished.iterdir() if p.name.startswith(".")]
    again = compress(dense, out=finished)  # nothing left to do
    assert [layer.name for layer in again.layers] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert "model.layers.0.mlp.experts" in str(again)
    assert json.loads(json.dumps(again.to_dict()))["ratio"] == again.ratio > 1


# ---- layouts of older checkpoints ----


def _rewritten(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path, {"format": "pt"})


def test_names_that_transformers_renames_when_it_loads(tmp_path: Path) -> None:
    model = make("mixtral")
    model.save_pretrained(tmp_path / "dense")
    _rewritten(tmp_path / "dense", lambda name, tensor: (name.replace(".mlp.", ".block_sparse_moe."), tensor))
    assert any(".block_sparse_moe." in name for name in load_file(tmp_path / "dense/model.safetensors"))
    compress(tmp_path / "dense", out=tmp_path / "out")
    compress(model)
    loaded = type(model).from_pretrained(tmp_path / "out")
    _same_tensors(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    _same_tensors(type(model).from_pretrained(tmp_path / "again"), model)


def test_weights_that_transformers_transposes_when_it_loads(tmp_path: Path) -> None:
    model = make("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    _rewritten(tmp_path / "dense", lambda name, t: (name, t.mT.contiguous() if ".experts." in name else t))
    compress(tmp_path / "dense", out=tmp_path / "out", max_memory=ONE_MATRIX)
    compress(model)
    _same_tensors(type(model).from_pretrained(tmp_path / "out"), model)


# ---- killed, and full disks ----

_KILLED = """
import os, shutil, signal, sys
import torch
torch.set_num_threads(1)
from effvlm.compression import compress
import transformers.modeling_utils

source, out = sys.argv[1:]

def die_at(count):
    "Kill this process when it is about to make something last for the count-th time, or (odd counts) right after."
    seen = [0]
    def watched(call):
        def run(*args):
            seen[0] += 1
            if seen[0] == count // 2 and count % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            done = call(*args)
            if seen[0] == count // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        return run
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)

def killed(count):
    child = os.fork()
    if child == 0:
        die_at(count)
        compress(source, out=out)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

for count in range(2, 60, 5):  # from the beginning each time
    shutil.rmtree(out, ignore_errors=True)
    assert killed(count), count
    compress(source, out=out)
    print({p: __import__("hashlib").sha256(open(f"{out}/{p}", "rb").read()).hexdigest() for p in os.listdir(out)})
shutil.rmtree(out)
for _ in range(3):  # again and again, a part further each time
    assert killed(18)
compress(source, out=out)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(dense: Path, finished: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-c", _KILLED, str(dense), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rounds = done.stdout.splitlines()
    expected = _hashes(finished)
    assert len(rounds) == 12
    assert all(json.loads(found.replace("'", '"')) == expected for found in rounds)
    assert _hashes(tmp_path / "out") == expected


def test_a_journal_cut_short_and_a_lost_file_are_done_again(dense: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(dense, out=out)
    journal = out / "compression.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    (out / "model-experts-00001.safetensors").write_bytes(b"half")
    (out / ".model-experts-00002.safetensors.part").write_bytes(b"rest of a killed run")
    compress(dense, out=out)
    assert _hashes(out) == _hashes(finished)


@pytest.mark.parametrize("call_number", [3, 6, 12, 18])
def test_a_full_disk_is_a_sentence_and_keeps_what_is_done(
    call_number: int, dense: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= call_number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space is left; finished parts are kept, the same call goes on from there") as told:
        compress(dense, out=tmp_path / "out")
    assert told.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out").glob("*.part"))
    monkeypatch.undo()
    compress(dense, out=tmp_path / "out")
    assert _hashes(tmp_path / "out") == _hashes(finished)


# ---- memory ----

_LARGE = """
import json, os, resource, struct, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.initialization import no_init_weights
from effvlm.compression import compress

folder = Path(sys.argv[1])
sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 56, "num_hidden_layers": 1, "vocab_size": 252_000}
config = Qwen3MoeConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, architectures=["Qwen3MoeForCausalLM"])
config.save_pretrained(folder)
with torch.device("meta"), no_init_weights():
    model = AutoModelForCausalLM.from_config(config).bfloat16()
noise = (torch.randn(1 << 20) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
names, at, header = dict(model.state_dict()), 0, {}
for name, tensor in names.items():
    size = 2 * tensor.numel()
    header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
    at += size
text = json.dumps(header).encode()
with open(folder / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, tensor in names.items():
        left = 2 * tensor.numel()
        while left:
            left -= file.write(noise[:left])
del model, names
report = compress(folder, out=sys.argv[2], max_memory="60MB")
print(at, report.peak_memory, report.bytes_after)
"""


def test_a_model_of_more_than_its_memory(tmp_path: Path) -> None:
    run = [sys.executable, "-c", _LARGE, str(tmp_path / "dense"), str(tmp_path / "out")]
    (tmp_path / "dense").mkdir()
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, peak, after = map(int, done.stdout.split())
    assert whole > 1.2e9
    assert peak < 0.6e9  # of which Python, torch and transformers are 0.4
    assert after < whole - 0.16e9
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


def test_too_little_memory_is_told(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected max_memory of at least \d+ MB, which one matrix of 96 × 64 takes, got 0 MB"):
        compress(dense, out=tmp_path / "out", max_memory=1000)
    with pytest.raises(ValueError, match="since calibration runs the model in memory"):
        compress(dense, out=tmp_path / "out", max_memory="100kB", calibration=[inputs_of("qwen3_moe")])
    assert parse_memory("4GB") == 4 * 10**9
    assert parse_memory("1.5 GiB") == 3 << 29
    for text in ("much", "4 parsecs", 0):
        with pytest.raises(ValueError, match="expected max_memory as bytes, or like '4GB', got"):
            parse_memory(text)
