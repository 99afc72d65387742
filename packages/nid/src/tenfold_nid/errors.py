"""Errors a user can act on, and imports that may be missing."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tenfold_shared.errors import UserError

if TYPE_CHECKING:  # slow to import, and all modules import this one
    from tenfold_shared.run import RunOptions


class DataError(UserError):
    """A file or an array that cannot be used; the message says which, why and what to do."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the library refuses, and what is not installed, as an error of the user."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def refuse_precision(options: "RunOptions", what: str, *, networks: bool) -> None:
    """Refuse arithmetic that does not apply: linear algebra keeps to fp32, networks of single signals to fp32 and bf16.

    Raises:
        UserError: naming ``what`` was to be computed so.

    """
    allowed = {"fp32", "bf16"} if networks else {"fp32"}
    if options.compile or options.precision not in allowed:
        kinds = " or ".join(sorted(allowed, reverse=True))
        raise UserError(
            f"{what} runs in {kinds}, not compiled: --compile and other --precision are for training a dictionary"
        )


def import_open3d() -> Any:
    """Open3D, which reads and writes meshes.

    Raises:
        ImportError: it is not installed, or a system library that it loads is missing.

    """
    try:
        return importlib.import_module("open3d")
    except ModuleNotFoundError as error:
        raise ImportError("meshes need Open3D: pip install 'tenfold-nid[mesh]'") from error
    except OSError as error:
        raise ImportError(
            f"Open3D is installed but cannot be loaded ({error}); on Debian and Ubuntu it needs the system packages "
            "libusb-1.0-0, libgl1 and libgomp1"
        ) from error
