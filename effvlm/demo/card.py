"""The demo VLM's card: ``python -m effvlm.demo.card --out DIR`` measures the model in DIR/model and writes its README.md."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from effvlm.demo.evaluation import evaluate, load
from effvlm.demo.questions import KINDS, vocabulary

QUESTIONS = 2000
ABOUT = (
    "## Data",
    "Scenes are drawn by `effvlm/demo/scenes.py`. The digits are from *Optical Recognition of Handwritten Digits*",
    "(E. Alpaydin, C. Kaynak; UCI Machine Learning Repository, CC BY 4.0), as bundled with scikit-learn: 1,437 scans to",
    "train on, 360 held out and shipped here.",
    "",
    "## Not for",
)


@contextmanager
def expert_usage(model: Any) -> Iterator[dict[str, Counter[int]]]:
    """Counts, per router, how often each expert is chosen inside the block."""
    usage: dict[str, Counter[int]] = {}
    hooks = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):
            counts = usage.setdefault(name, Counter())

            def count(module: Any, arguments: Any, out: Any, counts: Counter[int] = counts) -> None:
                counts.update(out[2].flatten().tolist())

            hooks.append(module.register_forward_hook(count))
    try:
        yield usage
    finally:
        for hook in hooks:
            hook.remove()


def _shares(usage: dict[str, Counter[int]], experts: int) -> list[str]:
    rows = [
        "Shares of the tokens that the most used, the median and the least used expert of each layer got over these questions:",
        "",
        "| layer | most | median | least | used at all |",
        "|---|---|---|---|---|",
    ]
    for layer, counts in enumerate(usage.values()):
        share = sorted((counts[e] / counts.total() for e in range(experts)), reverse=True)
        rows.append(f"| {layer} | {share[0]:.1%} | {share[experts // 2]:.1%} | {share[-1]:.1%} | {sum(s > 0 for s in share)} |")
    return rows


def _accuracy(seeing: dict[str, Any], blind: dict[str, Any]) -> list[str]:
    rows = [
        f"| {kind} | {k['n']} | {k['accuracy']:.1%} | {blind['kinds'][kind]['accuracy']:.1%} |"
        for kind, k in seeing["kinds"].items()
    ]
    return [*rows, f"| overall | {QUESTIONS} | {100 * seeing['accuracy']:.1f} % | {100 * blind['accuracy']:.1f} % |"]


def _curve(log: Path) -> list[str]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    language = {line["step"]: line for line in lines if line["stage"] == "language"}
    shown = [step for step in sorted(language) if step in (50, 100) or step % 200 == 0]
    kinds = list(KINDS)
    return [
        "Share of answer words right while training on 16 pictures × 9 questions a step (running mean, %):",
        "",
        "| step | loss | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 2) + "|",
        *(
            f"| {s} | {language[s]['loss']:.3f} | " + " | ".join(f"{100 * language[s].get(k, 0):.0f}" for k in kinds) + " |"
            for s in shown
        ),
    ]


def write(folder: Path, log: Path, notes: str) -> str:
    """Measure the model in ``folder`` and return the card's text."""
    model, processor = load(folder)
    with expert_usage(model) as usage:
        seeing = evaluate(model, QUESTIONS, processor=processor)
    blind = evaluate(model, QUESTIONS, processor=processor, blind=True)
    text = model.config.text_config
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        "# The demo VLM",
        "",
        f"A stock transformers LLaVA of {parameters / 1e6:.2f} million parameters: a SigLIP tower (4 × 128, 96 px, 144 tokens)",
        f"and a GraniteMoeHybrid language model ({text.num_hidden_layers} layers: Mamba-2 and attention in turns, "
        f"{text.num_local_experts} experts of which {text.num_experts_per_tok} at a time). It answers eight kinds of",
        "question about a 3×3 grid of coloured shapes and real handwritten digits, and is this project's measure of quality.",
        "`effvlm.demo.load()` gives model and processor; weights are bfloat16 safetensors, all loaded as float32.",
        "",
        f"## Held-out accuracy (exact match of `generate()`, {QUESTIONS} questions, seed 0)",
        "Digit scans in these pictures were never trained on. Blind: the same questions about a grey picture.",
        "",
        "| kind | n | right | blind |",
        "|---|---|---|---|",
        *_accuracy(seeing, blind),
        "",
        "## Training",
        "`python -m effvlm.demo.train` (seed 1) on 2 CPU cores; every line of its log is in `training_log.jsonl`. " + notes,
        "",
        *_curve(log),
        "",
        "## Experts",
        *_shares(usage, text.num_local_experts),
        "",
        *ABOUT,
        f"Anything but measuring: it knows {len(vocabulary())} words, one layout and one drawing style.",
        "",
        f"Measured with transformers {version('transformers')}, torch {torch.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of a finished training run")
    parser.add_argument("--notes", default="", help="what else there is to say about the run")
    arguments = parser.parse_args()
    card = write(arguments.out / "model", arguments.out / "training_log.jsonl", arguments.notes)
    (arguments.out / "model" / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
