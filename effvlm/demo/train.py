"""Train the demo VLM: ``python -m effvlm.demo.train --out DIR`` (about 40 minutes on 2 cores; resumes where it was stopped).

Training everything jointly from scratch plateaus, and so does the language model on a good tower: it learns what is in a picture
long before it learns to look at the place that is asked for. What made it learn within minutes:

1. the tower first, alone, by linear heads that read from every visual token what its cell holds;
2. then the language model with the tower frozen, on several questions per picture, at first on sparse scenes and on one visual
   token per cell (their mean), with two more losses: each projected token should name what is in its cell by the words' own
   embeddings, and two heads of the later attention layers should look at the cells that the answer depends on;
3. then on all visual tokens.
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
from torch import Tensor, nn

from effvlm.demo.architecture import VISUAL_TOKENS, make_config, make_processor
from effvlm.demo.lessons import CELLS, Lesson, cell_of_token, make, pixels
from effvlm.demo.questions import KINDS
from effvlm.demo.scenes import COLORS, SHAPES, SIZES, Scene, draw_scene

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 2400, 32, 2e-3
CELL_STEPS, TOKEN_STEPS, BATCH, RATE = 1000, 1400, 16, 2e-3
SPARSE_STEPS = 1000  # until then, some scenes are emptier than those that are asked about in the end
NAME_WEIGHT, LOOK_WEIGHT, LOOKING_HEADS = 0.5, 1.0, 2
COUNTING_STEPS = 1500  # until then two questions per picture are to count, the hardest kind by far; from then on, five
OWN_SHARE = 2.0  # when counting: the attention that stays at its own position, where each cell that counts gets 1
LOGGED_EVERY, SAVED_EVERY = 25, 100


class CellHeads(nn.Module):
    """Linear read-outs: the cell, and the cell's colour, shape, size and digit (0: none)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        classes = {"cell": CELLS, "color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "size": 3, "digit": 11}
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
    return labels | {"cell": torch.arange(CELLS).expand(len(scenes), -1)}


def _rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, 99])  # the last number of a held-out sample's seed is its kind: no scene is shared


class Looking:
    """Keeps the attention maps of the language model's later attention layers and scores them."""

    def __init__(self, language: nn.Module) -> None:
        self.maps: list[Tensor] = []
        layers = [m for name, m in language.named_modules() if name.endswith("self_attn")]
        for layer in layers[-2:]:  # the first one comes too early: the question's words have not been put together yet
            layer.register_forward_hook(lambda module, arguments, out: self.maps.append(out[1]))

    def loss(self, lesson: Lesson, cell: Tensor) -> Tensor:
        """Cross-entropy between where the looking heads look and where they should; ``cell`` (n,) is each visual token's.

        To count, each cell that counts should get a fixed fraction of what stays at home, as constant scores under a softmax
        give it, so that the sum tells the number; for any other answer, all of it should go to the cells that matter.
        """
        entry, position = lesson.asked.T
        counts = torch.tensor([kind == "count" for kind in lesson.kinds])
        onehot, total = F.one_hot(cell, CELLS).float(), torch.zeros(())
        for attention, cells in zip(self.maps, (lesson.anchor, lesson.evidence), strict=True):
            heads = attention[entry, :LOOKING_HEADS, position]  # (K, heads, L)
            paid = heads[..., : len(cell)] @ onehot + 1e-6  # (K, heads, 9)
            own = heads[torch.arange(len(entry)), :, position] + 1e-6  # (K, heads)
            pointed = -((paid * cells[:, None]).sum(-1) + 1e-6).log()
            number = cells.sum(-1, keepdim=True)
            counted = -((paid.log() * cells[:, None]).sum(-1) + OWN_SHARE * own.log()) / (number + OWN_SHARE)
            wanted = counts | cells.any(-1)
            total = total + torch.where(counts[:, None], counted, pointed)[wanted].mean()
        self.maps.clear()
        return total


def _scene(rng: np.random.Generator, step: int) -> Scene:
    if step >= SPARSE_STEPS:
        return draw_scene(rng)
    empty = rng.uniform(0.2, 0.7)
    return draw_scene(rng, empty=empty, digits=0.3 * (1 - empty) / 0.8)


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
        cell_of = cell_of_token()
        pool = F.one_hot(cell_of).float() * (CELLS / VISUAL_TOKENS)
        for step in range(TOWER_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, TOWER_STEPS, TOWER_RATE)
            rng = _generator(self.seed, 10**7 + step)
            scenes = [draw_scene(rng, empty=0.05, digits=0.5) for _ in range(TOWER_BATCH)]  # digits are what is hard
            tokens = tower(pixels(scenes), output_hidden_states=True).hidden_states[-1]
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

    def _language_step(self, step: int, looking: Looking) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, and what to log: the share of answer words right by kind, and the parts of the loss."""
        model, rng = self.model, _generator(self.seed, step)
        tokens = CELLS if step < CELL_STEPS else VISUAL_TOKENS
        scenes = [_scene(rng, step) for _ in range(BATCH)]
        image, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
        lesson = make(
            scenes,
            rng,
            self.processor.tokenizer,
            tokens=tokens,
            counts=2 if step < COUNTING_STEPS else 5,
            image=image,
            vocabulary=vocabulary,
        )
        with torch.no_grad():
            seen = model.model.vision_tower(pixels(scenes), output_hidden_states=True).hidden_states[-1]
        cell = cell_of_token()
        if tokens == CELLS:
            seen = (seen.mT @ (F.one_hot(cell).float() * (CELLS / VISUAL_TOKENS))).mT
            cell = torch.arange(CELLS)
        projected = model.model.multi_modal_projector(seen)
        words = model.get_input_embeddings()
        embedded = torch.cat([projected, words(lesson.ids[:, tokens:])], dim=1)
        states = model.model.language_model(inputs_embeds=embedded, attention_mask=lesson.mask, use_cache=False).last_hidden_state
        asked = lesson.labels != -100
        answer = F.cross_entropy(model.lm_head(states[asked]), lesson.labels[asked])
        names = F.rms_norm(projected, projected.shape[-1:]) @ words.weight.T
        name = -(names.log_softmax(-1) * lesson.words[:, cell]).sum(-1).mean()
        look = looking.loss(lesson, cell)
        entry, position = lesson.asked.T
        right = model.lm_head(states[entry, position]).argmax(-1) == lesson.labels[entry, position]
        by_kind = {k: right[[i for i, kind in enumerate(lesson.kinds) if kind == k]] for k in KINDS}
        shares = {k: r.float().mean().item() for k, r in by_kind.items() if len(r)}
        parts = {"loss": answer.item(), "name": name.item(), "look": look.item()}
        return answer + NAME_WEIGHT * name + LOOK_WEIGHT * look, parts | shares

    def train_language(self) -> None:
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.language_model.set_attn_implementation("eager")  # the only one that returns its attention
        looking = Looking(self.model.model.language_model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
        running: dict[str, float] = {}
        for step in range(self.resume("language", optimizer), CELL_STEPS + TOKEN_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, CELL_STEPS + TOKEN_STEPS, RATE)
            loss, shown = self._language_step(step, looking)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            running = {k: 0.95 * running.get(k, v) + 0.05 * v for k, v in shown.items()} | {
                k: v for k, v in running.items() if k not in shown
            }
            if (step + 1) % LOGGED_EVERY == 0:
                self.log(stage="language", step=step + 1, **{k: round(v, 4) for k, v in running.items()})
            if (step + 1) % SAVED_EVERY == 0:
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
