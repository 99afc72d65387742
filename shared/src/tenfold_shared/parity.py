"""The authors' numbers: fixtures of every kind are read and given to a package's check of that kind."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def parity_files(tests: str | Path) -> list[Path]:
    """Every fixture in the folder named by ``TENFOLD_PARITY_DIR``, or in ``parity/`` beside the test file."""
    folder = Path(os.environ.get("TENFOLD_PARITY_DIR") or Path(tests).parent / "parity")
    files = sorted(folder.glob("*.npz"))
    assert files, f"no parity fixture in {folder}"
    return files


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One parity fixture: its kind, its options, and its arrays by name, each read as a tensor of its own."""

    kind: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def __contains__(self, entry: str) -> bool:
        """Whether the file has this entry."""
        return entry in self.arrays

    def __getitem__(self, entry: str) -> torch.Tensor:
        """An array as a new tensor."""
        return torch.from_numpy(np.array(self.arrays[entry]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """All arrays whose names begin with ``prefix``, by the rest of their names."""
        return {entry.removeprefix(prefix): self[entry] for entry in self.arrays if entry.startswith(prefix)}

    def decoded(self, entry: str) -> Any:
        """What an entry of JSON text holds."""
        return json.loads(str(np.ravel(self.arrays[entry])[0]))


def load_fixture(path: Path) -> Fixture:
    """Read a fixture without unpickling anything."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    fixture = Fixture(str(np.ravel(arrays["kind"])[0]), {}, arrays)
    options = next((entry for entry in ("cfg/json", "cfg/meta", "meta") if entry in fixture), None)
    return dataclasses.replace(fixture, meta=fixture.decoded(options)) if options else fixture


def close(actual: object, expected: object, tolerance: float = 1e-9) -> None:
    """Equal shapes, and |actual - expected| <= tolerance * max(1, max |expected|)."""
    actual, expected = (torch.as_tensor(values, dtype=torch.float64).detach() for values in (actual, expected))
    assert actual.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, largest))


def check_parity(path: Path, checks: Mapping[str, Callable[[Fixture], None]]) -> None:
    """Run the check of a fixture's kind; a kind without one fails with its name."""
    fixture = load_fixture(path)
    assert fixture.kind in checks, f"{path.name} is of the unknown kind {fixture.kind!r}"
    checks[fixture.kind](fixture)
