"""A folder with a model: which tensors of its files become which stacks of experts, without loading them.

The model is built on the ``meta`` device, and transformers' own conversions say how what is on disk becomes its parameters. They
are run on some experts at a time where that gives the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from effvlm.compression.shards import DTYPES, Entry, read_header
from effvlm.hf import ternary_experts
from effvlm.hf.ternary_experts import Slot
from effvlm.ops.ternary_weight import PARTS

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


@dataclass
class Load:
    """How one or more parameters come from files: a conversion of lists of tensors, or a single tensor as it is."""

    key: str
    converter: Any = None
    entries: dict[str, list[Entry]] = field(default_factory=dict)

    @property
    def single(self) -> Entry:
        """The tensor that is taken as it is."""
        return next(iter(self.entries.values()))[0]

    def size(self) -> int:
        """Bytes on disk."""
        return sum(e.size for entries in self.entries.values() for e in entries)


class _First:
    """A model whose parameters have only their first rows: what conversions see that run on some experts."""

    def __init__(self, model: Any, count: int, of: int) -> None:
        self._model, self._count, self._of = model, count, of

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self._model.get_parameter(name)
        return parameter[: len(parameter) // self._of * self._count]

    get_parameter_or_buffer = get_parameter


@dataclass
class Stack:
    """A stack of experts' matrices in a checkpoint.

    Attributes:
        name: full name in the model.
        saved: the name under which its compressed tensors are saved, which loads as ``name``.
        slot: which of its module's.
        shape: (E, R, C).
        loads: of its parameters, in their order.
    """

    name: str
    slot: Slot
    shape: tuple[int, int, int]
    loads: list[Load]
    parameters: list[str]
    model: Any
    saved: str = ""

    def size(self) -> int:
        """Bytes on disk, of all that its parameters come from."""
        return sum(load.size() for load in self.loads)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """(end − begin, R, C) of these experts, read from the files now."""
        if len(self.loads) > 1:
            return torch.stack([load.single.whole() for load in self.loads[begin:end]])
        load = self.loads[0]
        if load.converter is None:
            per = load.single.shape[0] // self.shape[0] if len(load.single.shape) == 2 else 1
            return self.slot.arranged(load.single.rows(begin * per, end * per), end - begin)
        return self.slot.arranged(self._converted(load, begin, end), end - begin)

    def in_parts(self) -> bool:
        """Whether some experts can be read without the others."""
        E, load = self.shape[0], self.loads[0]
        lists = list(load.entries.values())
        return load.converter is None or (E > 1 and all(len(e) >= E or (len(e) == 1 and e[0].shape[0] == E) for e in lists))

    def _converted(self, load: Load, begin: int, end: int) -> torch.Tensor:
        E, parts = self.shape[0], self.in_parts()
        count = end - begin if parts else E
        converter = copy.deepcopy(load.converter)
        for pattern, entries in load.entries.items():
            some = entries[begin:end] if parts and len(entries) >= E else entries
            for entry in some:
                rows = parts and len(entries) < E
                converter.add_tensor(load.key, entry.name, pattern, entry.rows(begin, end) if rows else entry.whole())
        model = _First(self.model, count, E)
        made = converter.convert(load.key, model=model, config=self.model.config)[self.parameters[0]]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        expected = model.get_parameter(self.parameters[0]).shape
        if tensor.shape != expected:
            raise ValueError(f"compress: expected {self.name} to be {tuple(expected)} in the files, got {tuple(tensor.shape)}")
        return tensor if parts else tensor[begin:end]


@dataclass
class Checkpoint:
    """What :func:`scan` found.

    Attributes:
        folder: with the files.
        config: ``config.json``.
        model: on the meta device.
        layers: name of each module of experts to compress → its stacks, in the order in which they compute.
        left_alone: name of each other module of experts → why.
        dense: all other tensors.
        files: of weights.
    """

    folder: Path
    config: dict[str, Any]
    model: Any
    layers: dict[str, list[Stack]]
    left_alone: dict[str, str]
    dense: list[Entry]
    files: list[Path]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(e.size for e in self.dense) + sum(s.size() for stacks in self.layers.values() for s in stacks)


def scan(folder: Path) -> Checkpoint:
    """Read a folder's config and the headers of its files.

    Raises:
        ValueError: no such folder, no safetensors, a class that transformers lacks, weights that are quantised already, a damaged
            file, or a model without experts that we can compress.
    """
    config = _config(folder)
    files = weight_files(folder)
    entries = [entry for file in files for entry in read_header(file)]
    model = _on_meta(folder, config)
    modules, left_alone = ternary_experts.found(model)
    loads, consumed = _loads(model, entries)
    layers: dict[str, list[Stack]] = {}
    for name, module in modules.items():
        stacks, why = _stacks(name, module, model, loads)
        if why:
            left_alone[name] = f"{type(module).__name__}: {why}"
        else:
            layers[name] = stacks
    if not layers:
        told = "; ".join(f"{n}: {w}" for n, w in left_alone.items())
        raise ValueError(
            f"compress: expected a model with routed experts, got {type(model).__name__} without any ({told or 'none'})"
        )
    _take_only_whole_groups(layers, left_alone, consumed)
    taken = {e.name for stacks in layers.values() for s in stacks for load in s.loads for e in _entries(load)}
    found = Checkpoint(folder, config, model, layers, left_alone, [e for e in entries if e.name not in taken], files)
    _name(found, entries)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder that its index names, or its only one.

    Raises:
        ValueError: there are none, or one is missing.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [p.name for p in sorted(folder.glob("model*.safetensors"))]
    if not names:
        raise ValueError(f"compress: expected safetensors in {folder}, got none")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"compress: expected {folder / missing[0]}, which {INDEX} names, got no such file")
    return [folder / name for name in names]


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"compress: expected a model, or a folder with config.json and safetensors, got {folder}")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    known = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if known:
        raise ValueError(f"compress: expected weights as they were trained, got a model quantised by {known.get('quant_method')}")
    return config


def model_class(config: dict[str, Any]) -> Any:
    """The class that a config names.

    Raises:
        ValueError: transformers has none.
    """
    import transformers

    name = next(iter(config.get("architectures") or ["none in config.json"]))
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"compress: expected a class that transformers {transformers.__version__} has, got {name}")
    return cls


def _on_meta(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    cls = model_class(config)
    with torch.device("meta"), no_init_weights():
        return cls(AutoConfig.from_pretrained(folder))


def _renaming(model: Any) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters of a model's checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    every = get_model_conversion_mapping(model)
    return [c for c in every if isinstance(c, WeightRenaming)], [c for c in every if isinstance(c, WeightConverter)]


def _loads(model: Any, entries: list[Entry]) -> tuple[dict[str, Load], dict[str, list[str]]]:
    """Parameter → where it comes from; key of each conversion → all parameters that it makes. As the loader does it."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _renaming(model)
    of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, Load] = {}
    makes: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda e: dot_natural_key(e.name)):
        key, pattern = rename_source_key(entry.name, renamings, converters, model.base_model_prefix, state)
        if key not in state and entry.name in state:
            key, pattern = rename_source_key(entry.name, [], [], model.base_model_prefix, state)
        if key not in state:
            continue
        converter = None if pattern is None else of[pattern]
        load = found.setdefault(key, Load(key, converter))
        load.entries.setdefault(pattern or entry.name, []).append(entry)
        first = "" if converter is None else converter.target_patterns[0]
        names = [key] if converter is None else [key.replace(first, target) for target in converter.target_patterns]
        makes[key] = names
        for name in names:
            found[name] = load
    return found, makes


