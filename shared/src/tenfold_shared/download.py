"""The data root; resumable, verified fetching; unpacking that stays in its folder; unpickling that runs nothing."""

import contextlib
import hashlib
import http.client
import os
import pickle
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tenfold_shared.errors import DISK_FULL, RunFailure, UserError

_CHUNK = 1 << 20

# What numpy arrays need; `numpy.core` became `numpy._core` in numpy 2, and the published pickles have either.
NUMPY_GLOBALS = frozenset(
    f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")
) | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}

# What scipy's compressed sparse rows and columns need besides, from Python 2 on.
SCIPY_GLOBALS = NUMPY_GLOBALS | {
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
    "__builtin__.object",
    "builtins.object",
    *(f"scipy.sparse.{dot}{kind}.{kind}_matrix" for dot in ("", "_") for kind in ("csr", "csc", "coo")),
}


def data_root() -> Path:
    """Where data sets lie: $TENFOLD_DATA, otherwise `tenfold` in the platform's cache folder. It need not exist."""
    given = os.environ.get("TENFOLD_DATA")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("tenfold", appauthor=False)


def missing(dataset: str, url: str, folder_layout: str, *, fetchable: bool = False) -> UserError:
    """The one message for a data set that is not there: where to get it and what has to lie where."""
    fetch_it = " or let --data.download do it" if fetchable else ""
    return UserError(f"{dataset} is not there: get it from {url} and lay it out as {folder_layout}{fetch_it}")


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(
    url: str,
    destination: str | os.PathLike[str],
    sha256: str | None = None,
    md5: str | None = None,
    *,
    tries: int = 4,
    wait: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file over HTTP(S) unless it is there already; returns its path.

    Bytes go to `<destination>.part`, which replaces the destination only when it is whole and its checksum is right. A
    connection that breaks is taken up where it broke, up to `tries` times with `wait`, 2 `wait`, 4 `wait`, ... seconds
    between. A part left by an earlier call is continued only where a checksum is given: without one, nothing would tell
    that the file behind the URL had changed since. Raises UserError, naming the URL and what to do.
    """
    destination = Path(destination)
    if destination.exists():
        if (problem := _mismatch(destination, sha256, md5)) is not None:
            raise UserError(f"{destination} is not what {url} should give ({problem}): delete it to fetch it again")
        return destination
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url} cannot be fetched: only http and https addresses can")
    part = destination.with_name(destination.name + ".part")
    with _written(f"{destination} cannot be written"):
        part.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is None and md5 is None:
            part.unlink(missing_ok=True)
        resumed = part.exists()
        _fetch_part(url, part, destination, tries, wait, timeout)
        problem = _mismatch(part, sha256, md5)
        if problem is not None and resumed:  # the earlier part may have been of another file
            part.unlink()
            _fetch_part(url, part, destination, tries, wait, timeout)
            problem = _mismatch(part, sha256, md5)
        if problem is not None:
            part.unlink()
            raise UserError(
                f"{url} gave a file with the wrong checksum ({problem}): try again later or get it elsewhere"
            )
        part.replace(destination)
    return destination


@contextlib.contextmanager
def _written(what: str) -> Iterator[None]:
    """What the disk says against a file or folder, in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise RunFailure(f"{what}: the disk is full; free some space and try again") from error
        raise UserError(f"{what} ({error}): choose another folder, TENFOLD_DATA says where data sets lie") from error


def _fetch_part(url: str, part: Path, destination: Path, tries: int, wait: float, timeout: float) -> None:
    validator: str | None = None
    for attempt in range(tries):
        try:
            validator, whole = _transfer(url, part, validator, timeout)
            if whole:
                return
            reason = "the connection broke"
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_FULL):
                raise  # of the disk, not of the network
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < tries:
            time.sleep(wait * 2**attempt)
    raise UserError(
        f"{url} could not be fetched ({reason}): check the connection, or get it elsewhere and put it at {destination}"
    )


