"""Recipes as YAML: every frozen dataclass of this package is a mapping of its name to its fields."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from effvlm.tokens.step import Recipe


@cache
def _classes() -> dict[str, type]:
    """Everything that a recipe may name."""
    import effvlm.tokens as package

    found: dict[str, type] = {}
    for module in (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)):
        for name, value in vars(module).items():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                found[name] = value
    return found


def to_text(recipe: Recipe) -> str:
    """YAML text of a recipe, defaults left out."""
    fields = {"positions": recipe.positions, "attention": recipe.attention, "methods": [_plain(m) for m in recipe.methods]}
    return str(yaml.safe_dump(fields, sort_keys=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__name__ not in _classes():
            raise ValueError(f"Recipe: expected parts of effvlm.tokens, which a file can name, got {type(value).__name__}")
        fields = {}
        for f in dataclasses.fields(value):
            mine = getattr(value, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if mine != default:
                fields[f.name] = _plain(mine)
        return {type(value).__name__: fields}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"Recipe: expected values that YAML can hold, got {value!r}")


def from_source(cls: type[Recipe], source: str | Path) -> Recipe:
    """A recipe from a file (a Path, or one line that ends in .yaml or .yml) or from text."""
    is_file = isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml")))
    text = Path(source).read_text() if is_file else str(source)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe: expected YAML, got {' '.join(str(error).split())}") from None
    if isinstance(data, list):
        data = {"methods": data}
    if not isinstance(data, dict) or not isinstance(data.get("methods"), list):
        raise ValueError("Recipe: expected a mapping with a list called methods, such as 'methods: [{ToMe: {keep: 0.25}}]'")
    unknown = sorted(set(data) - {"methods", "positions", "attention"})
    if unknown:
        raise ValueError(f"Recipe: expected methods, positions and attention, got {unknown[0]!r}")
    methods = [_built(m) for m in data.pop("methods")]
    return cls(methods, **data)


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_built(v) for v in value)
    if isinstance(value, str) and value in _classes():
        value = {value: {}}
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"Recipe: expected one name with its fields, such as {{ToMe: {{keep: 0.25}}}}, got {value}")
    name, fields = next(iter(value.items()))
    if name not in _classes():
        near = difflib.get_close_matches(str(name), _classes(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(_classes()))}"
        raise ValueError(f"Recipe: expected a name of effvlm.tokens, got {name!r}{hint}")
    kind = _classes()[name]
    fields = fields or {}
    if not isinstance(fields, dict):
        raise ValueError(f"Recipe: expected {name}'s fields as a mapping, got {fields!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    for field in fields:
        if field not in known:
            raise ValueError(f"Recipe: expected {name}'s fields {', '.join(known)}, got {field!r}")
    return kind(**{k: _built(v) for k, v in fields.items()})
