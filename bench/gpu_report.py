"""Puts what bench/gpu_report.sh has gathered into one JSON and one Markdown file, named after the GPU and the day."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("op", "case", "dtype", "implementation", "median_us", "share_of_ceiling", "effvlm_is_faster_by", "max_error")


def _file_name(machine: dict[str, Any]) -> str:
    words = "".join(c if c.isalnum() else " " for c in machine["gpu"].lower()).split()
    return f"gpu-{'-'.join(words)}-{machine['date'][:10]}"


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        f"# {machine['gpu']}, {machine['date'][:10]}",
        "",
        f"driver {machine['driver']} · CUDA {machine['toolkit']} · torch {machine['versions']['torch']} · {machine['commit']}",
        "",
        "Ceilings measured in the same run: " + json.dumps(report["ceilings"]),
        "",
        "## Tests",
        "```",
        *report["tests"],
        "```",
        "## compute-sanitizer",
        "```",
        *report["sanitizer"],
        "```",
        "## Times (bench/README.md says how they are made)",
        "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in report["rows"]:
        cells = [f"{row[c]:.1e}" if c == "max_error" and row[c] is not None else row[c] for c in COLUMNS]
        lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main(work: Path, out: Path) -> None:
    """Read ``work``'s tests.txt, sanitizer.txt and bench.json; write the two files into ``out``."""
    report = json.loads((work / "bench.json").read_text())
    report["tests"] = (work / "tests.txt").read_text().splitlines()[-8:]
    report["sanitizer"] = (work / "sanitizer.txt").read_text().splitlines()
    out.mkdir(parents=True, exist_ok=True)
    target = out / _file_name(report["machine"])
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(report))
    print(target.with_suffix(".md"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
