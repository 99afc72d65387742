"""Fetching from a local server that breaks, archives that try to escape, pickles that try to run."""

import errno
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import scipy.sparse

from tenfold_shared.download import (
    NUMPY_GLOBALS,
    SCIPY_GLOBALS,
    data_root,
    fetch,
    missing,
    restricted_pickle_load,
    unpack,
)
from tenfold_shared.errors import RunFailure, UserError

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with byte ranges; the server's `plan` says how each request in turn goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        plan = self.server.plan.pop(0) if self.server.plan else "serve"
        if isinstance(plan, int):
            self.send_error(plan)
            return
        start = 0
        if self.headers.get("Range") and plan != "ignore range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        if plan == "break":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.plan, running.ranges = [], []
        running.url = f"http://127.0.0.1:{running.server_address[1]}/data.bin"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_the_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("TENFOLD_DATA")
    assert data_root().name == "tenfold"


def test_the_message_for_a_missing_set_says_where_and_what():
    message = str(missing("CIFAR-10", "https://example.org/c.tar.gz", "/data/cifar-10-batches-py", fetchable=True))
    assert all(
        part in message for part in ("CIFAR-10", "https://example.org/c.tar.gz", "/data/cifar", "--data.download")
    )


def test_fetch_verifies_and_keeps(server, tmp_path):
    target = tmp_path / "deep" / "data.bin"
    assert fetch(server.url, target, sha256=SHA256, md5=MD5) == target
    assert target.read_bytes() == CONTENT
    fetch(server.url, target, sha256=SHA256)
    assert server.ranges == [None]  # the second call needs no request
    assert [p.name for p in target.parent.iterdir()] == ["data.bin"]


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.plan = ["break", 503, "break"]
    fetch(server.url, tmp_path / "data.bin", sha256=SHA256, wait=0.01)
    half, three_quarters = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half}-", f"bytes={three_quarters}-"]
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_is_read_from_the_beginning(server, tmp_path):
    server.plan = ["break", "ignore range"]
    fetch(server.url, tmp_path / "data.bin", wait=0.01)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_part_of_an_earlier_call_is_continued_with_a_checksum_alone(server, tmp_path):
    part = tmp_path / "data.bin.part"
    part.write_bytes(CONTENT[:1000])
    fetch(server.url, tmp_path / "data.bin", md5=MD5)
    part.write_bytes(b"of another file")
    fetch(server.url, tmp_path / "unverified.bin")
    assert server.ranges == ["bytes=1000-", None]
    assert (tmp_path / "unverified.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 5), CONTENT])
def test_a_foreign_part_is_thrown_away_and_a_whole_one_used(server, tmp_path, left):
    (tmp_path / "data.bin.part").write_bytes(left)
    fetch(server.url, tmp_path / "data.bin", sha256=SHA256, wait=0.01)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_file_that_stays_truncated_is_an_error(server, tmp_path):
    server.plan = ["break"] * 3
    with pytest.raises(UserError, match=r"could not be fetched .the connection broke.*put it at .*data.bin"):
        fetch(server.url, tmp_path / "data.bin", tries=3, wait=0.01)
    assert not (tmp_path / "data.bin").exists()


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f"wrong checksum .sha256 {SHA256} instead of 00"):
        fetch(server.url, tmp_path / "data.bin", sha256="00")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.bin").write_bytes(b"other")
    with pytest.raises(UserError, match="delete it to fetch it again"):
        fetch(server.url, tmp_path / "data.bin", sha256=SHA256)


def test_what_cannot_be_had_is_said_once(server, tmp_path):
    server.plan = [404]
    with pytest.raises(UserError, match="answered 404"):
        fetch(server.url, tmp_path / "data.bin", wait=0.01)
    assert len(server.ranges) == 1  # asking again would not help
    with pytest.raises(UserError, match=r"127.0.0.1:9/x could not be fetched .*check the connection"):
        fetch("http://127.0.0.1:9/x", tmp_path / "data.bin", tries=2, wait=0.01)
    with pytest.raises(UserError, match="only http"):
        fetch("file:///etc/hostname", tmp_path / "data.bin")


