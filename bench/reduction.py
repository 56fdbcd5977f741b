"""What reducing visual tokens does to the wall clock: towers, first token, time per token, memory. Random weights, real shapes.

python bench/reduction.py --save          # everything; about ten minutes on 2 cores
python bench/reduction.py tower           # one part: tower, llava or anyres

All times are medians of rounds in which the settings take turns. glibc keeps freed blocks (tune_malloc), for everybody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as tf
from machine import ROOT, name, record
from rich.console import Console
from rich.table import Table
from timing import tune_malloc

import effvlm
from effvlm.demo.show import _peak_memory
from effvlm.hf.merging import Merging
from effvlm.hf.watch import Watch
from effvlm.tokens import AIM, Attention, DivPrune, FoPru, Method, PruMerge, Random, Recipe, ToMe, VisionZip
from effvlm.tokens.merges import Bipartite

Row = dict[str, Any]
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def medians(runs: dict[str, Callable[[], Any]], rounds: int, extra: list[float] | None = None) -> dict[str, float]:
    """Seconds of each, taking turns; with what a run leaves in ``extra`` added to it."""
    extra = [] if extra is None else extra
    times: dict[str, list[float]] = {k: [] for k in runs}
    for r in range(rounds + 1):  # the first one warms up
        for key, run in runs.items():
            extra.clear()
            start = time.perf_counter()
            run()
            if r:
                times[key].append(time.perf_counter() - start + sum(extra))
    return {k: statistics.median(t) for k, t in times.items()}


class Sliced(Merging):
    """The same schedule for nothing: the last r tokens are cut off."""

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        with super().encoding():
            for config in {id(m.config): m.config for m in self.tower.modules() if hasattr(m, "config")}.values():
                config._attn_implementation = "sdpa"
            yield

    def _merge(self, x: torch.Tensor, r: int) -> torch.Tensor:
        return x[:, : x.shape[1] - r]


def tower(rounds: int) -> list[Row]:
    """CLIP-L/14 at 336 pixels in bfloat16: ToMe against cutting tokens off, and listening to all layers against none."""
    vision = tf.CLIPVisionModel(tf.CLIPVisionConfig(**CLIP_L)).to(torch.bfloat16).eval()
    how, rows = Bipartite(r=23), []
    for B in (1, 4):
        pixels = torch.randn(B, 3, 336, 336).to(torch.bfloat16)

        def run(listener: Any, pixels: torch.Tensor = pixels) -> Any:
            with listener.encoding() if listener else contextlib.nullcontext(), torch.no_grad():
                return vision(pixels)

        every = Forgetful(vision, [Attention(layer, "all") for layer in range(24)])
        runs = {
            "unmodified": lambda run=run: run(None),
            "free slice, r = 23": lambda run=run: run(Sliced(vision, how, 24)),
            "ToMe, r = 23": lambda run=run: run(Merging(vision, how, 24)),
            "attention of all layers scored": lambda run=run, every=every: run(every),
            "attention materialised (eager)": lambda pixels=pixels: _eager(vision, pixels),
        }
        seconds = medians(runs, rounds)
        base, free = seconds["unmodified"], seconds["free slice, r = 23"]
        for key, s in seconds.items():
            over = s / free - 1 if key.startswith("ToMe") else s / base - 1
            rows.append({"part": "tower", "setting": key, "batch": B, "ms": 1e3 * s, "over": over})
    return rows


class Forgetful(Watch):
    """Scores, and forgets at once, so that rounds do not pile up."""

    def heard(self, *args: Any, **more: Any) -> None:
        super().heard(*args, **more)
        for found in self._found.values():
            found.clear()


def _eager(vision: Any, pixels: torch.Tensor) -> None:
    """All attention weights of all layers, as VisionZip-style code gets them."""
    before = vision.config._attn_implementation
    vision.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            for weights in vision(pixels, output_attentions=True).attentions:
                weights.float().mean(dim=(1, 2))
    finally:
        vision.config._attn_implementation = before


def _llava(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """LLaVA-1.5-7B's shape with that many of its 32 language layers."""
    text = tf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**CLIP_L), text_config=text, image_token_index=32000)
    with torch.device("meta"):
        model = tf.LlavaForConditionalGeneration(config)
    return _filled(model), {
        "input_ids": torch.cat([torch.full((1, 35), 5), torch.full((1, 576), 32000), torch.full((1, 29), 7)], 1),
        "attention_mask": torch.ones(1, 640, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 336, 336).to(torch.bfloat16),
    }


