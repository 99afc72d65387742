"""The reader of parity fixtures."""

import json
from pathlib import Path

import numpy as np
import pytest

from tenfold_shared.parity import check_parity, load_fixture


@pytest.mark.parametrize("entry", ["cfg/json", "cfg/meta", "meta"])
def test_options_are_read_wherever_they_stand(entry: str, tmp_path: Path) -> None:
    arrays = {entry: json.dumps({"width": 4}), "state/a/weight": np.ones(2), "state/b": np.zeros(1)}
    np.savez(tmp_path / "case.npz", kind=["net"], **arrays)
    fixture = load_fixture(tmp_path / "case.npz")
    assert (fixture.kind, fixture.meta) == ("net", {"width": 4})
    assert list(fixture.under("state/")) == ["a/weight", "b"]
    fixture["state/b"].fill_(7)  # a tensor of its own
    assert fixture["state/b"].tolist() == [0]
    assert "state/c" not in fixture


def test_a_fixture_is_given_to_the_check_of_its_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", kind="odd")
    seen = []
    check_parity(tmp_path / "odd.npz", {"odd": seen.append})
    assert [(fixture.kind, fixture.meta) for fixture in seen] == [("odd", {})]
    with pytest.raises(AssertionError, match=r"odd\.npz is of the unknown kind 'odd'"):
        check_parity(tmp_path / "odd.npz", {"even": seen.append})
