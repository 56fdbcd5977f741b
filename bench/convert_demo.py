"""What distillation recovers when attention layers of the demo VLM become layers of constant state (effvlm.convert).

    python bench/convert_demo.py [--layers 1 3 5] [--layer-steps 150] [--logit-steps 450] [--save]

Converts the layers (default: all three), asks the held-out questions before, after seeding and after distillation, and prints one
line of JSON; with --save it is kept under bench/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import record

import effvlm
from effvlm.demo.architecture import VISUAL_TOKENS
from effvlm.demo.evaluation import evaluate, load
from effvlm.demo.lessons import make, pixels
from effvlm.demo.scenes import draw_scene

BATCH = 16


class Lessons:
    """Batches of questions about scenes that no held-out question is about, made as they are asked for."""

    def __init__(self, model: Any, processor: Any, steps: int) -> None:
        self.model, self.processor, self.steps = model, processor, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([7, step, 99])  # as in training: held-out scenes have other last numbers
        scenes = [draw_scene(rng) for _ in range(BATCH)]
        config = self.model.config
        lesson = make(
            scenes,
            rng,
            self.processor.tokenizer,
            tokens=VISUAL_TOKENS,
            counts=2,
            image=config.image_token_id,
            vocabulary=config.text_config.vocab_size,
        )
        return {"input_ids": lesson.ids, "attention_mask": lesson.mask, "pixel_values": pixels(scenes)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--layer-steps", type=int, default=150)
    parser.add_argument("--logit-steps", type=int, default=450)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save", action="store_true")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy before, after seeding and after distillation."""
    teacher, processor = load()
    teacher = teacher.float()
    start = time.perf_counter()
    student = effvlm.convert.attention_to_ssm(copy.deepcopy(teacher), args.layers)
    right = {
        who: evaluate(model, args.questions, processor=processor)["accuracy"]
        for who, model in (("attention", teacher), ("seeded", student))
    }
    print(right, flush=True)

    def tell(step: int, loss: float) -> None:
        if step % 25 == 0:
            print(f"{step:4} {loss:.4f} {time.perf_counter() - start:.0f} s", flush=True)

    lessons = Lessons(teacher, processor, args.layer_steps + args.logit_steps)
    done = effvlm.convert.distill(
        student, teacher, lessons, layer_steps=args.layer_steps, lr=args.lr, everything=True, on_step=tell
    )
    result = evaluate(student, args.questions, processor=processor)
    return {
        "what": "demo VLM, attention to state-space layers",
        "layers": args.layers,
        "of": [1, 3, 5],
        "questions": args.questions,
        "steps": [args.layer_steps, args.logit_steps],
        "batch": BATCH,
        "right": right | {"distilled": result["accuracy"]},
        "distilled_by_kind": {kind: row["accuracy"] for kind, row in result["kinds"].items()},
        "last_losses": [round(x, 4) for x in (done.losses[args.layer_steps - 1], done.losses[-1])],
        "seconds": round(time.perf_counter() - start),
        "machine": record("cpu"),
    }


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    row = run(args)
    print(json.dumps(row))
    if args.save:
        name = "-".join(map(str, args.layers))
        (Path(__file__).parent / "results" / f"convert-demo-layers-{name}.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
