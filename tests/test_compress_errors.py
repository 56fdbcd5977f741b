"""What ``effvlm.compress`` says of wrong input, and ``effvlm compress`` in the shell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import call
from tiny_moe import make

from effvlm.compression import compress, shell


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    """A folder with a dense model in several files."""
    folder = Path(tmp_path_factory.mktemp("dense"))
    make("qwen3_moe").save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def broken(dense: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    shutil.copytree(dense, tmp_path / "broken")
    return tmp_path / "broken"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_a_truncated_file_is_named(broken: Path, tmp_path: Path) -> None:
    shard = _shards(broken)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated: expected \d+ bytes, got \d+; fetch it again"):
        compress(broken, out=tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:5])
    with pytest.raises(ValueError, match=rf"expected .*{shard.name} to be a safetensors file, got one that cannot be read"):
        compress(broken, out=tmp_path / "out")
    shard.write_bytes(b"\x10" + b"\0" * 7 + b"<html>no such file</html>")
    with pytest.raises(ValueError, match=rf"expected .*{shard.name} to be a safetensors file, got one that cannot be read"):
        compress(broken, out=tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"expected .*{shard.name}, which model.safetensors.index.json names, got no such file"):
        compress(broken, out=tmp_path / "out")


def test_a_file_that_ends_under_way_keeps_what_is_done(broken: Path, tmp_path: Path) -> None:
    def cut(done: int, total: int, what: str) -> None:
        if what == "model.layers.1.mlp.experts":
            for shard in _shards(broken):
                shard.write_bytes(b"")

    with pytest.raises(ValueError, match=r"model-0.* ends in the middle of model\.layers\.\d"):
        compress(broken, out=tmp_path / "out", max_memory=200_000, progress=cut)
    assert (tmp_path / "out/model-experts-00000.safetensors").is_file()
    assert not (tmp_path / "out/model-experts-00001.safetensors").is_file()


def test_weights_that_are_no_numbers_are_named(broken: Path, tmp_path: Path) -> None:
    for shard in _shards(broken):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("layers.2.mlp.experts.4.down_proj.weight"):
                tensor[3, 5] = float("nan")
        save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.mlp\.experts\.down_proj, from expert 0 on: .*finite weights, got NaN"
    ):
        compress(broken, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architectures": ["NoSuchModel"]}, r"expected a class that transformers .* has, got NoSuchModel"),
        ({"architectures": None}, "got none in config.json"),
        ({"quantization_config": {"quant_method": "fp8"}}, "as they were trained, got a model quantised by fp8"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "expected a model with routed experts"),
    ],
)
def test_configs_that_do_not_fit_are_told(change: dict[str, Any], text: str, broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=text):
        compress(broken, out=tmp_path / "out")


def test_experts_missing_from_the_files_leave_their_layer_alone(broken: Path, tmp_path: Path) -> None:
    for shard in _shards(broken):
        tensors = {n: t for n, t in load_file(shard).items() if "layers.1.mlp.experts" not in n or "down_proj" not in n}
        save_file(tensors, shard, {"format": "pt"})
    report = compress(broken, out=tmp_path / "out")
    why = "Qwen3MoeExperts: the files have no model.layers.1.mlp.experts.down_proj"
    assert report.left_alone == {"model.layers.1.mlp.experts": why}
    assert why in str(report)


def test_where_the_result_goes(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected out, a folder for the result"):
        compress(dense)
    with pytest.raises(ValueError, match="expected out to be a folder outside the model's"):
        compress(dense, out=dense / "small")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"got .*full with other files"):
        compress(dense, out=tmp_path / "full")
    with pytest.raises(ValueError, match="expected out to be a new folder"):
        compress(make("qwen3_moe"), out=tmp_path / "full")
    with pytest.raises(TypeError, match="expected a model, or a folder with one, got int"):
        compress(3, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a model, or a folder with config\.json and safetensors, got nowhere"):
        compress("nowhere", out=tmp_path / "out")
    with pytest.raises(TypeError, match="expected a Hugging Face model"):
        compress(torch.nn.Linear(2, 2))
    model = make("qwen3_moe")
    compress(model)
    with pytest.raises(ValueError, match="got one that is compressed already"):
        compress(model)


def test_other_work_in_the_folder_is_not_mixed_in(dense: Path, broken: Path, tmp_path: Path) -> None:
    compress(dense, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"got .*out with that on other weights, calibration or recipe"):
        compress(dense, {"target_bits": 1.0}, out=tmp_path / "out")
    shard = _shards(broken)[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*out with that on other weights, calibration or recipe"):
        compress(broken, out=tmp_path / "out")
    report = compress(dense, {"target_bits": 1.0}, out=tmp_path / "out", resume=False)
    assert report.layers[0].bits_per_weight > 0.95


@pytest.mark.parametrize(
    ("recipe", "error", "text"),
    [
        ({"target_bit": 0.8}, ValueError, "expected fields among target_bits.*got 'target_bit'"),
        ({"target_bits": 7}, ValueError, "expected target_bits to be a number in"),
        ({"method": "gptq"}, ValueError, "expected calibration for method 'gptq', got none"),
        ({"activations": "int4"}, ValueError, "expected activations 'exact' or 'int8', got 'int4'"),
        (0.8, TypeError, "expected a TernaryRecipe, its fields or a YAML file, got float"),
        ("none.yaml", ValueError, r"expected a recipe as a YAML file, got none\.yaml"),
    ],
)
def test_recipes_that_do_not_fit_are_told(recipe: Any, error: type, text: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        compress(dense, recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_in_files(dense: Path, tmp_path: Path) -> None:
    good, bad, typo = (tmp_path / name for name in ("good.yaml", "bad.yaml", "typo.yaml"))
    good.write_text("target_bits: 1.0\nmethod: rtn\nactivations: int8\n")
    bad.write_text("a: [1\n")
    typo.write_text("just words\n")
    report = compress(dense, good, out=tmp_path / "out")
    assert 0.95 < report.layers[0].bits_per_weight < 1.05
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["activations"] == "int8"
    with pytest.raises(ValueError, match=r"expected .*bad\.yaml to be YAML"):
        compress(dense, bad, out=tmp_path / "no")
    with pytest.raises(ValueError, match=r"expected .*typo\.yaml to have a recipe's fields"):
        compress(dense, typo, out=tmp_path / "no")


# ---- the shell ----


def test_shell(dense: Path, tmp_path: Path, capfd: Any) -> None:
    code, out, _ = call(capfd, "compress", dense, "--out", tmp_path / "out", "--bits", 1.0, "--max-memory", "1GB", "--json")
    assert code == 0
    result = json.loads(out)
    assert [layer["experts"] for layer in result["layers"]] == [6, 6, 6]
    assert result["ratio"] > 3
    code, out, _ = call(capfd, "compress", dense, "--out", tmp_path / "out", "--bits", 1.0)
    assert code == 0
    assert "bits/weight" in out
    assert "peak memory" in out
    code, _, error = call(capfd, "compress", dense, "--out", tmp_path / "out", "--bits", 0.9)
    assert code == 1
    assert error.strip().endswith("resume=False (--restart) begins again")
    assert call(capfd, "compress", dense, "--out", tmp_path / "out", "--bits", 0.9, "--restart")[0] == 0


def test_shell_calibrates_with_text(dense: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(dense, folder)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * i % 61) for i in range(100)))
    quick = tmp_path / "quick.yaml"
    quick.write_text("sweeps: 0\niterations: 1\nallocate: false\n")
    arguments = ["compress", folder, "--out", tmp_path / "out", "--method", "gptq", "--calibration", text, "--recipe", quick]
    code, _, error = call(capfd, *arguments)
    assert code == 1
    assert "expected at least 512 tokens of calibration" in error
    monkeypatch.setattr(shell, "BLOCK", 48)
    code, out, _ = call(capfd, *arguments, "--json")
    assert code == 0
    assert all(layer["output_error"] > 0 for layer in json.loads(out)["layers"])


def test_interrupted_it_says_how_to_go_on(dense: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shell, "compress", interrupted)
    code, _, error = call(capfd, "compress", dense, "--out", tmp_path / "out")
    assert code == 130
    assert "the same command goes on from there" in " ".join(error.split())
