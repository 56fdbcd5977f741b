"""Every family of routed experts in the installed transformers, found by looking, as tiny random modules."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

HIDDEN, INNER, EXPERTS = 32, 24, 4
_COUNT = re.compile(r"(num|n|moe_num)_(local_|routed_)?experts")


@cache
def families() -> tuple[str, ...]:
    """Names of the folders under transformers/models that use the decorator."""
    folder = Path(transformers.__file__).parent / "models"
    found = (f for f in sorted(folder.glob("*/modeling_*.py")) if "\n@use_experts_implementation" in f.read_text())
    return tuple(f"{f.parent.name}.{f.stem}" for f in found)


def expert_classes(family: str) -> list[type]:
    """The decorated classes of one modeling file."""
    module = importlib.import_module(f"transformers.models.{family}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return [c for c in classes if hasattr(c, "_apply_gate") and hasattr(c.__init__, "__wrapped__")]


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    for name, value in list(vars(config).items()):
        if isinstance(value, bool) or not isinstance(value, int | None):
            continue
        if "intermediate_size" in name:
            setattr(config, name, INNER)
        elif name == "hidden_size":
            setattr(config, name, HIDDEN)
        elif _COUNT.fullmatch(name):
            setattr(config, name, EXPERTS)
    return config


def tiny(cls: Any) -> Any:
    """An instance with random parameters, made from whichever configuration of its family fits."""
    module = importlib.import_module(cls.__module__)
    folder = cls.__module__.rsplit(".", 1)[0]
    configs = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, PreTrainedConfig) and c.__module__.startswith(folder)
    ]
    stem = cls.__name__.removesuffix("Experts")
    options = (
        {"intermediate_size": INNER} if "intermediate_size" in inspect.signature(cls.__init__.__wrapped__).parameters else {}
    )
    errors = []
    for config in sorted(configs, key=lambda c: not c.__name__.startswith(stem)):
        try:
            made = cls(_shrunk(config()), **options)
        except (AttributeError, TypeError, KeyError) as error:
            errors.append(f"{config.__name__}: {error}")
            continue
        generator = torch.Generator().manual_seed(0)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return made.eval()
    raise LookupError(f"{cls.__name__}: no configuration fits ({'; '.join(errors)})")
