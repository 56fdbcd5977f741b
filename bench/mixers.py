"""Whole models, most with Mamba-like mixers, and how time and memory grow with the sequence.

    python bench/mixers.py models [--rounds 3] [--save]    prefill of 1,024 tokens and 64 steps: transformers, effvlm.enable
    python bench/mixers.py layers [--rounds 3] [--save]    the functions of single layers, the same two
    python bench/mixers.py steps [--rounds 3] [--save]     single steps of layers, in plain loops
    python bench/mixers.py length [--save]                 one layer up to 103k tokens: attention against its converted form

Random weights in bfloat16: times do not depend on them. One JSON line per row; --save appends them to bench/results/mixers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # specs feed both
from machine import record
from specs import causal_conv1d, state_update
from timing import peak_extra_bytes
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import effvlm
from effvlm import nn
from effvlm.hf import rebind
from effvlm.hf.scans import FUNCTIONS

Row = dict[str, Any]
PREFILL, STEPS = 1024, 64
_WORDS = {"vocab_size": 32000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    # As falcon-mamba-7b, a third as deep and three eighths as wide.
    "falcon_mamba": {
        "hidden_size": 1536,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "state_size": 16,
        "time_step_rank": 96,
    },
    # As granite-4.0-h-1b: dense, few attention layers among many.
    "granitemoehybrid": {
        "hidden_size": 1536,
        "num_hidden_layers": 20,
        "layer_types": [{5: "full_attention", 15: "full_attention"}.get(i, "linear_attention") for i in range(20)],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "shared_intermediate_size": 4096,
        "intermediate_size": 512,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "position_embedding_type": "nope",
    },
    # As Qwen3.5's small models: three gated delta layers to one of attention.
    "qwen3_5_text": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    # As Qwen2.5-0.5B, which LLaVA-OneVision-0.5B speaks with: no mixers, linear layers alone.
    "qwen2": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def _model(name: str) -> Any:
    config = CONFIG_MAPPING[name](**(_WORDS | MODELS[name]))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def _prefill_and_steps(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prefill, and per step."""
    first, out = _timed(lambda: model(ids, use_cache=True, logits_to_keep=1))
    name = "past_key_values" if "past_key_values" in out else "cache_params"
    cache = {name: out[name]}
    token = ids[:, :1]
    model(token, **cache, use_cache=True)

    def steps() -> None:
        for _ in range(STEPS):
            model(token, **cache, use_cache=True)

    return first, _timed(steps)[0] / STEPS


