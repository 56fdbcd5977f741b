"""``effvlm demo``: the table, the samples and the contact sheet."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from effvlm._info import cpu_name
from effvlm.ask import open_image
from effvlm.demo.evaluation import Sample, answer, evaluate, load, prompt, samples
from effvlm.demo.sheet import Tile, contact_sheet
from effvlm.evaluation import mcnemar, wilson
from effvlm.hf import disable, enable, reduce
from effvlm.tokens import Method, Pool, Random, Recipe, Stride, ToMe

KEEPS = (1.0, 0.5, 0.25, 0.1)
BATCH = 40
OWN_QUESTIONS = (
    "what color is the thing at the center ?",
    "what shape is at the center ?",
    "how many red things are there ?",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def _at(model: Any, keep: float) -> Any:
    """The unmodified model at 1, reduced below: by ToMe, sizes told to the language model."""
    return nullcontext() if keep == 1 else reduce(model, _sized(ToMe(keep=keep)))


def _sized(method: Method) -> Recipe:
    return Recipe([method], attention="proportional")


@contextmanager
def _enabled(model: Any) -> Iterator[None]:
    """Our kernels under the model, all tokens: what is lossless."""
    enable(model)
    try:
        yield
    finally:
        disable(model)


def _settings(model: Any) -> list[tuple[str, float, bool, Any]]:
    """Name, share of visual tokens kept, whether it is a control, context: the rows of the table."""
    rows: list[tuple[str, float, bool, Any]] = [("unmodified", 1.0, False, nullcontext())]
    rows += [("enabled, lossless", 1.0, False, _enabled(model))]
    rows += [(f"ToMe {keep:.0%}, proportional", keep, False, _at(model, keep)) for keep in KEEPS[1:]]
    rows += [("ToMe 25%", 0.25, False, reduce(model, ToMe(keep=0.25)))]
    for control in (Random(keep=0.25), Stride(keep=0.25), Pool(keep=0.25)):
        name = f"{type(control).__name__} 25%"
        rows.append((name, 0.25, True, reduce(model, control)))
        rows.append((f"{name}, proportional", 0.25, True, reduce(model, _sized(control))))
    return rows


@contextmanager
def _peak_memory(row: dict[str, Any]) -> Iterator[None]:
    """Peak resident memory of the process in the block, MB, on Linux (elsewhere None): the kernel's own high-water mark."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that a row does not inherit what the one before it freed
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    yield
    try:
        status = Path("/proc/self/status").read_text()
        row["peak_memory_mb"] = round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError):
        row["peak_memory_mb"] = None


