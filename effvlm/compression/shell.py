"""``effvlm compress``: what a person sees of :func:`effvlm.compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from effvlm.compression import compress, read_recipe
from effvlm.compression.report import CompressReport, row

BLOCK, BLOCKS = 512, 64  # tokens of a calibration batch, and how many at most


def run(
    notes: Console,
    *,
    model: Path,
    out: Path,
    fields: dict[str, Any],
    recipe: Path | None,
    calibration: Path | None,
    max_memory: str | None,
    restart: bool,
) -> CompressReport:
    """Compress a folder with a bar on ``notes``.

    Args:
        fields: of the recipe, which go before those of the file ``recipe``.
        calibration: a text file.

    Raises:
        KeyboardInterrupt: after saying how to go on.
    """
    chosen = (read_recipe(recipe) if recipe else {}) | fields
    batches = text_batches(model, calibration) if calibration else None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
    )
    with bar:
        task = bar.add_task("reading headers", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            return compress(model, chosen, batches, out, max_memory, not restart, advance)
        except KeyboardInterrupt:
            notes.print(f"finished parts are kept in {out}; the same command goes on from there", markup=False, soft_wrap=True)
            raise


def text_batches(model: Path, file: Path) -> list[dict[str, torch.Tensor]]:
    """A text file's first tokens, as inputs of one block each.

    Raises:
        ValueError: no such file, or fewer tokens than a block has.
    """
    from transformers import AutoTokenizer

    if not file.is_file():
        raise ValueError(f"compress: expected a text file for calibration, got {file}, which is none")
    ids = AutoTokenizer.from_pretrained(model)(file.read_text(), return_tensors="pt")["input_ids"][0, : BLOCK * BLOCKS]
    if len(ids) < BLOCK:
        raise ValueError(f"compress: expected at least {BLOCK} tokens of calibration in {file}, got {len(ids)}")
    return [{"input_ids": block[None]} for block in ids[: len(ids) // BLOCK * BLOCK].split(BLOCK)]


def print_table(console: Console, report: CompressReport) -> None:
    """A row per layer, and the totals."""
    table = Table(title=_pattern([layer.name for layer in report.layers]))
    table.add_column("layer", overflow="fold")
    for name in ("experts", "bits/weight", "output error", "weight error"):
        table.add_column(name, justify="right")
    table.add_column("method")
    for layer in report.layers:
        name, *cells = row(layer)
        table.add_row(_own_part(name, table.title), *cells)
    console.print(table)
    for line in str(report).splitlines()[1 + len(report.layers) :]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _pattern(names: list[str]) -> str | None:
    """``model.layers.*.mlp.experts``, if names differ in one part only: a narrow terminal has no room for each in full."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({len(p) for p in parts}) > 1:
        return None
    differ = [i for i, each in enumerate(zip(*parts, strict=True)) if len(set(each)) > 1]
    return ".".join("*" if i in differ else p for i, p in enumerate(parts[0])) if len(differ) == 1 else None


def _own_part(name: str, pattern: Any) -> str:
    return name if pattern is None else name.split(".")[pattern.split(".").index("*")]