def _anyres() -> tuple[Any, dict[str, torch.Tensor]]:
    """LLaVA-OneVision-0.5B's shape on a picture of 768 × 768: five crops, 3,699 visual tokens."""
    vision = tf.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = tf.Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=152000,
        tie_word_embeddings=True,
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=151646,
        video_token_index=151647,
        image_grid_pinpoints=[[768, 768]],
    )
    with torch.device("meta"):
        model = tf.LlavaOnevisionForConditionalGeneration(config)
    n = 27 * 27 + 54 * 55
    return _filled(model), {
        "input_ids": torch.cat([torch.full((1, 14), 5), torch.full((1, n), 151646), torch.full((1, 30), 7)], 1),
        "attention_mask": torch.ones(1, n + 44, dtype=torch.long),
        "pixel_values": torch.randn(1, 5, 3, 384, 384).to(torch.bfloat16),
        "image_sizes": torch.tensor([[768, 768]]),
    }


def _filled(model: Any) -> Any:
    """Small random weights in bfloat16, without the initialisation that a real model would get (minutes)."""
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    noise = torch.randn(1 << 20).mul_(0.02).to(torch.bfloat16)
    for p in model.parameters():
        flat = p.data.view(-1)
        for first in range(0, len(flat), len(noise)):
            part = flat[first : first + len(noise)]
            part.copy_(noise[: len(part)])
        if p.dim() == 1:
            p.data.add_(1)
    for module in model.modules():  # buffers that the constructor computes
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key == "position_ids":
                module.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            elif key.endswith("inv_freq"):
                d = 2 * len(buffer)
                setattr(module, key, 1e4 ** -(torch.arange(0, d, 2).float() / d))
    model.generation_config.eos_token_id = None
    return model


def _asked(model: Any, inputs: dict[str, torch.Tensor], method: Method | None, tokens: int) -> Callable[[], Any]:
    def run() -> Any:
        with effvlm.reduce(model, method) if method else contextlib.nullcontext():
            return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return run


def _free(model: Any, inputs: dict[str, torch.Tensor], keep: float, tokens: int) -> Callable[[], Any]:
    """Random tokens that cost nothing to choose: the tower as it is, then generation from inputs shortened beforehand."""
    ready = effvlm.reduce(model, Random(keep=keep))(inputs)
    encoder = {k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}

    def run() -> Any:
        with torch.no_grad():
            model.get_image_features(**encoder, return_dict=True)
        given = {k: (dict(v) if k == "mm_encoder_outputs" else v) for k, v in ready.items()}
        return model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return run


def _settings(keep: float, inside: float) -> dict[str, Method | None]:
    both = Recipe([ToMe(keep=inside, at="vision"), ToMe(keep=min(1.0, keep / inside))])
    return {
        "unmodified": None,
        "ToMe": ToMe(keep=keep),
        "AIM": AIM(keep=keep),
        "VisionZip": VisionZip(keep=keep),
        "FoPru": FoPru(keep=keep),
        "PruMerge": PruMerge(keep=keep),
        "DivPrune": DivPrune(keep=keep),
        f"ToMe in the tower {inside:.0%} + ToMe": both,
    }


