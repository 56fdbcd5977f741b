"""Finished parts of a folder under way, a line each: what is in the journal is whole and on disk, and is not done again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from effvlm.compression.shards import PAGE, sync_folder

NAME = "compression.jsonl"
SAMPLES = 16


class Journal:
    """The journal of a folder, opened or begun.

    Args:
        out: the folder; made if it is not there.
        head: what the work is, so that only the same work goes on; plain values.
        resume: go on with what is there; otherwise begin again.

    Attributes:
        records: of finished parts by name, in their order.

    Raises:
        ValueError: the folder holds other files, or the work of another call.
    """

    def __init__(self, out: Path, head: Mapping[str, Any], *, resume: bool) -> None:
        self.out, self.records = out, dict[str, dict[str, Any]]()
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / NAME
        lines = self._lines()
        if not lines and any(not p.name.endswith(".part") and p != self._file for p in out.iterdir()):
            raise ValueError(
                f"compress: expected out to be a new folder, or one with unfinished work, got {out} with other files"
            )
        if lines and resume and lines[0] != json.loads(json.dumps(head)):
            raise ValueError(
                f"compress: expected out to be new, or to hold unfinished work of the same call, got {out} with that on other "
                "weights, calibration or recipe; resume=False (--restart) begins again"
            )
        for part in out.glob(".*.part"):
            part.unlink()
        if lines and not resume:
            for record in lines[1:]:
                (out / record["file"]).unlink(missing_ok=True)
            lines = []
        for record in lines[1:]:
            path = out / record["file"]
            if not path.is_file() or path.stat().st_size != record["size"]:
                break
            self.records[record["part"]] = record
        self._write([head, *self.records.values()])

    def _lines(self) -> list[dict[str, Any]]:
        """All whole lines; the last may have been cut short."""
        if not self._file.is_file():
            return []
        found = []
        for line in self._file.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        part = self.out / f".{NAME}.part"
        with open(part, "wb") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._file)
        sync_folder(self.out)

    def add(self, part: str, file: str, **facts: Any) -> None:
        """A part is finished: its file is whole and on disk."""
        record = {"part": part, "file": file, "size": (self.out / file).stat().st_size, **facts}
        with open(self._file, "ab") as journal:
            journal.write(json.dumps(record).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.records[part] = json.loads(json.dumps(record))


def fingerprint(files: Iterable[Path]) -> str:
    """Of files too large to read: their names, sizes and some of their bytes."""
    found = hashlib.sha256()
    for path in files:
        length = path.stat().st_size
        found.update(f"{path.name} {length}".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(length - PAGE, 0) // (SAMPLES - 1))
                found.update(file.read(PAGE))
    return found.hexdigest()


def digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Of calibration inputs."""
    found = hashlib.sha256()
    for inputs in batches:
        for name, value in inputs.items():
            found.update(name.encode())
            if isinstance(value, torch.Tensor):
                found.update(f"{value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                found.update(repr(value).encode())
    return found.hexdigest()
