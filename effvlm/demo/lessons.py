"""What the demo VLM is trained on: batches of pictures with several questions each, and where to look for every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from effvlm.demo.architecture import ANSWER, END, PATCH
from effvlm.demo.questions import KINDS, Question
from effvlm.demo.scenes import CELL, GRID, PLACES, Scene, Thing, render, training_scans

CELLS = GRID * GRID


@dataclass(frozen=True)
class Lesson:
    """One batch, visual tokens first; L counts them as well.

    Attributes:
        ids, labels, mask: (B, L) int64; labels are −100 where nothing is to be predicted, and say what follows a position.
        asked: (K, 2) int64, batch entry and position of every word of an answer that is to be predicted there.
        kinds: (K,) names of the kinds that they belong to.
        anchor, evidence: (K, 9) float32, 1 for the cells to look at (``questions.Question``); a row of zeros: nothing to see.
        words: (B, 9, V) float32, the words for what is in each cell, as a distribution.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    asked: Tensor
    kinds: list[str]
    anchor: Tensor
    evidence: Tensor
    words: Tensor


def cell_of_token() -> Tensor:
    """(visual tokens,) int64: the cell that each token's patch lies in."""
    side = CELL // PATCH
    patch = torch.arange(GRID * side) // side
    return (patch[:, None] * GRID + patch[None, :]).reshape(-1)


def pixels(scenes: list[Scene]) -> Tensor:
    """(B, 3, 96, 96) in −1 … 1, as the processor normalises."""
    pictures = np.stack([np.asarray(render(scene, training_scans())) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _cells(which: list[tuple[int, ...]]) -> Tensor:
    mask = torch.zeros(len(which), CELLS)
    for row, cells in enumerate(which):
        mask[row, list(cells)] = 1
    return mask


def _words(thing: Thing | None, place: str) -> list[str]:
    if thing is None:
        return [*place.split(), "nothing"]
    return [*place.split(), thing.color, thing.what, *([thing.size] if thing.size else [])]


def _targets(scenes: list[Scene], tokenizer: Any, vocabulary: int) -> Tensor:
    target = torch.zeros(len(scenes), CELLS, vocabulary)
    for i, scene in enumerate(scenes):
        for c, thing in enumerate(scene.cells):
            target[i, c, tokenizer.convert_tokens_to_ids(_words(thing, PLACES[c]))] = 1
    return F.normalize(target, p=1, dim=-1)


def _questions(scene: Scene, rng: np.random.Generator, counts: int) -> list[tuple[str, Question]]:
    """One of every kind, in random order, but ``counts`` of counting; none twice, since the second could be copied."""
    kinds = rng.permutation([*KINDS, *["count"] * (counts - 1)]).tolist()
    asked = {question: kind for kind in kinds if (question := KINDS[kind](scene, rng))}
    return [(kind, question) for question, kind in asked.items()]


def make(
    scenes: list[Scene], rng: np.random.Generator, tokenizer: Any, *, tokens: int, counts: int, image: int, vocabulary: int
) -> Lesson:
    """Questions about each scene, after ``tokens`` placeholders ``image``."""
    rows: list[tuple[list[int], list[int]]] = []  # ids, labels
    asked: list[tuple[int, int]] = []
    answered: list[tuple[str, Question]] = []
    for entry, scene in enumerate(scenes):
        row, labels = [image] * tokens, [-100] * tokens
        for kind, question in _questions(scene, rng, counts):
            text = tokenizer(f"{question.text} {ANSWER}").input_ids
            answer = tokenizer(f"{question.answer} {END}").input_ids
            start = len(row) + len(text) - 1
            asked += [(entry, start + k) for k in range(len(answer) - 1)]
            answered += [(kind, question)] * (len(answer) - 1)
            row += text + answer
            labels += [-100] * (len(text) - 1) + answer + [-100]
        rows.append((row, labels))
    longest = max(len(row) for row, _ in rows)

    def padded(which: int, fill: int) -> Tensor:
        return torch.tensor([row[which] + [fill] * (longest - len(row[which])) for row in rows])

    ids = padded(0, tokenizer.pad_token_id)
    return Lesson(
        ids=ids,
        labels=padded(1, -100),
        mask=(ids != tokenizer.pad_token_id).long(),
        asked=torch.tensor(asked),
        kinds=[kind for kind, _ in answered],
        anchor=_cells([question.anchor for _, question in answered]),
        evidence=_cells([question.evidence for _, question in answered]),
        words=_targets(scenes, tokenizer, vocabulary),
    )
