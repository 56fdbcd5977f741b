"""Time ops from their specs: ``python bench/run.py --op token_match``. See bench/README.md for how numbers are made."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import ceilings
import machine
import torch
from rich.console import Console
from rich.table import Table
from specs import Case, Spec, specs
from timing import peak_extra_bytes, time_cpu, time_cuda, tune_malloc
from tolerance import assert_close

import effvlm
from effvlm import _core

Row = dict[str, Any]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=[s.op for s in specs()], help="default: all; repeatable")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 and bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--isa", action="store_true", help="a row for every ISA level, not only the one in use")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the reference")
    parser.add_argument("--quick", action="store_true", help="tiny cases and few samples: does it run at all?")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--save", action="store_true", help="append to bench/results/<machine>.jsonl")
    return parser.parse_args(arguments)


def check(spec: Spec, args: tuple[Any, ...], got: Any) -> torch.Tensor:
    """Correctness first, by the spec's own rule; returns the oracle of the first output."""
    host = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    oracle, same = spec.oracle(*host), spec.refer(*host)
    if spec.compare:
        spec.compare(host, got, oracle, same)
    elif spec.run is None:
        for i, kind in enumerate(spec.tolerance):
            assert_close(f"{spec.op}[{i}]", got[i].cpu(), oracle[i], same[i], kind)
    return oracle[0]


def error_of(got: torch.Tensor, oracle: torch.Tensor) -> float:
    return (got.cpu().double() - oracle.double()).abs().max().item() if oracle.numel() else 0.0


def at_level(level: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        effvlm.set_cpu_isa(level)
        return run()

    return call


def implementations(spec: Spec, args: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    runs: dict[str, Callable[[], Any]] = {}
    if options.device == "cpu" and options.isa:
        runs.update({f"effvlm {level}": at_level(level, lambda: spec.timed(*args)) for level in _core.cpu_isas()[::-1]})
    else:
        runs[f"effvlm {_core.cpu_isa()}" if options.device == "cpu" else "effvlm cuda"] = lambda: spec.timed(*args)
    runs["reference"] = lambda: spec.refer(*args)
    if options.compile:
        compiled = torch.compile(spec.refer)
        runs["reference, compiled"] = lambda: compiled(*args)
    runs.update({name: lambda peer=peer: peer(*args) for name, peer in spec.peers.items()})
    return runs


def add_prepared(spec: Spec, args: tuple[Any, ...], runs: dict[str, Callable[[], Any]]) -> list[str]:
    """Peers that get ready first; returns why some are missing."""
    missing = []
    for name, prepare in spec.prepared.items():
        try:
            runs[name] = prepare(*args)
        except ValueError as why:
            missing.append(str(why))
    return missing


def bench_case(spec: Spec, case: Case, dtype: torch.dtype, options: argparse.Namespace, limits: dict[str, Any]) -> list[Row]:
    args = spec.inputs(case, dtype, torch.Generator().manual_seed(0))
    args = tuple(a.to(options.device) if isinstance(a, torch.Tensor) else a for a in args)
    oracle = check(spec, args, spec.call(*args))
    error = error_of(spec.call(*args)[0], oracle)
    runs = implementations(spec, args, options)
    missing = add_prepared(spec, args, runs)
    timer = time_cuda if options.device == "cuda" else time_cpu
    seconds = 0.2 if options.quick else 1.0 if options.device == "cuda" else 6.0
    timings = timer(runs, budget=seconds, least=3 if options.quick else 30)
    ours = next(iter(timings.values())).median
    least = ceilings.seconds_at_least(limits, dtype, spec.flops(case), spec.bytes(case, dtype))
    rows = []
    for name, timing in timings.items():
        seconds = timing.median
        rows.append(
            {
                "op": spec.op,
                "case": str(case),
                "dtype": str(dtype).removeprefix("torch."),
                "implementation": name,
                "median_us": round(seconds * 1e6, 1),
                "spread_us": round(timing.spread * 1e6, 1),
                "samples": timing.samples,
                "gb_s": round(spec.bytes(case, dtype) / seconds / 1e9, 2),
                "gflop_s": round(spec.flops(case) / seconds / 1e9, 1),
                "share_of_ceiling": round(least / seconds, 3),
                "effvlm_is_faster_by": round(seconds / ours, 2),
                "max_error": error if name.startswith("effvlm") else None,
                "peak_extra_mb": round((peak_extra_bytes(runs[name], options.device) or 0) / 2**20, 2),
            }
        )
        if name in spec.prepared:  # what they allocate is not torch's to see; what they compute may be of other precision
            rows[-1].update(max_error=error_of(runs[name](), oracle), peak_extra_mb=None)
    same = {"op": spec.op, "case": str(case), "dtype": str(dtype).removeprefix("torch.")}
    return rows + [{**same, "implementation": why} for why in missing]


def print_rows(console: Console, rows: list[Row]) -> None:
    table = Table()
    shown = ("case", "dtype", "implementation", "median_us", "spread_us", "gb_s", "gflop_s", "share_of_ceiling")
    shown += ("effvlm_is_faster_by", "max_error", "peak_extra_mb")
    for column in shown:
        table.add_column(column.replace("_", " "), justify="left" if column in shown[:3] else "right")
    for op in dict.fromkeys(row["op"] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{op}[/]")
        for row in (r for r in rows if r["op"] == op):
            cells = [row.get(c) for c in shown]
            table.add_row(
                *("" if c is None else f"{c:.1e}" if k == "max_error" else str(c) for k, c in zip(shown, cells, strict=True))
            )
    console.print(table)


@torch.no_grad()  # as at inference
def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    notes = Console(stderr=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: expected a CUDA device, torch sees none")
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_malloc()
    dtypes = [getattr(torch, options.dtype)] if options.dtype else [torch.float32, torch.bfloat16]
    level = _core.cpu_isa()
    with notes.status("measuring this machine's ceilings"):
        limits = ceilings.measure(options.device, seconds=0.02 if options.quick else 0.4)
    rows: list[Row] = []
    for spec in (s for s in specs() if not options.op or s.op in options.op):
        cases = [c for c in spec.cases if c.bench != options.quick and (not options.case or options.case in c.name)]
        for case in cases[:1] if options.quick else cases:
            for dtype in (d for d in dtypes if d in spec.dtypes):
                with notes.status(f"{spec.op} {case} {dtype}"):
                    rows += bench_case(spec, case, dtype, options, limits)
                effvlm.set_cpu_isa(level)
    result = {"machine": machine.record(options.device), "ceilings": limits, "rows": rows}
    if options.save:
        path = Path(__file__).parent / "results" / f"{machine.name(options.device)}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        print_rows(Console(width=180 if not sys.stdout.isatty() else None), rows)
        notes.print(f"ceilings: {limits}", style="dim")


if __name__ == "__main__":
    main()