def make_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)  # noqa: PLW2901
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")]
)
def test_tar_archives_and_their_damage(tmp_path, suffix, mode):
    noise = np.random.default_rng(0).bytes(200_000)
    archive = make_tar(tmp_path / f"data.{suffix}", [("a/b.bin", noise), ("a/c.txt", b"c")], mode)
    folder = unpack(archive, tmp_path / "out")
    assert (folder / "a" / "b.bin").read_bytes() == noise
    unpack(archive, folder)  # over what is there
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "b.bin", "c.txt"]

    whole = archive.read_bytes()
    end = 512 * (3 + -(-len(noise) // 512))  # the header of the last member's content in the plain tar
    for cut in (len(whole) // 2, end + 100 if mode == "w" else len(whole) - 5):
        archive.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated or corrupted"):
            unpack(archive, tmp_path / "cut")
        assert list((tmp_path / "cut").iterdir()) == []


def test_a_flipped_bit_is_found_by_the_checksum_behind_the_last_member(tmp_path):
    archive = make_tar(tmp_path / "data.tar.gz", [("a.bin", np.random.default_rng(0).bytes(100_000))])
    content = bytearray(archive.read_bytes())
    content[50_000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="truncated or corrupted"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", b"x")],
        [("a/../../evil", b"x")],
        [("/tmp/evil-tenfold", b"x")],
        [("C:\\evil", b"x")],
        [(special("link", tarfile.SYMTYPE, "../.."), b"")],
        [(special("link", tarfile.SYMTYPE, "/etc"), b""), ("link/evil", b"x")],
        [(special("link", tarfile.LNKTYPE, "../../etc/hostname"), b"")],
        [(special("device", tarfile.CHRTYPE), b"")],
        [(special("pipe", tarfile.FIFOTYPE), b"")],
    ],
)
def test_members_outside_of_the_folder_are_refused(tmp_path, members):
    archive = make_tar(tmp_path / "evil.tar.gz", [("fine.txt", b"fine"), *members])
    with pytest.raises(UserError, match=r"evil.tar.gz is refused"):
        unpack(archive, tmp_path / "in" / "out")
    assert list((tmp_path / "in" / "out").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar.gz", "in"]


def test_zip_archives(tmp_path):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr("a/b.txt", "b" * 1000)
    assert (unpack(archive, tmp_path / "out") / "a" / "b.txt").read_text() == "b" * 1000
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"b" * 1000, b"b" * 999 + b"c"))
    with pytest.raises(UserError, match="truncated or corrupted"):
        unpack(archive, tmp_path / "flipped")
    archive.write_bytes(whole[:500])
    with pytest.raises(UserError, match="truncated or corrupted"):
        unpack(archive, tmp_path / "cut")
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr("../evil", "x")
    with pytest.raises(UserError, match="outside"):
        unpack(archive, tmp_path / "evil")
    with pytest.raises(UserError, match="does not exist"):
        unpack(tmp_path / "none.zip", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/data.bin cannot be written .*TENFOLD_DATA"):
        fetch(server.url, tmp_path / "file" / "data.bin")
    (tmp_path / "data.bin.part").mkdir()
    with pytest.raises(UserError, match=r"data.bin cannot be written"):
        fetch(server.url, tmp_path / "data.bin", sha256=SHA256)
    archive = make_tar(tmp_path / "data.tar.gz", [("a", b"a")])
    with pytest.raises(UserError, match=r"data.tar.gz cannot be unpacked into .*file"):
        unpack(archive, tmp_path / "file")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(RunFailure, match=r"the disk is full"):
        unpack(archive, tmp_path / "out")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    file, marker = tmp_path / "evil.pickle", tmp_path / "ran"
    file.write_bytes(pickle.dumps({"data": Malicious(marker)}, protocol))
    with pytest.raises(UserError, match=r"evil.pickle is refused: it asks for (builtins|__builtin__).exec"):
        restricted_pickle_load(file)
    assert not marker.exists()


def test_a_dotted_name_does_not_reach_around(tmp_path):
    file = tmp_path / "evil.pickle"
    file.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(UserError, match="refused"):
        restricted_pickle_load(file, {"numpy.ndarray.tofile"})


def test_arrays_sparse_matrices_and_python_2_pickles_load(tmp_path):
    file = tmp_path / "data.pickle"
    array = np.arange(6.0).reshape(2, 3)
    for protocol in (2, 4):
        file.write_bytes(pickle.dumps({"a": array, "n": np.int64(3)}, protocol))
        loaded = restricted_pickle_load(file, NUMPY_GLOBALS)
        assert loaded["n"] == 3
        np.testing.assert_array_equal(loaded["a"], array)
        file.write_bytes(pickle.dumps(scipy.sparse.csr_matrix(array), protocol))
        np.testing.assert_array_equal(restricted_pickle_load(file, SCIPY_GLOBALS).toarray(), array)
    # {'data': '\xff'} as Python 2 wrote it, and an array under numpy's earlier module name
    file.write_bytes(b"(dp0\nS'data'\np1\nS'\\xff'\np2\ns.")
    assert restricted_pickle_load(file, encoding="bytes") == {b"data": b"\xff"}
    file.write_bytes(pickle.dumps(array, 2).replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(restricted_pickle_load(file), array)


def test_damaged_and_foreign_pickles_are_named(tmp_path):
    file = tmp_path / "data.pickle"
    file.write_bytes(pickle.dumps(np.arange(100))[:-30])
    with pytest.raises(UserError, match=r"data.pickle is truncated or corrupted"):
        restricted_pickle_load(file)
    file.write_bytes(pickle.dumps(OrderedDict()))
    with pytest.raises(UserError, match=r"asks for collections.OrderedDict"):
        restricted_pickle_load(file)
    with pytest.raises(UserError, match="does not exist"):
        restricted_pickle_load(tmp_path / "none.pickle")
