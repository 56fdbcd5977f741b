"""safetensors files without memory maps: tensors are read in parts, and written as they come, so that memory stays bounded.

A file appears under its name whole and on disk, or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PAGE, CHUNK = 4096, 16 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: ``size`` bytes of ``file`` from ``begin``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin`` … ``end`` along dimension 0, read into memory.

        Raises:
            ValueError: of a dtype that is no floating point, or the file ends before.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"compress: expected weights of {', '.join(list(DTYPES)[:4])} in {self.name}, got {self.dtype}")
        row = self.size // max(self.shape[0], 1)
        out = torch.empty((end - begin) * row, dtype=torch.uint8)
        view, done = memoryview(out.numpy().data), 0
        with self.opened(begin * row) as file:
            while done < len(view):
                done += self.some(file.readinto(view[done : done + CHUNK]))
        return out.view(DTYPES[self.dtype]).view(end - begin, *self.shape[1:])

    @contextmanager
    def opened(self, offset: int = 0) -> Iterator[Any]:
        """The file, at a byte of the tensor."""
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin + offset)
                yield file
        except OSError as error:
            raise ValueError(f"compress: could not read {self.file}: {error.strerror}") from error

    def some(self, count: int) -> int:
        """``count`` bytes that were read; none is an error."""
        if not count:
            raise ValueError(f"compress: {self.file} ends in the middle of {self.name}")
        return count

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.rows(0, self.shape[0])


def read_header(file: Path) -> list[Entry]:
    """What a file holds.

    Raises:
        ValueError: the file is no safetensors, or shorter than it says.
    """
    length = file.stat().st_size
    try:
        with open(file, "rb") as source:
            (size,) = struct.unpack("<Q", source.read(8))
            if size > min(length, 100 << 20):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(source.read(size))
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"compress: expected {file} to be a safetensors file, got one that cannot be read ({error})") from error
    header.pop("__metadata__", None)
    found = []
    for name, of in header.items():
        begin, end = of["data_offsets"]
        found.append(Entry(name, file, of["dtype"], tuple(of["shape"]), 8 + size + begin, end - begin))
    needed = max((e.begin + e.size for e in found), default=8 + size)
    if length < needed:
        raise ValueError(f"compress: {file} is truncated: expected {needed} bytes, got {length}; fetch it again")
    return found


@contextmanager
def durable(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when the block ends well and its bytes are on disk; nothing is left otherwise."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """A small text file."""
    with durable(path) as file:
        file.write(text.encode())


@contextmanager
def sentence_for_disk(out: Path, what: str) -> Iterator[None]:
    """Turn an error of the disk into a sentence that says what is kept."""
    try:
        yield
    except OSError as error:
        why = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror or error}"
        told = OSError(
            f"compress: could not write {what} in {out}: {why}; finished parts are kept, the same call goes on from there"
        )
        told.errno = error.errno
        raise told from error


class StreamWriter:
    """Writes tensors one after the other into a file whose header comes last, in room left for it.

    Args:
        file: at its beginning.
        names: of all tensors that may come, for the size of the room.
    """

    def __init__(self, file: IO[bytes], names: Iterable[str]) -> None:
        self._file = file
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        longest: dict[str, Any] = {name: {"dtype": "BF16", "shape": [2**40] * 4, "data_offsets": [2**48] * 2} for name in names}
        self._room = -(-(len(json.dumps(self._header | longest)) + 8) // PAGE) * PAGE - 8  # data begins on a page
        file.write(b"\0" * (8 + self._room))
        self._at = 0

    def write(self, part: torch.Tensor) -> None:
        """Append bytes to the tensor that :meth:`end` will name."""
        self._file.write(part.contiguous().view(torch.uint8).numpy().data)

    def end(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        """All that was written since the last call is this tensor."""
        end = self._file.tell() - 8 - self._room
        self._header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self._at, end]}
        self._at = end

    def tensor(self, name: str, tensor: torch.Tensor) -> None:
        """A whole tensor."""
        self.write(tensor)
        self.end(name, tensor.dtype, tensor.shape)

    @property
    def stored(self) -> int:
        """Bytes of all tensors so far."""
        return self._at

    def finish(self) -> None:
        """Write the header; spaces fill its room."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))


def copy_tensors(entries: list[Entry], file: IO[bytes]) -> None:
    """Write a file of these tensors, bytes as they are.

    Raises:
        ValueError: a source ends before its tensor does.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.size]}
        at += e.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // 8) * 8 - 8)
    file.write(struct.pack("<Q", len(text)) + text)
    room = memoryview(bytearray(CHUNK))
    for e in entries:
        for offset in range(0, e.size, CHUNK):
            wanted, done = min(CHUNK, e.size - offset), 0
            with e.opened(offset) as source:
                while done < wanted:
                    done += e.some(source.readinto(room[done:wanted]))
            file.write(room[:wanted])
