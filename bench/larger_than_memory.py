"""A model of more weights than memory: made, compressed and run, each in a process that the kernel kills above a cap.

python bench/larger_than_memory.py FOLDER            # Switch-base-128: 7.4 billion random weights, 15 GB of disk
python bench/larger_than_memory.py FOLDER --save     # appends the figures to bench/results

Needs Linux and a memory cgroup that this user may make (root in most containers). Page cache counts against the cap too, so what
is read twice comes from disk twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
SWITCH_BASE_128 = {  # google/switch-base-128's config.json
    "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "num_experts": 128,
    "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "expert_capacity": 64, "vocab_size": 32128,
    "feed_forward_proj": "relu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "router_jitter_noise": 0.0,
}  # fmt: skip


def make(folder: Path, layers: int) -> dict[str, Any]:
    """Random weights in the layout of the real checkpoint, a file per block, so that little memory is needed."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    from transformers.initialization import no_init_weights

    sizes = {"num_layers": layers, "num_decoder_layers": layers}
    sparse = {"num_sparse_encoder_layers": layers // 2, "num_sparse_decoder_layers": layers // 2}
    architectures = ["SwitchTransformersForConditionalGeneration"]
    SwitchTransformersConfig(**SWITCH_BASE_128 | sizes | sparse, architectures=architectures, dtype="bfloat16").save_pretrained(
        folder
    )
    with torch.device("meta"), no_init_weights():
        model = SwitchTransformersForConditionalGeneration(AutoConfig.from_pretrained(folder))
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            block = re.match(r"(encoder|decoder)\.block\.(\d+)", name)
            files.setdefault(f"model-{block[1]}-{int(block[2]):02d}" if block else "model-rest", {})[name] = tensor.shape
    generator, index, total = torch.Generator().manual_seed(0), {}, 0
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            norm = name.endswith("layer_norm.weight")
            noise = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5)
            tensors[name] = (torch.ones(shape) if norm else noise).bfloat16()
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(tensors, f"{file}.safetensors")
        total += sum(t.numel() * 2 for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return {"bytes": total}


def compress(dense: Path, small: Path, bits: float, max_memory: str) -> dict[str, Any]:
    import effvlm

    report = effvlm.compress(dense, {"target_bits": bits}, out=small, max_memory=max_memory)
    experts = [sum(getattr(layer, f"bytes_{when}") for layer in report.layers) for when in ("before", "after")]
    return {"seconds": report.seconds, "model": [report.bytes_before, report.bytes_after], "experts": experts,
            "weights": sum(layer.weights for layer in report.layers)}  # fmt: skip


def run(small: Path, tokens: int) -> dict[str, Any]:
    """Greedy decoding of one sequence, where each token takes another way through the experts."""
    from transformers import AutoModelForSeq2SeqLM

    import effvlm

    assert effvlm.__version__
    start = time.perf_counter()
    model = AutoModelForSeq2SeqLM.from_pretrained(small).eval()
    loaded, read = time.perf_counter() - start, _read_bytes()
    prompt = torch.randint(2, 32000, (1, 16), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    made = model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    seconds, experts = time.perf_counter() - start, _read_bytes() - read
    assert made.shape[1] > tokens
    return {"load_seconds": loaded, "tokens": tokens, "seconds": seconds, "read_bytes": experts}


def _forget(folder: Path) -> None:
    """Have the system drop the files from its cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_bytes() -> int:
    """That this process had the disk read, page faults included."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])  # type: ignore[index]


@contextmanager
def _group(cap: int) -> Iterator[tuple[Path, Path]]:
    """A new memory cgroup with a cap: its folder, and the file with its peak."""
    first = (V1 / "memory.limit_in_bytes").is_file()
    folder = (V1 if first else V2) / f"effvlm-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(cap))
    except OSError as error:
        raise SystemExit(f"needs a memory cgroup that this user may make: {error}") from error
    try:
        yield folder, folder / ("memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        folder.rmdir()


def capped(cap: int, stage: str, *arguments: object) -> dict[str, Any]:
    """Run a stage of this script under a cap; its result, the peak of its own memory, and that with the page cache."""
    with _group(cap) as (folder, peak):
        command = [sys.executable, __file__, "--stage", stage, *map(str, arguments)]
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh", *command], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{stage}: ended with {done.returncode} under a cap of {cap / 1e6:.0f} MB")
        return json.loads(done.stdout.splitlines()[-1]) | {"cap": cap, "peak_with_cache": int(peak.read_text())}


def _stage(name: str, *arguments: str) -> None:
    from effvlm.compression.card import peak_memory

    if name == "compress":
        result = compress(Path(arguments[0]), Path(arguments[1]), float(arguments[2]), arguments[3])
    else:
        result = run(Path(arguments[0]), int(arguments[1]))
    print(json.dumps(result | {"peak": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder each; fewer make a smaller model")
    parser.add_argument("--bits", type=float, default=0.8)
    parser.add_argument("--max-memory", default="400MB", help="for weights under way")
    parser.add_argument("--compress-cap", type=int, default=1_200_000_000)
    parser.add_argument("--run-cap", type=int, nargs="+", default=[700_000_000, 4_000_000_000])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        _stage(*asked.stage)
        return
    if asked.folder is None:
        parser.error("expected a folder with room for the model")
    dense, small = asked.folder / "dense", asked.folder / "small"
    if not (dense / "model.safetensors.index.json").is_file():
        dense.mkdir(parents=True, exist_ok=True)
        print(make(dense, asked.layers), file=sys.stderr)
    result: dict[str, Any] = {"compress": capped(asked.compress_cap, "compress", dense, small, asked.bits, asked.max_memory)}
    result["disk"] = sum(p.stat().st_size for p in small.iterdir())
    result["run"] = []
    for cap in asked.run_cap:
        _forget(small)
        result["run"].append(capped(cap, "run", small, asked.tokens))
    print(json.dumps(result, indent=1))
    if asked.save:
        import machine

        where = ROOT / "bench/results" / "larger-than-memory.jsonl"
        with open(where, "a") as file:
            file.write(json.dumps({"machine": machine.record("cpu"), "layers": asked.layers, "bits": asked.bits} | result) + "\n")


if __name__ == "__main__":
    main()