def _entries(load: Load) -> Iterator[Entry]:
    return (e for entries in load.entries.values() for e in entries)


def _stacks(name: str, module: Any, model: Any, loads: dict[str, Load]) -> tuple[list[Stack], str]:
    stacks = []
    for slot in ternary_experts.slots_of(module):
        parameters = [f"{name}.{p}" for p in slot.parameters]
        missing = [p for p in parameters if p not in loads]
        if missing:
            return [], f"the files have no {missing[0]}"
        own = [loads[p] for p in parameters]
        odd = next((e for load in own for e in _entries(load) if e.dtype not in list(DTYPES)[:4]), None)
        if odd is not None:
            return [], f"{odd.name} is {odd.dtype}"
        stacks.append(Stack(f"{name}.{slot.path}", slot, slot.shape(module), own, parameters, model))
    return stacks, ""


def _take_only_whole_groups(layers: dict[str, list[Stack]], left_alone: dict[str, str], makes: dict[str, list[str]]) -> None:
    """Leave modules alone whose files also hold what is not compressed."""
    while True:
        ours = {p for stacks in layers.values() for s in stacks for p in s.parameters}
        mixed = [n for n, stacks in layers.items() if any(set(makes[load.key]) - ours for s in stacks for load in s.loads)]
        if not mixed:
            return
        for name in mixed:
            del layers[name]
            left_alone[name] = "its weights share tensors in the files with others"


def _name(found: Checkpoint, entries: list[Entry]) -> None:
    """Choose names for what will be saved: those that transformers' renamings turn into the model's own."""
    from transformers.core_model_loading import apply_renamings, rename_source_key

    from effvlm.hf.quantizer import spared

    renamings, converters = _renaming(found.model)
    stacks = [s for own in found.layers.values() for s in own]
    converters = spared(converters, [s.name for s in stacks])
    state = dict.fromkeys([*found.model.state_dict(), *(f"{s.name}.{part}" for s in stacks for part in PARTS)], True)
    prefix = found.model.base_model_prefix
    for entry in entries:
        rename_source_key(entry.name, renamings, converters, prefix, state)
    back = [r.reverse_transform() for r in renamings[::-1] if r.was_used()]
    for stack in stacks:
        for name in (stack.name, apply_renamings(stack.name, back)):
            if rename_source_key(f"{name}.data", renamings, converters, prefix, state)[0] == f"{stack.name}.data":
                stack.saved = name
                break
        else:
            raise ValueError(f"compress: transformers renames {stack.name} when it loads; expected a name that stays")