def _transfer(url: str, part: Path, validator: str | None, timeout: float) -> tuple[str | None, bool]:
    """Append what is missing of `part`; returns the server's validator of the file and whether the part is whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tenfold", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator is not None:
            headers["If-Range"] = validator
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies behind the part's end: it is whole, or it is of another, longer file.
        whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
        if not whole:
            part.unlink()
        return None, whole
    with response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not continues:
            have = 0  # the server sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if continues else "wb") as stream, _progress(part.stem, have, total) as advance:
            while chunk := response.read(_CHUNK):
                stream.write(chunk)
                have += len(chunk)
                advance(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
    return response.headers.get("ETag"), total is None or have == total


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _mismatch(file: Path, sha256: str | None, md5: str | None) -> str | None:
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != expected.lower():
            return f"{name} {digest.hexdigest()} instead of {expected.lower()}"
    return None


# --- unpacking --------------------------------------------------------------------------------------------------------


def unpack(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Unpack a tar (plain, .gz, .bz2, .xz) or zip archive into `folder`; returns the folder.

    The members appear in the folder only after all of them were unpacked. Raises UserError for a truncated or corrupted
    archive, and for a member that would land outside of the folder, links outside of it or is a device.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise UserError(f"the archive {archive} does not exist: fetch it first")
    with _written(f"{archive} cannot be unpacked into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _unpack_beside(archive, folder)
    return folder


def _unpack_beside(archive: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as scratch:
        try:
            if zipfile.is_zipfile(archive):
                _unzip(archive, Path(scratch))
            else:
                _untar(archive, Path(scratch))
        except tarfile.FilterError as error:
            raise UserError(f"{archive} is refused: {error}; get the archive from its official address") from error
        except Exception as error:
            # The decompressors' errors have no common type; what the disk says has a number.
            if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise UserError(f"{archive} is truncated or corrupted ({error}): delete it and fetch it again") from error
        _merge(Path(scratch), folder)


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            _refuse_outside(archive, member.name)
            if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                raise UserError(f"{archive} is refused: {member.name!r} is a device; get it from its official address")
            tar.extract(member, folder, filter="data")
        stream = tar.fileobj
        assert stream is not None
        if stream.tell() < tar.offset + tarfile.BLOCKSIZE:
            raise EOFError("its end is missing")
        while stream.read(_CHUNK):  # the checksum of a compressed stream lies behind the last member
            pass


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as pack:
        for name in pack.namelist():
            _refuse_outside(archive, name)
        pack.extractall(folder)


def _refuse_outside(archive: Path, name: str) -> None:
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.is_absolute() or windows.drive or ".." in windows.parts:
        raise UserError(
            f"{archive} is refused: {name!r} would land outside of its folder; get it from its official address"
        )


def _merge(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        beside = target / entry.name
        if entry.is_dir() and not entry.is_symlink() and beside.is_dir():
            _merge(entry, beside)
        else:
            entry.replace(beside)


# --- unpickling -------------------------------------------------------------------------------------------------------


class _Restricted(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], name: str, allowed: Collection[str], encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self.name, self.allowed = name, allowed

    def find_class(self, module: str, name: str) -> Any:
        if "." in name or f"{module}.{name}" not in self.allowed:
            raise UserError(
                f"{self.name} is refused: it asks for {module}.{name}, which its data has no need of and which could "
                "run code; get the file from its official address"
            )
        try:
            # The modules' earlier names are on their way out of the libraries.
            current = module.replace("numpy.core", "numpy._core")
            if module.startswith("scipy.sparse.") and not module.startswith("scipy.sparse._"):
                current = module.replace("scipy.sparse.", "scipy.sparse._")
            return super().find_class(current, name)
        except ImportError:
            return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(f"{self.name} is refused: it refers to an object outside of itself ({pid!r})")


def restricted_pickle_load(
    file: str | os.PathLike[str], allowed: Collection[str] = NUMPY_GLOBALS, encoding: str = "ASCII"
) -> Any:
    """Unpickle a published data file while nothing but the globals in `allowed` ("module.name") can be looked up.

    Python's plain containers, numbers and strings need no global. Pickles of Python 2 that hold arrays need the
    encoding "latin1", and name their globals as Python 2 did (`copy_reg`, `__builtin__`). Raises UserError that names
    the refused global, or a file that is missing, truncated or corrupted.
    """
    try:
        with Path(file).open("rb") as stream:
            return _Restricted(stream, str(file), frozenset(allowed), encoding).load()
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: fetch its data set again") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file} is truncated or corrupted ({error}): delete it and fetch it again") from error