def _model_rows(
    part: str, make: Callable[[], Any], keep: float, inside: float, rounds: int, steps: int = 4, missing: int = 0
) -> dict[str, Row]:
    model, inputs = make()
    settings = _settings(keep, inside)
    first = {k: _asked(model, inputs, m, 1) for k, m in settings.items()} | {"free random": _free(model, inputs, keep, 1)}
    longer = {k: _asked(model, inputs, settings[k], 1 + steps) for k in ("unmodified", "ToMe")}
    with _layers_timed(model, missing) as extra:
        seconds = medians({**first, **{f"{k}+": r for k, r in longer.items()}}, rounds, extra)
    rows: dict[str, Row] = {}
    for key, run in first.items():
        memory: dict[str, Any] = {}
        with _peak_memory(memory):
            run()
        rows[key] = {"part": part, "setting": key, "keep": keep, "ttft": seconds[key], **memory}
        if key in longer:
            rows[key]["per_token"] = (seconds[f"{key}+"] - seconds[key]) / steps
        method = settings.get(key)
        if method:
            reducer = effvlm.reduce(model, method)
            reducer(inputs)
            rows[key] |= {"overhead": reducer.report.reduce_seconds, "tokens": reducer.report.tokens_out}
    return rows


def llava(rounds: int) -> list[Row]:
    """LLaVA-1.5-7B, 64 of 576 visual tokens; 4 language layers run, the other 28 take what these took in each call (median)."""
    rows = list(_model_rows("llava-1.5-7b", lambda: _llava(4), 64 / 576, 0.5, rounds, missing=28).values())
    return [row | {"extrapolated": "28 of 32 language layers"} for row in rows]


@contextlib.contextmanager
def _layers_timed(model: Any, missing: int) -> Iterator[list[float]]:
    """Seconds that ``missing`` more language layers would take in the calls made inside: one entry per forward of the model."""
    layers, begun, taken = model.base_model.language_model.layers, [0.0], []
    extra: list[float] = []

    def after(layer: Any, args: Any, out: Any) -> None:
        taken.append(time.perf_counter() - begun[0])
        if len(taken) == len(layers):
            extra.append(missing * statistics.median(taken))
            taken.clear()

    hooks = []
    for layer in layers if missing else ():
        hooks.append(layer.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter())))
        hooks.append(layer.register_forward_hook(after))
    try:
        yield extra
    finally:
        for hook in hooks:
            hook.remove()


def anyres(rounds: int) -> list[Row]:
    """LLaVA-OneVision-0.5B, five crops, a tenth of the visual tokens."""
    return list(_model_rows("llava-onevision-0.5b", _anyres, 0.1, 0.25, rounds).values())


def show(rows: list[Row]) -> None:
    """Tables for people."""
    console = Console(width=160)
    table = Table(title="CLIP-L/14 336, bfloat16; ToMe over the free slice, others over unmodified", title_justify="left")
    for column in ("setting", "batch", "ms", "over"):
        table.add_column(column)
    for r in (r for r in rows if r["part"] == "tower"):
        table.add_row(r["setting"], str(r["batch"]), f"{r['ms']:.0f}", f"{r['over']:+.1%}")
    console.print(table)
    table = Table(title="time to first token", title_justify="left")
    for column in (
        "model",
        "setting",
        "tokens",
        "first token s",
        "faster",
        "of free random",
        "reducing, of unmodified",
        "per token ms",
        "peak MB",
    ):
        table.add_column(column)
    for r in (r for r in rows if r["part"] != "tower"):
        mine = {x["setting"]: x for x in rows if x["part"] == r["part"]}
        base, free = mine["unmodified"]["ttft"], mine["free random"]["ttft"]
        table.add_row(
            r["part"],
            r["setting"],
            str(r.get("tokens", "")),
            f"{r['ttft']:.2f}",
            f"{base / r['ttft']:.2f}×",
            f"{free / r['ttft']:.2f}",
            f"{r['overhead'] / base:.1%}" if "overhead" in r else "",
            f"{1e3 * r['per_token']:.0f}" if "per_token" in r else "",
            f"{r['peak_memory_mb']:.0f}" if r.get("peak_memory_mb") else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("parts", nargs="*", choices=["tower", "llava", "anyres", []], help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append to bench/results/reduction.jsonl")
    options = parser.parse_args()
    tune_malloc()
    torch.manual_seed(0)
    rows: list[Row] = []
    for part in options.parts or ("tower", "llava", "anyres"):
        rows += {"tower": tower, "llava": llava, "anyres": anyres}[part](options.rounds)
    show(rows)
    if options.save:
        with (ROOT / "bench/results/reduction.jsonl").open("a") as file:
            file.write(json.dumps({"machine": record("cpu"), "name": name("cpu"), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
