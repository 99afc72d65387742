"""Atomic writes and safe loads."""

import argparse
import contextlib
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_shared.checkpoint import (
    atomic_write,
    load_pickled,
    load_state,
    load_weights,
    save_state,
    save_weights,
    write_json,
)
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.testing import flip

TENSORS = {"weight": torch.randn(7, 5), "count": torch.tensor(3), "mask": torch.ones(9, dtype=torch.uint8)}


def test_weights_round_trip_with_their_metadata(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", TENSORS, {"arch": "net", "keep": 0.1, "sizes": [1, 2]})
    tensors, metadata = load_weights(tmp_path / "w.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert metadata == {"arch": "net", "keep": 0.1, "sizes": [1, 2]}


def test_tensors_that_share_storage_are_kept(tmp_path: Path) -> None:
    shared = torch.randn(6)
    save_weights(tmp_path / "w.safetensors", {"a": shared, "b": shared, "part": shared[:3]})
    tensors, _ = load_weights(tmp_path / "w.safetensors")
    assert torch.equal(tensors["b"], shared)
    assert torch.equal(tensors["part"], shared[:3])


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 0.999))
def test_any_flipped_bit_in_weights_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float) -> None:
    file = tmp_path_factory.mktemp("flip") / "w.safetensors"
    save_weights(file, TENSORS, {"keep": 0.1})
    good = file.read_bytes()
    file.write_bytes(flip(good, int(where * len(good))))
    with contextlib.suppress(UserError):  # unless the bit was in the white space that pads the header
        tensors, metadata = load_weights(file)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert metadata == {"keep": 0.1}


def test_state_round_trips(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    optimiser = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimiser.step()
    save_state(tmp_path / "state.pt", {"step": 3, "tracked": {"optimiser": optimiser.state_dict()}})
    state = load_state(tmp_path / "state.pt")
    assert state["step"] == 3
    assert torch.equal(state["tracked"]["optimiser"]["state"][0]["exp_avg"], optimiser.state[parameter]["exp_avg"])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"a": Path("x")}), pickle.dumps([1, 2])])
def test_files_that_are_no_state_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt"):
        load_state(file)


FAULTS = {
    b"nothing here": r"is truncated or corrupted \(Unsupported operand 110\): it was not loaded",
    b"": r"is truncated or corrupted \(EOFError\): it was not loaded",
    pickle.dumps({"a": Path("x")}, 2): "holds an object of [a-z]+[.]\\w+, not only tensors and plain values",
}


@pytest.mark.parametrize(("content", "said"), FAULTS.items())
def test_what_is_wrong_is_one_sentence_without_advice_to_load_it_all_the_same(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        load_pickled(tmp_path / "bad.pth")
    assert len(str(refused.value)) < len(str(tmp_path)) + 150
    assert "weights_only" not in str(refused.value)


def test_objects_that_are_allowed_are_loaded(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(depth=4)}, tmp_path / "released.pth")
    with pytest.raises(UserError, match=r"an object of argparse\.Namespace"):
        load_pickled(tmp_path / "released.pth")
    assert load_pickled(tmp_path / "released.pth", [argparse.Namespace])["args"].depth == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere"):
        load_weights(tmp_path / "nowhere")


def _write_until_full(file: Path) -> None:
    with atomic_write(file) as stream:
        stream.write(b"half")
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"a": 1})
    before = file.read_bytes()
    with pytest.raises(RunFailure, match="intact"):
        _write_until_full(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_json(tmp_path / "ours.json", 1)
    (tmp_path / "other").write_text("1")
    assert (tmp_path / "ours.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write into .*file: .*choose another folder"):
        write_json(tmp_path / "file" / "x.json", 1)
