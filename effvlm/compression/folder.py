"""A folder with a model to a folder with its compressed form, part by part: layers of experts, then all other tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from effvlm.compression import card
from effvlm.compression.calibrate import Session
from effvlm.compression.checkpoint import Checkpoint, Stack, model_class, scan
from effvlm.compression.journal import Journal, digest, fingerprint
from effvlm.compression.modules import compress_module, layer_report
from effvlm.compression.report import LayerReport
from effvlm.compression.shards import Entry, StreamWriter, copy_tensors, durable, sentence_for_disk, write_durably
from effvlm.compression.stacks import DEFAULT_MEMORY, Stats, batch_of, compress_stack
from effvlm.hf import ternary_experts
from effvlm.hf.planes import Planes
from effvlm.ops.ternary_weight import PARTS, TernaryWeight
from effvlm.quant import TernaryRecipe

FORMAT = 1
SHARD_BYTES = 2_000_000_000
WHOLE = 4  # times a stack's bytes are taken where it is read as a whole
Progress = Callable[[int, int, str], None]


@dataclass
class Job:
    """One folder to one folder.

    Attributes:
        source: what is in the one.
        out: the other.
        recipe: how.
        activations: of the products.
        max_memory: bytes that weights under way may take.
        progress: called with bytes done, bytes in all, and the name of the part.
    """

    source: Checkpoint
    out: Path
    recipe: TernaryRecipe
    activations: str
    max_memory: int
    progress: Progress
    journal: Journal
    done: int = 0

    def advance(self, size: int, name: str) -> None:
        """So many bytes of the source are done."""
        self.done += size
        self.progress(self.done, self.source.size, name)

    def write_part(self, part: str, name: str, write: Callable[[IO[bytes]], dict[str, Any]]) -> None:
        """One file, and its line in the journal."""
        file = f"{part}.safetensors"
        with sentence_for_disk(self.out, file):
            with durable(self.out / file) as target:
                facts = write(target)
            self.journal.add(part, file, name=name, **facts)

    # ---- without calibration ----

    def stream(self) -> None:
        """Compress layer by layer, batch by batch, from the files."""
        for i, (name, stacks) in enumerate(self.source.layers.items()):
            part = f"model-experts-{i:05d}"
            if part in self.journal.records:
                self.advance(sum(s.size() for s in stacks), name)
            else:
                self.write_part(part, name, partial(self._stream_layer, name, stacks))

    def _stream_layer(self, name: str, stacks: list[Stack], file: IO[bytes]) -> dict[str, Any]:
        writer = StreamWriter(file, [f"{s.saved}.{p}" for s in stacks for p in PARTS])
        scales: dict[str, torch.Tensor] = {}
        tensors: dict[str, list[int]] = {}
        every: list[Stats] = []
        for stack in stacks:
            made, words, stats = self._stream_stack(stack, writer.write, name)
            writer.end(f"{stack.saved}.data", torch.uint32, (words,))
            for p in ("tiles", "base", "checksums", "header"):
                writer.tensor(f"{stack.saved}.{p}", made[p])
            scales[stack.saved] = made["scales"]
            tensors[stack.name] = [*stack.shape, words]
            every.append(stats)
        for saved, each in scales.items():  # last: their two bytes would leave what follows between words
            writer.tensor(f"{saved}.scales", each)
        writer.finish()
        weights = sum(s.shape[0] * s.shape[1] * s.shape[2] for s in stacks)
        report = layer_report(name, stacks[0].shape[0], weights, sum(s.size() for s in stacks), writer.stored, every)
        return {"tensors": tensors, "saved": {s.name: s.saved for s in stacks}, "layer": report.to_dict()}

    def _stream_stack(self, stack: Stack, sink: Any, name: str) -> tuple[dict[str, torch.Tensor], int, Stats]:
        batch, read = batch_of(stack.shape, self.recipe, self.max_memory, False), stack.read
        if not stack.in_parts():
            whole = stack.read(0, stack.shape[0])
            read = lambda begin, end: whole[begin:end]  # noqa: E731
        numel = stack.shape[0] * stack.shape[1] * stack.shape[2]

        def count(weights: int) -> None:
            self.advance(stack.size() * weights // numel, name)

        return compress_stack(stack.name, read, stack.shape, self.recipe, batch, sink, done=count)

    # ---- with calibration ----

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Load the model, and compress layer by layer behind compressed ones."""
        cls = model_class(self.source.config)
        model = cls.from_pretrained(self.source.folder, dtype="auto")
        parts = {name: f"model-experts-{i:05d}" for i, name in enumerate(self.source.layers)}
        with Session(model, batches, self.source.layers) as session:
            for name in session.order:
                part, module, stacks = parts[name], model.get_submodule(name), self.source.layers[name]
                if part in self.journal.records:
                    planes = self._finished(part)
                    session.skip(name)
                    self.advance(sum(s.size() for s in stacks), name)
                else:
                    count = partial(self._count, name)
                    planes, report = compress_module(
                        name, module, self.recipe, self.activations, self.max_memory, session.see(name), count
                    )
                    self.write_part(part, name, partial(self._write_layer, stacks, planes, report))
                ternary_experts.install(module, planes)

    def _count(self, name: str, size: int) -> None:
        self.advance(size, name)

    def _write_layer(
        self, stacks: list[Stack], planes: dict[str, Planes], report: LayerReport, file: IO[bytes]
    ) -> dict[str, Any]:
        writer = StreamWriter(file, [f"{s.saved}.{p}" for s in stacks for p in PARTS])
        for stack in stacks:
            for p in ("data", "tiles", "base", "checksums", "header"):
                writer.tensor(f"{stack.saved}.{p}", getattr(planes[stack.slot.path], p).cpu())
        for stack in stacks:
            writer.tensor(f"{stack.saved}.scales", planes[stack.slot.path].scales.cpu())
        writer.finish()
        tensors = {s.name: list(planes[s.slot.path].sizes) for s in stacks}
        return {"tensors": tensors, "saved": {s.name: s.saved for s in stacks}, "layer": report.to_dict()}

    def _finished(self, part: str) -> dict[str, Planes]:
        """A layer that an earlier call finished, from its file."""
        from safetensors import safe_open

        record = self.journal.records[part]
        with safe_open(self.out / record["file"], framework="pt") as file:
            loaded = {
                name: TernaryWeight.from_tensors({p: file.get_tensor(f"{saved}.{p}") for p in PARTS})
                for name, saved in record["saved"].items()
            }
        module = record["name"]
        return {name.removeprefix(f"{module}."): Planes(weight, self.activations) for name, weight in loaded.items()}

    # ---- all other tensors, and the files beside the weights ----

    def copy_dense(self) -> None:
        """All other tensors, bytes as they are."""
        for i, group in enumerate(_groups(self.source.dense)):
            part, size = f"model-dense-{i:05d}", sum(e.size for e in group)
            if part not in self.journal.records:

                def write(file: IO[bytes], group: list[Entry] = group) -> dict[str, Any]:
                    copy_tensors(group, file)
                    return {"tensors": [e.name for e in group]}

                self.write_part(part, "other tensors", write)
            self.advance(size, "other tensors")

    def finish(self) -> tuple[list[LayerReport], int]:
        """Write index, config, card and the files beside; give what became of each layer, and bytes of all weights."""
        from effvlm.hf.quantizer import EffvlmConfig

        names: dict[str, str] = {}
        sizes: dict[str, list[int]] = {}
        layers = []
        for record in self.journal.records.values():
            if "layer" in record:
                names |= {f"{saved}.{p}": record["file"] for saved in record["saved"].values() for p in PARTS}
                sizes |= record["tensors"]
                layers.append(LayerReport.from_dict(record["layer"]))
            else:
                names |= dict.fromkeys(record["tensors"], record["file"])
        layers.sort(key=lambda layer: list(self.source.layers).index(layer.name))
        after = sum(record["size"] for record in self.journal.records.values())
        described = EffvlmConfig(recipe=self.recipe.to_dict(), activations=self.activations, tensors=dict(sorted(sizes.items())))
        with sentence_for_disk(self.out, "config.json and the files beside"):
            card.copy_others(self.source.folder, self.out)
            original = card.original_card(self.source.folder)
            card.write_card(self.out, original, layers, self.recipe.to_dict(), self.activations, self.source.size, after)
            card.write_index(self.out, names, after)
            config = self.source.config | {"quantization_config": described.to_dict()}
            write_durably(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        return layers, after


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Tensors for files of at most about 2 GB, large element types first as safetensors wants them."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(entry)
        room -= entry.size
    return [sorted(group, key=lambda e: (-e.size // max(_count(e), 1), e.name)) for group in groups]


def _count(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel())


def compress_folder(
    folder: Path,
    out: Path,
    recipe: TernaryRecipe,
    activations: str,
    max_memory: int | None,
    calibration: Iterable[Mapping[str, Any]] | None,
    resume: bool,
    progress: Progress,
) -> tuple[list[LayerReport], dict[str, str], int, int]:
    """See :func:`effvlm.compress`; gives what became of each layer, what was left alone, and bytes before and after."""
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise ValueError(f"compress: expected out to be a folder outside the model's, got {out}")
    source = scan(folder)
    batches = None if calibration is None else list(calibration)
    room = _room(source, recipe, max_memory, batches is not None)
    head = {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "activations": activations,
        "weights": fingerprint([folder / "config.json", *source.files]),
        "calibration": None if batches is None else digest(batches),
    }
    with sentence_for_disk(out, "the journal"):
        journal = Journal(out, head, resume=resume)
    job = Job(source, out, recipe, activations, room, progress, journal)
    if batches is None:
        job.stream()
    else:
        job.calibrate(batches)
    job.copy_dense()
    layers, after = job.finish()
    return layers, source.left_alone, source.size, after


def _room(source: Checkpoint, recipe: TernaryRecipe, max_memory: int | None, calibrated: bool) -> int:
    """Bytes for weights under way; raises unless that is enough."""
    room = max_memory or DEFAULT_MEMORY
    if calibrated and max_memory is not None:
        room -= source.size
        if room <= 0:
            raise ValueError(
                f"compress: expected max_memory above {source.size / 1e6:.0f} MB, since calibration runs the model in memory, "
                f"got {max_memory / 1e6:.0f} MB; method 'rtn' without calibration needs less"
            )
    for stacks in source.layers.values():
        for stack in stacks:
            batch_of(stack.shape, recipe, room, calibrated)
            if not calibrated and not stack.in_parts() and WHOLE * stack.size() > room:
                raise ValueError(
                    f"compress: expected max_memory of at least {WHOLE * stack.size() / 1e6:.0f} MB, since the files hold "
                    f"{stack.name} in a way that is read as a whole, got {room / 1e6:.0f} MB"
                )
    return room
