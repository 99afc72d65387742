"""Atomic writes, safe loads: weights as safetensors, the state that resuming needs as a tensors-only ``state.pt``."""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import DISK_FULL, RunFailure, UserError

DIGEST = "sha256"  # metadata key of the digest over everything: safetensors itself does not notice a flipped bit


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` complete or not at all; what stood there before stays until then.

    Raises:
        RunFailure: there is no space for the file; the previous one is untouched.
        UserError: there is no such folder and none can be made, or nothing may be written into it.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunFailure(f"cannot write {path}: the disk is full; free some space") from error
        raise UserError(f"cannot write into {path.parent}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes private files; ours are as readable as any other
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror
        raise RunFailure(
            f"cannot write {path}: {reason}; the file before it is intact, free some space and resume with --resume"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    total = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors (any device) as safetensors with JSON ``metadata`` and a digest of their bytes.

    Tensors that share storage are written once each, as they are.
    """
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    storages: set[int] = set()
    for name, tensor in host.items():
        if tensor.numel() and tensor.data_ptr() in storages:
            host[name] = tensor.clone()
        storages.add(tensor.data_ptr())
    with atomic_write(path) as file:
        file.write(save(host, {**header, DIGEST: _digest(host, header)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the metadata of a file that `save_weights` wrote.

    Raises:
        UserError: the file is missing, truncated or altered.

    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the file or the folder of a run that has finished a step")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}): it is truncated or corrupted") from error
    if DIGEST in header and header.pop(DIGEST) != _digest(tensors, header):
        raise UserError(f"{path} is corrupted: its tensors do not have the digest they were saved with")
    try:
        return tensors, {key: json.loads(header[key]) for key in sorted(header)}  # the file has no order
    except ValueError as error:
        raise UserError(f"{path} is corrupted, or another program's: its metadata is no JSON ({error})") from error


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors and plain values, all that resuming needs, in one file."""
    with atomic_write(path) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's zip writer hides the reason; the file object keeps it
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, "disk full")) from error


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; never runs code from the file.

    Raises:
        UserError: the file is truncated, altered, or holds anything but tensors and plain values.

    """
    return load_pickled_tensors(path)


def load_pickled_tensors(path: Path) -> dict[str, Any]:
    """The dictionary in a ``torch.save`` file (also the authors' ``.pth.tar``), tensors and plain values only.

    Raises:
        UserError: the file is missing, truncated, altered, holds other objects, or is no dictionary.

    """
    value = load_pickled(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a dictionary of tensors")
    return value


def load_pickled(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """What a ``torch.save`` file holds, on the CPU: tensors, plain values, and objects of the `allowed` types.

    Raises:
        UserError: the file is missing, truncated, altered, or holds other objects.

    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path")
    try:
        if zipfile.is_zipfile(path):  # torch writes checksums and does not read them
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"{broken} does not have its checksum")
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allowed)):
            warnings.simplefilter("ignore")  # of a pickle protocol, before the error says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file can be broken
        raise UserError(f"{path} {_fault(error)}: it was not loaded") from error


def _fault(error: Exception) -> str:
    """What is wrong with a file, out of torch's message, which goes on to advise how to load it in spite of that."""
    text = str(error)
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return f"holds an object of {foreign[1]}, not only tensors and plain values"
    detail = text.rpartition("WeightsUnpickler error:")[2].strip()
    if " " not in detail:  # a key or a byte that says nothing
        detail = type(error).__name__
    return f"is truncated or corrupted ({detail.splitlines()[0].partition('. ')[0][:100]})"
