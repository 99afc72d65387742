"""The binvox format: a text header, then run lengths of 0 and 1 with x slowest, then z, y fastest."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from tenfold_shared.errors import UserError


@dataclass(frozen=True)
class Binvox:
    """A cubic occupancy grid with axes x, y, z; ``translate`` and ``scale`` carry it back to the mesh's coordinates."""

    grid: UInt8[ndarray, "d d d"]
    translate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0


def parse_binvox(content: bytes, where: str = "the file") -> Binvox:
    """Read a binvox file's bytes.

    Raises:
        UserError: it is no binvox file, not cubic, or truncated; the file is named.

    """
    header, separator, body = content.partition(b"\ndata\n")
    lines = header.decode("latin-1").splitlines()
    if not separator or not lines or not lines[0].startswith("#binvox"):
        raise UserError(f"{where} is no binvox file: it must begin with '#binvox 1'")
    fields = {key: values for key, *values in (line.split() for line in lines[1:] if line.strip())}
    try:
        dims = [int(value) for value in fields["dim"]]
        translate = tuple(float(value) for value in fields.get("translate", ["0", "0", "0"]))
        scale = float(fields.get("scale", ["1"])[0])
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where} has a broken binvox header: {error}") from error
    if len(dims) != 3 or len(set(dims)) != 1 or len(translate) != 3:
        raise UserError(f"{where} has dimensions {dims}: a cube is needed")
    runs = np.frombuffer(body[: len(body) // 2 * 2], np.uint8).reshape(-1, 2)
    values = np.repeat(runs[:, 0], runs[:, 1])
    side = dims[0]
    if len(values) != side**3 or (len(values) and values.max() > 1):
        raise UserError(f"{where} is truncated or corrupted: {len(values)} of {side**3} voxels of 0 or 1")
    return Binvox(values.reshape(side, side, side).transpose(0, 2, 1).copy(), translate, scale)


def read_binvox(path: Path) -> Binvox:
    """Read a binvox file; errors name it."""
    try:
        return parse_binvox(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def binvox_bytes(binvox: Binvox) -> bytes:
    """The file's bytes; `parse_binvox` gives the same grid back."""
    grid = binvox.grid
    values = grid.transpose(0, 2, 1).reshape(-1).astype(np.uint8)
    changes = np.flatnonzero(np.diff(values)) + 1
    edges = np.concatenate([[0], changes, [len(values)]])
    runs = []
    for first, last in itertools.pairwise(edges):
        full, rest = divmod(int(last - first), 255)
        value = int(values[first])
        runs += [value, 255] * full + ([value, rest] if rest else [])
    side = grid.shape[0]
    x, y, z = binvox.translate
    header = f"#binvox 1\ndim {side} {side} {side}\ntranslate {x:g} {y:g} {z:g}\nscale {binvox.scale:g}\ndata\n"
    return header.encode() + bytes(runs)