@torch.no_grad()
def models(rounds: int) -> list[Row]:
    rows = []
    ids = torch.randint(3, 32000, (1, PREFILL))
    for name in MODELS:
        model = _model(name)
        times: dict[str, list[tuple[float, float]]] = {"transformers": [], "effvlm": []}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _prefill_and_steps(model, ids[:, :32])
            for _ in range(rounds):
                times["transformers"].append(_prefill_and_steps(model, ids))
                report = effvlm.enable(model)
                times["effvlm"].append(_prefill_and_steps(model, ids))
                effvlm.disable(model)
        prefill, step = ({who: statistics.median(t[i] for t in got) for who, got in times.items()} for i in (0, 1))
        rows.append(
            {
                "what": "model",
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "mixers": sum(not what.startswith("grouped_linear for") for what in report.modules.values()),
                "linears": sum(what.startswith("grouped_linear for") for what in report.modules.values()),
                "prefill_s": prefill,
                "step_s": step,
                "prefill_ratio": prefill["transformers"] / prefill["effvlm"],
                "step_ratio": step["transformers"] / step["effvlm"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _pairs() -> dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """Name → family, name of the function in its modeling file, arguments as the model passes them."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    pairs = {}
    for D in (1536, 5120):
        mixed = some(1, PREFILL, 80)
        args = (some(1, D, PREFILL), some(1, D, PREFILL), -torch.rand(D, 16), mixed[..., 48:64].mT, mixed[..., 64:].mT)
        more = {"D": torch.randn(D), "z": some(1, PREFILL, D).mT, "delta_bias": torch.randn(D)}
        flags = {"delta_softplus": True, "return_last_state": True}
        pairs[f"selective_scan D{D}"] = ("mamba", "mamba_selective_scan", args, more | flags)
        pairs[f"causal_conv1d D{D}"] = ("mamba", "causal_conv1d_fn", (some(1, D, PREFILL), some(D, 4), some(D), "silu"), {})
    for H, G in ((24, 1), (128, 8)):
        args = (
            some(1, PREFILL, H, 64),
            some(1, PREFILL, H),
            -torch.rand(H),
            some(1, PREFILL, G, 128),
            some(1, PREFILL, G, 128),
            256,
        )
        more = {"D": some(H), "dt_bias": some(H), "dt_softplus": True, "return_final_states": True}
        pairs[f"chunk_scan SSD H{H} G{G}"] = ("mamba2", "mamba2_chunk_scan", args, more)
    q, k, v = some(1, PREFILL, 16, 128), some(1, PREFILL, 16, 128), some(1, PREFILL, 32, 128)
    args = (q, k, v, -torch.rand(1, PREFILL, 32), torch.rand(1, PREFILL, 32).bfloat16(), 64, None, True, True)
    pairs["chunk_scan gated delta"] = ("qwen3_5", "torch_chunk_gated_delta_rule", args, {})
    return pairs


@torch.no_grad()
def layers(rounds: int) -> list[Row]:
    """Medians of transformers' own functions (the warning left out) and of what stands for them after effvlm.enable."""
    rows = []
    for name, (family, function, args, more) in _pairs().items():
        theirs = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), function)
        ours = FUNCTIONS[rebind.scan_name(function, theirs)]
        runs = {"transformers": partial(theirs.__wrapped__, *args, **more), "effvlm": partial(ours, *args, **more)}
        times: dict[str, list[float]] = {who: [] for who in runs}
        for i in range(3 * rounds + 1):
            for who, run in runs.items():
                seconds = _timed(run)[0]
                if i:
                    times[who].append(seconds)
        ms = {who: statistics.median(t) * 1e3 for who, t in times.items()}
        rows.append({"what": "layer", "op": name, "ms": ms, "ratio": ms["transformers"] / ms["effvlm"]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def steps(rounds: int) -> list[Row]:
    """Single steps in plain loops of a hundred, as a decoding loop makes them: medians of a call, transformers' against ours."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for spec in (state_update.SPEC, causal_conv1d.SPEC):
        for case in (c for c in spec.cases if c.bench and c.sizes.get("L", 1) == 1):
            args = spec.inputs(case, torch.bfloat16, generator)
            runs = {"transformers": partial(spec.peers["transformers"], *args), "effvlm": partial(spec.timed, *spec.fresh(args))}
            times: dict[str, list[float]] = {who: [] for who in runs}
            for i in range(4 * rounds + 1):
                for who, run in runs.items():
                    start = time.perf_counter()
                    for _ in range(100):
                        run()
                    times[who] += [(time.perf_counter() - start) / 100] if i else []
            us = {who: statistics.median(t) * 1e6 for who, t in times.items()}
            name = f"{spec.op} {case.name}"
            rows.append({"what": "step", "op": name, "us": us, "ratio": us["transformers"] / us["effvlm"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


LENGTHS = (1024, 4096, 16384, 32768, 65536, 103424)
CHUNK = 512


class Layer:
    """A mixer of HoVLE's shape (2,048 channels, 16 heads of 128) behind L tokens: attention, and its converted form."""

    C, H, D = 2048, 16, 128

    def __init__(self, L: int) -> None:
        self.L = L
        self.mixer = nn.SSMMixer(self.C, self.H, self.D, scale=self.D**-0.5).bfloat16()
        self.projections = [torch.randn(self.C, self.C, dtype=torch.bfloat16) * self.C**-0.5 for _ in range(4)]
        self.keys, self.values = (torch.randn(1, self.H, L, self.D, dtype=torch.bfloat16) for _ in range(2))
        self.state = torch.randn(1, self.H, self.D, self.D)

    def _project(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [(x @ w).unflatten(-1, (self.H, self.D)) for w in self.projections[:3]]

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in self._project(x))
        new = x.shape[1]
        self.keys[:, :, self.L - new :], self.values[:, :, self.L - new :] = k, v
        mask = torch.ones(new, self.L, dtype=torch.bool).tril(self.L - new) if new > 1 else None
        out = torch.nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2) @ self.projections[3]

    def converted(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x, *self._project(x), state=self.state).out @ self.projections[3]


@torch.no_grad()
def length() -> list[Row]:
    """What the next 512 tokens, and the next one, cost after L tokens, and what is kept of those."""
    rows = []
    for L in LENGTHS:
        layer = Layer(L)
        kept = {"attention": 2 * layer.keys.nbytes, "state": layer.state.nbytes}
        row: Row = {"what": "length", "tokens": L, "cache_bytes": kept}
        for label, tokens in (("chunk", CHUNK), ("step", 1)):
            x = torch.randn(1, tokens, layer.C, dtype=torch.bfloat16)
            times: dict[str, list[float]] = {"attention": [], "state": []}
            for i in range(6):
                for who, run in (("attention", layer.attention), ("state", layer.converted)):
                    seconds = _timed(partial(run, x))[0]
                    if i:
                        times[who].append(seconds)
            row[f"{label}_s"] = {who: statistics.median(t) for who, t in times.items()}
            row[f"{label}_ratio"] = row[f"{label}_s"]["attention"] / row[f"{label}_s"]["state"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows + _scans()


def _scans() -> list[Row]:
    """The scans themselves on whole sequences: time per token and extra memory must not grow."""
    rows = []
    for L in (1024, 8192, 65536, 102400):
        u, dt = (torch.randn(1, 512, L, dtype=torch.bfloat16) for _ in range(2))
        B, C = (torch.randn(1, 16, L, dtype=torch.bfloat16) for _ in range(2))
        A = -torch.rand(512, 16)
        q, k = (torch.randn(1, L, 1, 128, dtype=torch.bfloat16) for _ in range(2))
        v, g = torch.randn(1, L, 8, 64, dtype=torch.bfloat16), -torch.rand(1, L, 8)
        runs: dict[str, Callable[[], Any]] = {
            "selective_scan": lambda u=u, dt=dt, A=A, B=B, C=C: effvlm.selective_scan(u, dt, A, B, C, delta_softplus=True),
            "chunk_scan": lambda q=q, k=k, v=v, g=g: effvlm.chunk_scan(q, k, v, g),
        }
        for op, run in runs.items():
            run()
            seconds = min(_timed(run)[0] for _ in range(4))
            out = run()[0].nbytes
            rows.append(
                {
                    "what": "scan",
                    "op": op,
                    "tokens": L,
                    "us_per_token": seconds / L * 1e6,
                    "extra_bytes": (peak_extra_bytes(run, "cpu") or 0) - out,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["models", "layers", "steps", "length"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = length() if args.what == "length" else {"models": models, "layers": layers, "steps": steps}[args.what](args.rounds)
    if args.save:
        with (Path(__file__).parent / "results" / "mixers.jsonl").open("a") as file:
            for row in rows:
                file.write(json.dumps(row | {"machine": record("cpu")}) + "\n")


if __name__ == "__main__":
    main()
