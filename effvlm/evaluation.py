"""``effvlm evaluate``: methods against an unmodified model and against controls of the same budget, on the same questions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from effvlm import demo
from effvlm.ask import inputs_of, load_model, open_image
from effvlm.hf import reduce
from effvlm.tokens import METHODS, Method, Pool, Random, Recipe, Stride

CONTROLS = (Random, Stride, Pool)


@dataclass
class Outcome:
    """Answers of one setting to all questions, in their order.

    Attributes:
        name: of the setting.
        answers: what the model said.
        right: whether each answer is the expected one.
        visual_tokens: per image.
        seconds: of ``generate``, all questions.
        control: whether this is one.
        engaged: whether tokens were reduced at all.
        changed: share of the answers that differ from the unmodified model's.
        versus_unmodified: two-sided p of McNemar's exact test against the unmodified model.
        versus_controls: the same against each control, by its name.
    """

    name: str
    answers: list[str]
    right: list[bool]
    visual_tokens: float
    seconds: float
    control: bool = False
    engaged: bool = True
    changed: float = 0.0
    versus_unmodified: float = 1.0
    versus_controls: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single answers, for JSON."""
        low, high = wilson(sum(self.right), len(self.right))
        fields = {k: v for k, v in asdict(self).items() if k not in ("answers", "right")}
        return {**fields, "accuracy": self.accuracy, "n": len(self.right), "low": low, "high": high}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927)."""
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test for answers to the same questions: of those that only one got right, is it even?

    Raises:
        ValueError: not the same number of questions.
    """
    if len(a) != len(b):
        raise ValueError(f"mcnemar: expected answers to the same questions, got {len(a)} and {len(b)}")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail: float = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def settings(
    methods: Sequence[Method], keep: float, controls: bool, attention: Sequence[str] = ("plain",)
) -> list[tuple[str, Method | None, bool]]:
    """(name, method, whether it is a control): the unmodified model, the methods, and controls that keep as many tokens.

    Every method and control comes once with each kind of ``attention``; recipes have their own.
    """
    rows: list[tuple[str, Method | None, bool]] = [("unmodified", None, False)]
    everything = [(m, False) for m in methods] + [(kind(keep=keep), True) for kind in CONTROLS if controls]
    for kind_of in attention:
        for m, control in everything:
            if not isinstance(m, Recipe):
                m = Recipe([m], attention=kind_of)
            if (_name(m), m, control) not in rows:
                rows.append((_name(m), m, control))
    return rows


def _name(method: Method) -> str:
    if isinstance(method, Recipe):
        more = [f", {method.positions}"] * (method.positions != "original") + [", proportional"] * (method.attention != "plain")
        return " + ".join(_name(m) for m in method.methods) + "".join(more)
    keep = getattr(method, "keep", None)
    place = " in the tower" if getattr(method, "at", "") == "vision" else ""
    return type(method).__name__ + place + (f" {keep:.0%}" if isinstance(keep, (int, float)) else "")


