"""Everything in the tenfold packages that is not the paper."""

from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """The type checker of the tests, which jaxtyping's import hook reaches as an attribute of this package."""
    if name != "typecheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - as rare as this call

    return import_module(f"{__name__}.typecheck")
