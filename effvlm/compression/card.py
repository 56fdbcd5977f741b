"""The files beside the weights: config, index, tokenizer and the like, and a card with what was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from effvlm.compression.checkpoint import INDEX, WEIGHTS
from effvlm.compression.report import LayerReport, row, size
from effvlm.compression.shards import durable, write_durably

CARD = "README.md"


def copy_others(folder: Path, out: Path) -> None:
    """Everything of a model but its weights, its config and its card."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_dir() or hidden or str(name) in ("config.json", CARD) or path.name.endswith(WEIGHTS):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as source, durable(out / name) as target:
            shutil.copyfileobj(source, target)


def write_index(out: Path, tensors: dict[str, str], total: int) -> None:
    """Which file has which tensor; ``total`` bytes in all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(tensors.items()))}
    write_durably(out / INDEX, json.dumps(index, indent=2) + "\n")


def write_card(
    out: Path, original: str, layers: list[LayerReport], recipe: dict[str, Any], activations: str, before: int, after: int
) -> None:
    """``README.md``: the original's front matter, what was done and measured, then the original's text.

    Args:
        out: folder.
        original: text of the original's card; empty for none.
        layers: what became of each module.
        recipe: its fields.
        activations: of the products.
        before, after: bytes of the whole model.
    """
    front, text = _split(original)
    weights = sum(layer.weights for layer in layers)
    stored = sum(layer.bytes_after for layer in layers)
    body = [
        "# Compressed experts",
        "",
        f"The weights of the routed experts are ternary, stored in {8 * stored / max(weights, 1):.3f} bits each by effvlm: "
        f"{size(before)} → {size(after)} for the whole model.",
        "transformers loads it once effvlm is imported; **without the import it would fill the experts with random weights**:",
        "",
        "```python",
        "import effvlm",
        "from transformers import AutoModel  # or the class for your task",
        "",
        f'model = AutoModel.from_pretrained("{out.name}")',
        "```",
        "",
        f"Recipe: `{json.dumps(recipe)}`, {activations} activations.",
        "",
        "| layer | experts | bits per weight | output error | weight error | method |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row(layer))} |" for layer in layers),
        "",
        "Output error: ‖y − y'‖ / ‖y‖ of a layer's experts on calibration tokens, where there were any. Weight error: "
        "‖W − Q‖² / ‖W‖², the mean over matrices.",
        "",
    ]
    rest = ["## The original's card", "", text.strip(), ""] if text.strip() else []
    write_durably(out / CARD, "\n".join([*front, *body, *rest]))


def _split(original: str) -> tuple[list[str], str]:
    """Lines of the front matter, fences included, and the text after it."""
    lines = original.split("\n")
    if lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return [], original
    end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    return [*lines[: end + 1], ""], "\n".join(lines[end + 1 :])


def original_card(folder: Path) -> str:
    """Text of a folder's card; empty for none."""
    path = folder / CARD
    return path.read_text(errors="replace") if path.is_file() else ""


def peak_memory() -> int:
    """Most bytes that this process ever had in memory; 0 where that is not known."""
    status = Path("/proc/self/status")
    if status.is_file():  # what resource says on Linux counts the process that started this one
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])  # type: ignore[index]
    if os.name != "posix":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
