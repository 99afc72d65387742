"""Commands built from functions."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Literal

import pytest

from tenfold_shared.cli import Command, as_trained, given, load_recipe, run_command, to_yaml
from tenfold_shared.errors import Interrupted, RunFailure, UserError

sys.path.insert(0, str(Path(__file__).parent / "toy"))
CALLS: list[dict] = []


@dataclasses.dataclass
class Inner:
    """Inner."""

    lr: float = 0.1
    """Learning rate."""


@dataclasses.dataclass
class Settings:
    """Settings."""

    epochs: int = 3
    """Passes over the data."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    fast: bool = False
    """Whether to hurry."""
    names: list[str] = dataclasses.field(default_factory=list)
    """Some names."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    """The inner settings."""
    size: int | list[int] | None = None
    """How large, if at all."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"--epochs takes 1 or more, got {self.epochs}")


def work(*items: str, settings: Settings, limit: float = 1.0) -> None:
    CALLS.append({"items": items, "settings": settings, "limit": limit})


def other(path: Path) -> None:
    CALLS.append({"path": path})


def fail(how: str) -> None:
    raise {"user": UserError("bad data"), "run": RunFailure("it broke"), "stop": Interrupted(15), "bug": KeyError("x")}[
        how
    ]


COMMANDS = {name: Command(f"{__name__}:{name}", f"does {name}") for name in ("work", "other", "fail")}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[work.__module__])
    CALLS.clear()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        run_command("toy", COMMANDS, arguments)
    return int(leaving.value.code or 0)


def test_options_reach_the_function(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 7\ninner: {lr: 0.5}\nkind: b\n")
    arguments = ["x", "y", "--epochs", "9", "--config", str(file), "--fast", "--names", "p,q", "--limit", "2"]
    assert call("work", *arguments) == 0
    assert [{"items": ("x", "y"), "settings": Settings(9, "b", True, ["p", "q"], Inner(0.5)), "limit": 2.0}] == CALLS


def test_dashes_and_required_options() -> None:
    assert call("other", "--path", "here") == 0
    assert [{"path": Path("here")}] == CALLS
    assert call("other") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wrk"], ["no verb 'wrk'", "did you mean 'work'"]),
        (["work", "--epoch", "3"], ["unknown option --epoch", "did you mean '--epochs'"]),
        (["work", "--lrr", "3"], ["unknown option --lrr", "did you mean '--inner.lr'"]),
        (["work", "--inner.lrr", "3"], ["unknown option --inner.lrr", "--inner.lr"]),
        (["work", "--path", "x"], ["unknown option --path", "option of other"]),
        (["work", "--epochs", "many"], ["--epochs takes int", "'many'"]),
        (["work", "--kind", "c"], ["--kind takes one of a, b, got 'c'"]),
        (["work", "--epochs", "0"], ["--epochs takes 1 or more, got 0"]),
        (["work", "--size", "wide"], ["--size takes int or list[int] or null, got 'wide'"]),
        (["work", "--config", "nowhere"], ["nowhere", "neither a file nor a recipe"]),
    ],
)
def test_refusals_are_one_sentence(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert call(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inner: {lrr: 1}", ["unknown key 'inner.lrr'", "did you mean 'inner.lr'"]),
        ("epochs: [", ["own.yaml", "YAML"]),
        ("- 1", ["expected keys"]),
        ("epochs: null", ["'epochs' takes int, got null"]),
        ("names: null", ["'names' takes list[str], got null"]),
        ("inner: {lr: null}", ["'inner.lr' takes float, got null"]),
        ("inner: null", ["'inner' takes keys and values, got null"]),
        ("inner: [1]", ["'inner' takes keys and values, got [1]"]),
    ],
)
def test_refused_files(text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert call("work", "--config", str(tmp_path / "own.yaml")) == 2
    message = capsys.readouterr().err
    with pytest.raises(UserError) as refused:
        load_recipe("tenfold_toy", str(tmp_path / "own.yaml"), Settings)
    for word in words:
        assert word in message
        assert word in str(refused.value)


def test_exit_codes(capsys: pytest.CaptureFixture) -> None:
    assert call("fail", "--how", "user") == 2
    assert call("fail", "--how", "run") == 1
    assert call("fail", "--how", "stop") == 143
    assert "Traceback" not in capsys.readouterr().err
    assert call("fail", "--how", "user", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(KeyError):  # a bug is not dressed up
        run_command("toy", COMMANDS, ["fail", "--how", "bug"])


def test_warnings_of_ours_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other packages stay as Python shows them."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        run_command("toy", {}, ["--help"])
    ours, others = (f"site-packages/{package}/data.py" for package in ("tenfold_toy", "torch"))
    assert warnings.formatwarning("two rows were merged.", UserWarning, ours, 7) == "note: two rows were merged.\n"
    assert "torch/data.py:7: UserWarning: two rows" in warnings.formatwarning("two rows", UserWarning, others, 7)


def test_help_names_every_verb(capsys: pytest.CaptureFixture) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in (*COMMANDS, "claims", "recipes"))


def test_recipes_load_with_changes(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("epochs: 7\ninner: {lr: 0.5}\n")
    assert load_recipe("tenfold_toy", str(file), Settings, **{"inner.lr": 2.0}) == Settings(7, inner=Inner(2.0))
    for changes in ({"inner.lrr": 2.0}, {"epoch": 1}):
        with pytest.raises(UserError, match="unknown key"):
            load_recipe("tenfold_toy", str(file), Settings, **changes)
    with pytest.raises(UserError, match="epochs"):
        load_recipe("tenfold_toy", str(file), Settings, epochs="many")


def test_yaml_of_settings_is_read_back(tmp_path: Path) -> None:
    settings = Settings(4, "b", True, ["x"], Inner(0.25))
    (tmp_path / "own.yaml").write_text(to_yaml(settings))
    assert load_recipe("tenfold_toy", str(tmp_path / "own.yaml"), Settings) == settings


@dataclasses.dataclass
class Images:
    """Options of a data set."""

    name: str = "small"
    root: Path | None = None
    size: int = 32


@dataclasses.dataclass
class OtherImages:
    """What is to differ from them."""

    name: str | None = None
    size: int | None = None


def test_what_is_not_asked_for_is_as_it_was_trained() -> None:
    trained = {"name": "large", "root": "there", "size": 8}
    assert as_trained(Images, trained, OtherImages()) == Images("large", Path("there"), 8)
    assert as_trained(Images, trained, OtherImages(name="large", size=32)) == Images("large", Path("there"), 32)
    assert as_trained(Images, trained, OtherImages(name="small")) == Images()
    assert as_trained(Images, {}, OtherImages()) == Images()
    assert as_trained(Images, {}, OtherImages(name="large")) == Images("large")
    assert given(OtherImages(size=0)) == {"size": 0}
