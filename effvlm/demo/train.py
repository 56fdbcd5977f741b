"""Train the demo VLM: ``python -m effvlm.demo.train --out DIR`` (about an hour on 2 cores; resumes where it was stopped).

Two stages, since training everything jointly plateaus. (1) The vision tower alone, by linear heads that read from every visual
token what its cell holds. (2) The projector and the language model with the tower frozen, on several questions per picture,
the loss on answers only.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from effvlm.demo.architecture import ANSWER, END, PATCH, make_config, make_processor
from effvlm.demo.questions import KINDS
from effvlm.demo.scenes import CELL, COLORS, GRID, SHAPES, SIZES, Scene, draw_scene, render, training_scans

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 2400, 32, 2e-3
STEPS, BATCH, RATE, TURNS = 2400, 28, 2e-3, 7
SAVE_EVERY = 100


def _pixels(scenes: list[Scene]) -> Tensor:
    """(B, 3, 96, 96) in −1 … 1, as the processor normalises."""
    pictures = np.stack([np.asarray(render(scene, training_scans())) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _cell_of_token() -> NDArray[np.int64]:
    """(visual tokens,): the cell that each token's patch lies in."""
    side = CELL // PATCH
    patch = np.arange(GRID * side)
    return (patch[:, None] // side * GRID + patch[None, :] // side).reshape(-1)


class CellHeads(nn.Module):
    """Linear read-outs: the cell, and the cell's colour, shape, size and digit (0: none)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        classes = {"cell": GRID * GRID, "color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": 3, "digit": 11}
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, x: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Summed cross-entropy over (B, n, C) features with (B, n) labels, and the share of things read right by name."""
        x = self.norm(x)
        loss, right = x.new_zeros(()), {}
        for name, head in self.heads.items():
            logits, label = head(x), labels[name]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), label.flatten())
            thing = label > (-1 if name == "cell" else 0)
            right[name] = ((logits.argmax(-1) == label) & thing).sum().item() / thing.sum().item()
        return loss, right


def _labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """(B, 9) int64 for every read-out."""
    names: dict[str, tuple[Any, ...]] = {
        "color": tuple(COLORS),
        "shape": SHAPES,
        "size": SIZES,
        "digit": tuple(range(10)),
    }

    def label(name: str, thing: Any) -> int:
        value = thing and getattr(thing, name)
        return 0 if value is None else 1 + names[name].index(value)

    labels = {n: torch.tensor([[label(n, thing) for thing in s.cells] for s in scenes]) for n in names}
    return labels | {"cell": torch.arange(GRID * GRID).expand(len(scenes), -1)}


def _rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, 99])  # the last number of a held-out sample's seed is its kind: no scene is shared


def _turns(scene: Scene, rng: np.random.Generator, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels (−100: no loss) of TURNS questions of random kinds about one picture."""
    ids: list[int] = []
    labels: list[int] = []
    kinds = rng.permutation(list(KINDS)).tolist()
    for kind in (kinds * 2)[:TURNS]:
        answered = KINDS[kind](scene, rng)
        if answered is None:
            continue
        asked = tokenizer(f"{answered[0]} {ANSWER}").input_ids
        told = tokenizer(f"{answered[1]} {END}").input_ids
        ids += asked + told
        labels += [-100] * len(asked) + told
    return ids, labels


def _batch(scenes: list[Scene], rng: np.random.Generator, tokenizer: Any, image_id: int, tokens: int) -> dict[str, Tensor]:
    rows = [_turns(scene, rng, tokenizer) for scene in scenes]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), tokens + longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    ids[:, :tokens] = image_id
    for i, (row, label) in enumerate(rows):
        ids[i, tokens : tokens + len(row)] = torch.tensor(row)
        labels[i, tokens : tokens + len(row)] = torch.tensor(label)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != tokenizer.pad_token_id).long()}


class Run:
    """One training run in a folder: checkpoints, a log of JSON lines, and where to go on."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed, self.start = out, seed, time.time()
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.processor = make_processor()
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_config(make_config())

    def log(self, **values: Any) -> None:
        line = json.dumps({**values, "seconds": round(time.time() - self.start)})
        print(line, flush=True)
        with (self.out / "training_log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self, stage: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Written beside and renamed, so that a kill at any moment leaves a whole checkpoint."""
        state = {"stage": stage, "step": step, "model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, self.out / "checkpoint.new")
        (self.out / "checkpoint.new").rename(self.out / "checkpoint.pt")

    def resume(self, stage: str, optimizer: torch.optim.Optimizer) -> int:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        if state["stage"] != stage:
            return TOWER_STEPS if stage == "tower" else 0
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def train_tower(self) -> None:
        tower = self.model.model.vision_tower
        heads = CellHeads(tower.config.hidden_size)
        optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=TOWER_RATE, weight_decay=0.01)
        if self.resume("tower", optimizer) >= TOWER_STEPS:
            return
        cell_of = torch.from_numpy(_cell_of_token())
        pool = F.one_hot(cell_of).float() / (CELL // PATCH) ** 2
        for step in range(TOWER_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, TOWER_STEPS, TOWER_RATE)
            rng = _generator(self.seed, 10**7 + step)
            scenes = [draw_scene(rng, empty=0.05, digits=0.5) for _ in range(TOWER_BATCH)]  # digits are what is hard
            tokens = tower(_pixels(scenes), output_hidden_states=True).hidden_states[-1]
            labels, pooled = _labels(scenes), (tokens.mT @ pool).mT
            loss, right = heads(pooled, labels)
            # Every single token should know its cell as well: what is merged into what then matters less.
            token_loss, token_right = heads(tokens, {k: v[:, cell_of] for k, v in labels.items()})
            optimizer.zero_grad()
            (loss + 0.3 * token_loss).backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 49:
                shown = {**right, "digit_by_token": token_right["digit"]}
                self.log(
                    stage="tower",
                    step=step + 1,
                    loss=round(loss.item(), 4),
                    **{k: round(v, 3) for k, v in shown.items()},
                )
        self.save("tower", TOWER_STEPS, optimizer)

    def train_language(self) -> None:
        model, tokenizer = self.model, self.processor.tokenizer
        tower = model.model.vision_tower.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
        tokens, image_id = (tower.config.image_size // PATCH) ** 2, model.config.image_token_id
        running = {"loss": 0.0, "right": 0.0}
        for step in range(self.resume("language", optimizer), STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, STEPS, RATE)
            rng = _generator(self.seed, step)
            scenes = [draw_scene(rng) for _ in range(BATCH)]
            batch = _batch(scenes, rng, tokenizer, image_id, tokens)
            out = model(**batch, pixel_values=_pixels(scenes))
            optimizer.zero_grad()
            out.loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            asked = batch["labels"][:, 1:] != -100
            hits = (out.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[asked].float().mean()
            for name, value in (("loss", out.loss), ("right", hits)):
                running[name] = 0.95 * running[name] + 0.05 * value.item() if step else value.item()
            if step % 25 == 24:
                self.log(stage="language", step=step + 1, **{k: round(v, 4) for k, v in running.items()})
            if (step + 1) % SAVE_EVERY == 0:
                self.save("language", step + 1, optimizer)

    def export(self) -> None:
        """The folder that ``from_pretrained`` reads: bfloat16 weights, configs, tokenizer."""
        self.model.eval().to(torch.bfloat16).save_pretrained(self.out / "model")
        self.processor.save_pretrained(self.out / "model")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and the finished model")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run = Run(arguments.out, arguments.seed)
    run.train_tower()
    run.train_language()
    run.export()


if __name__ == "__main__":
    main()
