"""The optional experiment tracker: Weights & Biases (its ``WANDB_MODE=offline`` is honoured)."""

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from .checkpoint import write_text
from .errors import UserError


class Tracker:
    """Receives the metrics; does nothing for ``none``.

    Raises:
        UserError: wandb is asked for and not installed, or refuses the run.

    """

    def __init__(self, kind: Literal["none", "wandb"], slug: str, directory: Path, config: Any):
        self._run = None
        if kind == "none":
            return
        try:
            import wandb  # noqa: PLC0415
        except ImportError as error:
            raise UserError(
                "--tracker wandb needs the package wandb: pip install 'tenfold-shared[wandb]', or use --tracker none"
            ) from error
        identity = directory / "wandb-id"  # by it a resumed run goes on with its curves
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                id=identity.read_text(encoding="utf-8"),
                project=f"tenfold-{slug}",
                name=directory.name,
                dir=str(directory),
                config=dataclasses.asdict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb does not begin the run ({error}): log in with `wandb login`, set WANDB_MODE=offline, or use "
                "--tracker none"
            ) from error

    def log(self, values: Mapping[str, float]) -> None:
        """One step's values, named ``<phase>/<metric>``."""
        if self._run is not None:
            self._run.log(dict(values))

    def close(self) -> None:
        """Finish the tracked run."""
        if self._run is not None:
            self._run.finish()