def method_named(name: str, keep: float) -> Method:
    """A method of :mod:`effvlm.tokens` by its name, with that ``keep``.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    import difflib

    names = {m.__name__: m for m in METHODS}
    found = {n.lower(): n for n in names}.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"evaluate: expected a method among {', '.join(names)}, got {name!r}{hint}")
    kind: Any = names[found]
    return kind(keep=keep) if "keep" in kind.__dataclass_fields__ else kind()  # type: ignore[no-any-return]


def compare(
    model: Any,
    ask: Callable[[Callable[[int], None]], tuple[list[str], float]],
    expected: Sequence[str],
    rows: Sequence[tuple[str, Method | None, bool]],
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[Outcome]:
    """Ask every setting all questions, and test it against the others.

    Args:
        model: the model that ``ask`` asks.
        ask: answers all questions; is given a function to call with the number of questions done. → (answers, seconds).
        expected: the right answers.
        rows: what :func:`settings` returns; the first one is the unmodified model.
        progress: called with a setting's name and the number of questions done.
    """
    outcomes: list[Outcome] = []
    for name, method, control in rows:
        with reduce(model, method) if method else nullcontext() as reducer, torch.no_grad():
            answers, seconds = ask(lambda done, name=name: progress(name, done))  # type: ignore[misc]
        right = [a == b for a, b in zip(answers, expected, strict=True)]
        tokens = float("nan") if reducer is None else reducer.report.tokens_out / max(1, reducer.report.images)
        outcome = Outcome(name, answers, right, tokens, seconds, control, reducer is None or reducer.report.engaged)
        outcomes.append(outcome)
        if reducer is not None and math.isnan(outcomes[0].visual_tokens):
            outcomes[0].visual_tokens = reducer.report.tokens_in / max(1, reducer.report.images)
    first = outcomes[0]
    for outcome in outcomes[1:]:
        outcome.versus_unmodified = mcnemar(outcome.right, first.right)
        outcome.changed = sum(a != b for a, b in zip(outcome.answers, first.answers, strict=True)) / len(first.answers)
        outcome.versus_controls = {c.name: mcnemar(outcome.right, c.right) for c in outcomes if c.control and c is not outcome}
    return outcomes


def verdict(outcome: Outcome, outcomes: Sequence[Outcome], alpha: float = 0.05) -> str:
    """What the tests say about a method, in words."""
    if not outcome.engaged:
        return "nothing was reduced"
    controls = [c for c in outcomes if c.control]
    if outcome is outcomes[0] or outcome.control or not controls:
        return ""
    beaten = [c for c in controls if outcome.accuracy > c.accuracy and outcome.versus_controls[c.name] < alpha]
    worse = [c for c in controls if outcome.accuracy < c.accuracy and outcome.versus_controls[c.name] < alpha]
    if len(beaten) == len(controls):
        return "beats all controls"
    names = ", ".join(c.name.split()[0] for c in (worse or [c for c in controls if c not in beaten]))
    return f"{'worse than' if worse else 'does not beat'} {names}"


def print_table(console: Console, outcomes: Sequence[Outcome]) -> None:
    """The outcomes for people."""
    n = len(outcomes[0].right)
    title = f"{n} questions, the same for all; p: McNemar's exact test, paired, two-sided"
    table = Table(title=title, title_justify="left")
    for column in ("", "visual tokens", "right", "95 % interval", "changed", "p, unmodified", "against controls"):
        table.add_column(column, justify="left" if column in ("", "against controls") else "right")
    for o in outcomes:
        low, high = wilson(sum(o.right), n)
        first = o is outcomes[0]
        tokens = "–" if math.isnan(o.visual_tokens) else f"{o.visual_tokens:.0f}"
        cells = (tokens, f"{o.accuracy:.1%}", f"{low:.1%} – {high:.1%}", "" if first else f"{o.changed:.1%}")
        table.add_row(o.name, *cells, "" if first else _p(o.versus_unmodified), "control" if o.control else verdict(o, outcomes))
    console.print(table)


def _p(p: float) -> str:
    return "< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0")


def read_questions(path: Path) -> list[dict[str, str]]:
    """Questions from a file of JSON lines: ``{"image": path, "question": …, "answer": …}``; paths count from the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no such object; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"evaluate: expected a file of questions, found none at {path}")
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            asked = json.loads(line)
            asked = {k: str(asked[k]) for k in ("image", "question", "answer")}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"evaluate: expected image, question and answer as JSON in line {number} of {path}") from None
        asked["image"] = str(path.parent / asked["image"])
        questions.append(asked)
    if not questions:
        raise ValueError(f"evaluate: expected questions in {path}, found none")
    return questions


def run(
    notes: Console,
    *,
    methods: Sequence[str],
    keep: float,
    recipe: Path | None,
    attention: str,
    controls: bool,
    model: str | None,
    data: Path | None,
    n: int,
    seed: int,
) -> list[Outcome]:
    """What ``effvlm evaluate`` does: load, ask every setting, test. Progress goes to ``notes``."""
    chosen: list[Method] = [method_named(name, keep) for name in methods]
    if recipe is not None:
        chosen.append(Recipe.from_yaml(recipe))
    if not chosen:
        chosen = [method_named("ToMe", keep)]
    if (model is None) != (data is None):
        raise ValueError(
            "evaluate: expected --model and --data together: the demo VLM has questions of its own, other models need yours"
        )
    kinds = {"plain": ("plain",), "proportional": ("proportional",), "both": ("plain", "proportional")}
    if attention not in kinds:
        raise ValueError(f"evaluate: expected --attention plain, proportional or both, got {attention!r}")
    rows = settings(chosen, keep, controls, kinds[attention])
    with notes.status("loading the model"):
        vlm, processor = load_model(model)
    ask, expected = _demo_questions(vlm, processor, n, seed) if data is None else _own_questions(vlm, processor, data)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=len(expected), start=False) for name, _, _ in rows}

        def progress(name: str, done: int) -> None:
            bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done)

        return compare(vlm, ask, expected, rows, progress)


Ask = Callable[[Callable[[int], None]], tuple[list[str], float]]


def _demo_questions(model: Any, processor: Any, n: int, seed: int) -> tuple[Ask, list[str]]:
    expected = [s.answer for s in demo.samples(n, seed=seed)]

    def ask(progress: Callable[[int], None]) -> tuple[list[str], float]:
        result = demo.evaluate(model, n, seed=seed, processor=processor, progress=progress)
        return result["answers"], result["seconds"]

    return ask, expected


def _own_questions(model: Any, processor: Any, data: Path) -> tuple[Ask, list[str]]:
    """One question at a time; answers are compared without regard to case and surrounding space."""
    questions = read_questions(data)
    pictures = [open_image(Path(q["image"])) for q in questions]

    def ask(progress: Callable[[int], None]) -> tuple[list[str], float]:
        answers, seconds = [], 0.0
        for i, (asked, picture) in enumerate(zip(questions, pictures, strict=True)):
            inputs = inputs_of(processor, picture, asked["question"]).to(model.device, model.dtype)
            start = time.perf_counter()
            out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            seconds += time.perf_counter() - start
            text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            answers.append(text.strip().lower())
            progress(i + 1)
        return answers, seconds

    return ask, [q["answer"].strip().lower() for q in questions]
