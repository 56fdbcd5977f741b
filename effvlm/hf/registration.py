"""Registers the quantisation method with transformers when that is imported, so that ``import effvlm`` alone stays quick."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AFTER = "transformers.quantizers.auto"


class _Watch(MetaPathFinder):
    """Sees one import, and imports our part after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that goes on to ours."""
        if name != _AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_ours(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("effvlm.hf.quantizer")

            spec.loader.exec_module = then_ours  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make ``from_pretrained`` know compressed models; once."""
    if _AFTER in sys.modules:
        importlib.import_module("effvlm.hf.quantizer")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