def prefill_ms(model: Any, processor: Any, asked: list[Sample], runs: int = 5) -> float:
    """Median milliseconds per prompt of the language model's own forward over one batch, from hooks around real calls."""
    language, times = model.model.language_model, []

    def before(module: Any, args: Any) -> None:
        times.append(-time.perf_counter())

    def after(module: Any, args: Any, out: Any) -> None:
        times[-1] += time.perf_counter()

    hooks = [language.register_forward_pre_hook(before), language.register_forward_hook(after)]
    images, text = [s.image for s in asked], [prompt(s.question) for s in asked]
    inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    try:
        with torch.no_grad():
            for _ in range(runs + 1):  # the first one warms up
                model(**inputs, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return 1e3 * statistics.median(times[1:]) / len(asked)


def _row(model: Any, processor: Any, row: dict[str, Any], context: Any, n: int, seed: int, step: Callable[[int], None]) -> None:
    with context as reducer:
        row["prefill_ms"] = prefill_ms(model, processor, samples(min(n, BATCH), seed=seed))
        with _peak_memory(row):
            result = evaluate(model, n, seed=seed, batch_size=BATCH, processor=processor, progress=step)
    row.update({k: result[k] for k in ("accuracy", "right", "n", "kinds", "answers")})
    row["low"], row["high"] = wilson(result["right"], n)
    row["ms_per_answer"] = 1e3 * result["seconds"] / n
    row["visual_tokens"] = model.config.image_seq_length if reducer is None else reducer.report.tokens_out / reducer.report.images


def _own_pictures(folder: Path | None) -> list[tuple[str, Image.Image]]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise FileNotFoundError(f"demo: expected a folder of pictures, found none at {folder}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES)
    if not paths:
        raise ValueError(f"demo: expected pictures ({', '.join(_PICTURES)}) in {folder}, found none")
    return [(path.name, open_image(path)) for path in paths]


def _tiles(model: Any, processor: Any, shown: list[tuple[Image.Image, str, str | None]]) -> list[Tile]:
    answers = {}
    for keep in KEEPS:
        with _at(model, keep):
            answers[f"{keep:.0%}"] = answer(model, processor, [p for p, _, _ in shown], [q for _, q, _ in shown])
    return [Tile(p, q, e, {k: a[i] for k, a in answers.items()}) for i, (p, q, e) in enumerate(shown)]


def run(notes: Console, *, n: int, seed: int, out: Path, images: Path | None) -> dict[str, Any]:
    """Measure the rows, answer the samples, write the contact sheet; everything as plain data.

    Args:
        notes: where progress goes (standard error).
        n: questions per row.
        seed: which questions.
        out: folder for ``contact_sheet.png``; made if it is not there.
        images: folder of the user's own pictures, or None.
    """
    own = _own_pictures(images)
    with notes.status("loading the demo model"):
        model, processor = load()
    shown: list[tuple[Image.Image, str, str | None]] = [(s.image, s.question, s.answer) for s in samples(8, seed=seed)]
    shown += [(picture, question, None) for _, picture in own for question in OWN_QUESTIONS]
    tiles = _tiles(model, processor, shown)
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(tiles).save(out / "contact_sheet.png")
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as progress:
        for name, keep, control, context in _settings(model):
            task = progress.add_task(name, total=n)

            def step(done: int, task: Any = task) -> None:
                progress.update(task, completed=done)

            rows.append({"name": name, "keep": keep, "control": control})
            _row(model, processor, rows[-1], context, n, seed, step)
    expected = [s.answer for s in samples(n, seed=seed)]
    marks = [[a == b for a, b in zip(row.pop("answers"), expected, strict=True)] for row in rows]
    for row, mark in zip(rows, marks, strict=True):
        row["p_unmodified"] = mcnemar(mark, marks[0])
    return {
        "rows": rows,
        "samples": [{"question": t.question, "expected": t.expected, "answers": t.answers} for t in tiles],
        "contact_sheet": str(out / "contact_sheet.png"),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {p: version(p) for p in ("effvlm", "torch", "transformers")},
    }


def print_tables(console: Console, result: dict[str, Any]) -> None:
    """Samples, then the table, for people."""
    table = Table(title="held-out samples: answers by share of visual tokens kept", title_justify="left")
    for column in ("question", "expected", *(f"{keep:.0%}" for keep in KEEPS)):
        table.add_column(column)
    for sample in result["samples"]:
        expected = sample["expected"]
        marks = [a if expected is None else f"[{'green' if a == expected else 'red'}]{a}[/]" for a in sample["answers"].values()]
        table.add_row(sample["question"], expected or "–", *marks)
    console.print(table)
    first = result["rows"][0]
    title = f"{first['n']} held-out questions, {result['machine']['threads']} threads, batches of {BATCH}; times per question"
    table = Table(title=title, title_justify="left")
    for column in ("", "right", "95 %", "visual tokens", "LLM prefill", "answer", "peak memory"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for row in result["rows"]:
        faster = f" {first['prefill_ms'] / row['prefill_ms']:.1f}×" if row is not first else ""
        cells = (
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} – {row['high']:.1%}",
            f"{row['visual_tokens']:.0f}",
            f"{row['prefill_ms']:.1f} ms{faster}",
            f"{row['ms_per_answer']:.1f} ms",
            f"{row['peak_memory_mb']:.0f} MB" if row["peak_memory_mb"] else "–",
        )
        table.add_row(f"[dim]{row['name']} (control)[/]" if row["control"] else row["name"], *cells)
    console.print(table)
    console.print(f"[dim]contact sheet: {result['contact_sheet']}[/]")
