"""Load the demo VLM, draw held-out samples, and count right answers of real ``generate()`` calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effvlm.demo.questions import KINDS
from effvlm.demo.scenes import SIZE, Scans, draw_scene, held_out_scans, render

MODEL_DIR = Path(__file__).with_name("model")
HELD_OUT_SEEDS = 2**40  # training draws from seeds below this
MAX_NEW_TOKENS = 4  # the longest answer has two words and the end


@dataclass(frozen=True)
class Sample:
    """One held-out question: ``image`` is RGB, 96 × 96 pixels; ``kind`` is a key of ``questions.KINDS``."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def load(folder: Path = MODEL_DIR) -> tuple[Any, Any]:
    """The demo VLM and its processor, in float32 on the CPU, ready for ``generate()``; from the package itself by default."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def draw_sample(seed: int, kind: str, scans: Scans) -> Sample:
    """The sample of one seed and kind: scenes are drawn until one has such a question."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    while True:
        scene = draw_scene(rng)
        asked = KINDS[kind](scene, rng)
        if asked:
            return Sample(render(scene, scans), asked.text, asked.answer, kind)


def samples(n: int, *, seed: int = 0) -> list[Sample]:
    """``n`` held-out samples, kinds in turn; always the same ones for the same ``n`` and ``seed``."""
    kinds = list(KINDS)
    return [draw_sample(HELD_OUT_SEEDS + seed * 10**6 + i, kinds[i % len(kinds)], held_out_scans()) for i in range(n)]


def prompt(question: str) -> str:
    """The text that the demo VLM was trained to continue."""
    return f"<image> {question} <answer>"


@torch.no_grad()
def answer(model: Any, processor: Any, images: list[Image.Image], questions: list[str]) -> list[str]:
    """Greedy answers, one per image and question, in one batch."""
    inputs = processor(images=images, text=[prompt(q) for q in questions], return_tensors="pt", padding=True).to(model.device)
    out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    decoded = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in decoded]


def evaluate(
    model: Any,
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 40,
    blind: bool = False,
    processor: Any = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy on ``n`` held-out questions by exact match of the generated text.

    Args:
        model: the demo VLM (or one made from it), possibly inside ``effvlm.reduce``.
        n: questions, in equal shares of the eight kinds.
        seed: which questions; the same for everything that is to be compared.
        batch_size: questions per ``generate()``.
        blind: replace every image by mid-grey, to see what the questions alone give away.
        processor: the model's processor; default the demo's.
        progress: called with the number of questions done after every batch.

    Returns:
        ``accuracy`` in 0 … 1, ``right``, ``n``, ``seconds``, ``kinds`` (per kind: ``accuracy``, ``right``, ``n``), ``answers``.
    """
    if n < 1:
        raise ValueError(f"evaluate: expected n >= 1 questions, got {n}")
    processor = processor or load()[1]
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    batch: list[Sample] = []
    answers: list[str] = []
    seconds = 0.0
    grey = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
    for first in range(0, n, batch_size):
        kinds = list(KINDS)
        numbers = range(first, min(first + batch_size, n))
        batch = [draw_sample(HELD_OUT_SEEDS + seed * 10**6 + i, kinds[i % len(kinds)], held_out_scans()) for i in numbers]
        start = time.perf_counter()
        given = answer(model, processor, [grey if blind else s.image for s in batch], [s.question for s in batch])
        seconds += time.perf_counter() - start
        answers += given
        for sample, text in zip(batch, given, strict=True):
            asked[sample.kind] += 1
            right[sample.kind] += text == sample.answer
        if progress:
            progress(first + len(batch))
    per_kind = {k: {"accuracy": right[k] / asked[k], "right": right[k], "n": asked[k]} for k in KINDS if asked[k]}
    total = sum(right.values())
    return {"accuracy": total / n, "right": total, "n": n, "seconds": seconds, "kinds": per_kind, "answers": answers}
