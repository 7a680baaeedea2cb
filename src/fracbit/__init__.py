"""fracbit: compress a language model to any average bit width and measure what each bit gains.

`import fracbit` is all that transformers needs to load a fracbit checkpoint. The import itself is light: torch and
transformers are loaded when they are first needed, and transformers is told of fracbit at that moment.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending
from fracbit.records.version import __version__

__all__ = [
    "Recipe",
    "Scheme",
    "Spending",
    "__version__",
    "evaluate",
    "export",
    "load",
    "plan",
    "prove",
    "quantize",
    "refine",
    "score",
    "sweep",
    "tweak",
    "verify",
]

_API = {
    "quantize": "fracbit.pipeline.verbs",
    "plan": "fracbit.pipeline.plan.plan",
    "score": "fracbit.pipeline.plan.scoring",
    "evaluate": "fracbit.pipeline.verbs",
    "load": "fracbit.checkpoint.load",
    "sweep": "fracbit.sweeps.runner",
    "export": "fracbit.pipeline.verbs",
    "prove": "fracbit.engines.prove",
    "verify": "fracbit.checkpoint.verify",
    "tweak": "fracbit.pipeline.improve.better",
    "refine": "fracbit.pipeline.improve.better",
    "run": "fracbit.pipeline.verbs",  # version 0.1's name of quantize(recipe, output); goes in 0.3
}
_HOOKED = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    """Import a function of the interface when it is first used."""
    if name not in _API:
        raise AttributeError(f"module 'fracbit' has no attribute {name!r}")
    found = getattr(importlib.import_module(_API[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The names of the interface, verbs that are not imported yet among them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Registrar(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers fracbit right after transformers' table of quantizers has been imported, then leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOOKED:
            return None
        sys.meta_path.remove(self)
        self.found = importlib.machinery.PathFinder.find_spec(fullname, path)
        return self.found and importlib.machinery.ModuleSpec(fullname, self, origin=self.found.origin)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self.found is not None
        assert self.found.loader is not None
        spec.has_location = True
        return self.found.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self.found is not None
        assert self.found.loader is not None
        self.found.loader.exec_module(module)
        _register()


def _register() -> None:
    """The module registers at its end; where it is what is being imported, that is still to come."""
    importlib.import_module("fracbit.checkpoint.hf")


if _HOOKED in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registrar())
