"""Registers the networks with timm without importing timm, which takes longer to import than torch itself.

If timm is loaded, the registration runs now; otherwise right after the first `import timm`, wherever that happens.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_ENTRYPOINTS = "tenfold_slak.models.entrypoints"


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds timm as the other finders do and runs the registration after timm's own code."""

    def __init__(self) -> None:
        self.loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)  # the search below must not meet this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(
                0, self
            )  # whoever only asks whether timm is there, as Accelerate does, imports nothing
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self.loader is not None
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        importlib.import_module(_ENTRYPOINTS)


def install() -> None:
    """Register now if timm is imported already, else when it is."""
    if "timm" in sys.modules:
        importlib.import_module(_ENTRYPOINTS)
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
