"""What every package's tests use: the conformance suite, and networks without values.

A package's ``tests/test_conformance.py`` is::

    class TestConformance(tenfold_shared.testing.Conformance):
        package = "tenfold_bip"
        train = ["--config", "digits-cnn", "--dense.epochs", "2", "--bilevel.epochs", "3"]
        reproduce = ["mini-keep-5", "--arms", "snip", "--seeds", "1"]
        needs_data = ["--config", "cifar10-resnet18"]

Each test runs the installed command in a process of its own, as a user would.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import yaml

from .checkpoint import load_state, load_weights
from .claims import Outcome, load_claims
from .cli import recipes
from .reproduction import committed_outcomes

TIMEOUT = 600  # seconds; a command that takes longer is stuck, however busy the machine


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Networks built here have no values, only shapes: to count the parameters of large ones."""
    linspace = functools.partial(torch.linspace, device="cpu")  # timm before 1.0.21 reads numbers off it
    with torch.device("meta"), mock.patch.object(torch, "linspace", linspace):
        yield


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str


class _Bomb:
    """Unpickling it would create the file it names."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


class Conformance:
    """How the command of every package behaves; subclass it with the package's own arguments."""

    package: ClassVar[str]
    train: ClassVar[list[str]]
    """Arguments of a training run of a few seconds and at least eight steps, on the embedded data."""
    reproduce: ClassVar[list[str]]
    """Arguments of a reproduction of a few seconds, at least two seeds."""
    needs_data: ClassVar[list[str]]
    """Arguments of a training run whose data set is not embedded."""
    processes_tolerance: ClassVar[float] = 1e-4
    """How far two processes may end from one, relative to the largest weight (float32)."""
    phase: ClassVar[str] = "last"
    """The checkpoint to compare."""
    eval_options: ClassVar[list[str]] = []
    """Further arguments that evaluating a checkpoint needs."""

    @property
    def slug(self) -> str:
        """The package's short name."""
        return self.package.removeprefix("tenfold_")

    # helpers

    def start(
        self, folder: Path, *arguments: str, launcher: list[str] | None = None, preexec: Callable | None = None
    ) -> subprocess.Popen:
        """The command, started in ``folder`` with an empty data root."""
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # sums in one order, whoever calls
        environment = {**os.environ, **threads, "TENFOLD_DATA": str(folder / "data"), "COLUMNS": "100"}
        command = [sys.executable, *(launcher or []), "-m", self.package, *arguments]
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,  # noqa: PLW1509 - sets a limit and nothing else
        )

    def call(self, folder: Path, *arguments: str, **options: Any) -> Finished:
        """The command in a process of its own, run to its end."""
        process = self.start(folder, *arguments, **options)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"{' '.join(arguments)} did not end in {TIMEOUT} s:\n{out}\n{err}")
        return Finished(process.returncode, out, err)

    def quick(self, folder: Path, *arguments: str) -> Finished:
        """The command inside this process, for what needs no process of its own: it saves importing torch again."""
        module = importlib.import_module(f"{self.package}.cli")
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setenv("TENFOLD_DATA", str(folder / "data"))
            patch.setattr(sys, "argv", [f"tenfold-{self.slug}", *arguments])
            patch.chdir(folder)
            try:
                module.main()
            except SystemExit as leaving:
                code = int(leaving.code or 0)
        return Finished(code, out.getvalue(), err.getvalue())

    def train_arguments(self, name: str, *more: str) -> list[str]:
        """The training run under a name, on the CPU, with a checkpoint at every second step."""
        return ["train", *self.train, "--name", name, "--device", "cpu", "--checkpoint-every", "2", *more]

    def weights(self, folder: Path, name: str) -> dict[str, torch.Tensor]:
        """The weights that a run ended with."""
        tensors, _ = load_weights(self.checkpoints(folder, name) / f"{self.phase}.safetensors")
        return tensors

    def checkpoints(self, folder: Path, name: str) -> Path:
        """The checkpoint folder of a run."""
        return folder / "runs" / self.slug / name / "checkpoints"

    @staticmethod
    def refused(done: Finished, code: int, *words: str) -> None:
        """The command ended with ``code`` and one sentence that has the words in it."""
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.code == code, f"exit {done.code}, expected {code}:\n{done.out}\n{done.err}"
        assert "Traceback" not in done.err, done.err
        assert len(lines) == 1, done.err
        for word in words:
            assert word in lines[0], f"{word!r} is not in: {lines[0]}"

    @staticmethod
    def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
        """Bit for bit the same weights."""
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{name} differs by {(tensor - right[name]).abs().max()}"

    def wait_for_checkpoint(self, folder: Path, name: str, process: subprocess.Popen) -> None:
        """Return once the run has written its first checkpoint."""
        state = self.checkpoints(folder, name) / "state.pt"
        deadline = time.monotonic() + TIMEOUT
        while not state.exists():
            if process.poll() is not None:
                pytest.fail(f"the run ended before its first checkpoint:\n{process.communicate()}")
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.01)

    @pytest.fixture
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder in which the training run ``whole`` has ended undisturbed; the same for all tests."""
        return self._once("trained", lambda: self._train(tmp_path_factory))

    @pytest.fixture
    def killed(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder in which the same run was killed with SIGKILL at a random moment after its first checkpoint."""
        return self._once("killed", lambda: self._kill(tmp_path_factory))

    @classmethod
    def _once(cls, name: str, make: Callable[[], Path]) -> Path:
        if name not in cls.__dict__.get("_made", {}):
            cls._made = {**cls.__dict__.get("_made", {}), name: make()}
        return cls._made[name]

    _made: ClassVar[dict[str, Path]] = {}

    def _train(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        done = self.call(folder, *self.train_arguments("whole"))
        assert done.code == 0, done.err
        return folder

    def _kill(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("killed")
        process = self.start(folder, *self.train_arguments("whole"))
        self.wait_for_checkpoint(folder, "whole", process)
        time.sleep(random.random() / 4)
        process.send_signal(signal.SIGSTOP)  # while it lives, the folder is its own
        self.refused(self.quick(folder, *self.train_arguments("whole", "--resume")), 2, "in use")
        process.kill()
        process.communicate()
        ended = self.checkpoints(folder, "whole") / f"{self.phase}.safetensors"
        assert not ended.exists(), "it ended too early to be killed: give the suite a longer training run"
        return folder

    # the command line

    def test_help(self, tmp_path: Path) -> None:
        """Every verb explains itself, and every option of each."""
        done = self.call(tmp_path, "--help")
        assert done.code == 0, done.err
        for verb in ("train", "eval", "reproduce", "claims", "recipes"):
            assert f"\n  {verb}" in done.out
        for verb in ("train", "eval", "reproduce"):
            done = self.quick(tmp_path, verb, "--help")
            assert done.code == 0, done.err
            assert "--output" in done.out
            assert "--seed" in done.out
        for verb in importlib.import_module(f"{self.package}.cli").COMMANDS:
            shown = self.quick(tmp_path, verb, "--help").out
            bare = re.findall(r"^  (-{0,2}\w+)(?: \S+)*(?: {2,}|\n {20,})\((?:required, )?type:", shown, re.MULTILINE)
            assert not bare, f"{verb} --help does not explain {', '.join(bare)}"

    def test_claims_and_recipes_are_listed(self, tmp_path: Path) -> None:
        """Both lists name everything that is shipped."""
        done = self.quick(tmp_path, "recipes")
        assert done.code == 0, done.err
        for name in recipes(self.package):
            assert f"{name} " in done.out
        done = self.quick(tmp_path, "claims")
        assert done.code == 0, done.err
        for claim in load_claims(self.package).claims:
            assert claim.id in done.out

    def test_refused_arguments(self, tmp_path: Path) -> None:
        """Unknown verbs, options and recipes, options of another verb and wrong types, each with its name."""
        self.refused(self.quick(tmp_path, "trian"), 2, "trian", "did you mean 'train'")
        self.refused(self.quick(tmp_path, "train", "--outpt", "x"), 2, "--outpt", "did you mean '--output'")
        self.refused(self.quick(tmp_path, "train", "--checkpoint", "x"), 2, "--checkpoint", "option of eval")
        self.refused(self.quick(tmp_path, "train", *self.train, "--seed", "many"), 2, "--seed", "int", "many")
        self.refused(self.quick(tmp_path, "train", "--config", "no-such-recipe"), 2, "no-such-recipe")
        assert not (tmp_path / "runs").exists()

    def test_unknown_key_in_a_file(self, tmp_path: Path) -> None:
        """A key that does not exist is refused with its full name and its file."""
        recipe = self.train[self.train.index("--config") + 1]
        values = yaml.safe_load(recipes(self.package)[recipe].read_text(encoding="utf-8"))
        values["no_such_key"] = 1
        file = tmp_path / "own.yaml"
        file.write_text(yaml.safe_dump(values))
        self.refused(self.quick(tmp_path, "train", "--config", str(file)), 2, "no_such_key", str(file))

    def test_printed_configuration_is_a_recipe(self, tmp_path: Path) -> None:
        """``--print_config`` writes a file that ``--config`` reads to the same effect."""
        first = self.quick(tmp_path, "train", *self.train, "--print_config")
        assert first.code == 0, first.err
        (tmp_path / "printed.yaml").write_text(first.out)
        second = self.quick(tmp_path, "train", "--config", "printed.yaml", "--print_config")
        assert second.out == first.out

    def test_every_recipe_is_read(self, tmp_path: Path) -> None:
        """Each recipe shipped is valid for the training verb."""
        for name in recipes(self.package):
            done = self.quick(tmp_path, "train", "--config", name, "--print_config")
            assert done.code == 0, done.err

    # data

    def test_missing_data(self, tmp_path: Path) -> None:
        """A data set that is not there: where to get it and where to put it."""
        self.refused(self.quick(tmp_path, "train", *self.needs_data, "--device", "cpu"), 2, str(tmp_path / "data"))

    # a run

    def test_run_folder(self, trained: Path) -> None:
        """A run leaves its configuration, environment, metrics and weights; no temporary file, nothing elsewhere."""
        folder = self.checkpoints(trained, "whole").parent
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0
        assert json.loads((folder / "environment.json").read_text())["packages"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {"phase", "step", "seconds"} <= set(lines[0])
        assert self.weights(trained, "whole")
        assert not list(folder.rglob("*.tmp"))
        assert [path.name for path in trained.iterdir()] == ["runs"]
        self.refused(self.quick(trained, *self.train_arguments("whole")), 2, "--resume")

    def test_a_run_that_has_ended_stays_as_it_is(self, trained: Path) -> None:
        """Resuming it does no step again."""
        log = trained / "runs" / self.slug / "whole" / "metrics.jsonl"
        steps, weights = log.read_text(), self.weights(trained, "whole")
        done = self.quick(trained, *self.train_arguments("whole", "--resume"))
        assert done.code == 0, done.err
        assert log.read_text() == steps
        self.same(weights, self.weights(trained, "whole"))

    def test_saved_configuration_runs_again(self, trained: Path, tmp_path: Path) -> None:
        """The saved configuration is enough to run again, to the same weights."""
        config = self.checkpoints(trained, "whole").parent / "config.yaml"
        done = self.call(tmp_path, "train", "--config", str(config))
        assert done.code == 0, done.err
        self.same(self.weights(tmp_path, "whole"), self.weights(trained, "whole"))

    def test_kill_and_resume(self, trained: Path, killed: Path, tmp_path: Path) -> None:
        """Killed with SIGKILL at a random moment and resumed: bit for bit the same weights and metrics."""
        shutil.copytree(killed / "runs", tmp_path / "runs")
        done = self.call(tmp_path, *self.train_arguments("whole", "--resume"))
        assert done.code == 0, done.err
        self.same(self.weights(tmp_path, "whole"), self.weights(trained, "whole"))

        def metrics(folder: Path) -> list[dict]:
            lines = (self.checkpoints(folder, "whole").parent / "metrics.jsonl").read_text().splitlines()
            return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]

        assert metrics(tmp_path) == metrics(trained)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal(self, tmp_path: Path, number: signal.Signals) -> None:
        """Ctrl-C and SIGTERM save and leave with 130 and 143."""
        process = self.start(tmp_path, *self.train_arguments("stopped"))
        self.wait_for_checkpoint(tmp_path, "stopped", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
        self.refused(Finished(process.returncode, out, err), 128 + number, "--resume")

    def test_two_processes_follow_one(self, trained: Path, tmp_path: Path) -> None:
        """Two gloo processes with half the batch each end where the single process does."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = self.call(tmp_path, *self.train_arguments("whole"), launcher=launcher)
        assert done.code == 0, done.err
        one, two = self.weights(trained, "whole"), self.weights(tmp_path, "whole")
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            if tensor.is_floating_point():
                difference = (tensor - two[name]).abs().max().item()
                assert difference <= self.processes_tolerance * max(1.0, tensor.abs().max().item()), (
                    f"{name}: {difference}"
                )

    def test_full_disk(self, killed: Path, tmp_path: Path) -> None:
        """A disk that fills up (a file-size limit stands in): one sentence, and the earlier checkpoint is whole."""
        shutil.copytree(killed / "runs", tmp_path / "runs")
        state = self.checkpoints(tmp_path, "whole") / "state.pt"
        before = state.read_bytes()

        def limit() -> None:
            import resource  # noqa: PLC0415 - not on every platform

            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

        done = self.call(tmp_path, *self.train_arguments("whole", "--resume"), preexec=limit)
        self.refused(done, 1, "disk is full", "--resume")
        assert state.read_bytes() == before
        assert load_state(state)["step"] > 0
        assert not list(tmp_path.rglob("*.tmp"))

    def test_broken_checkpoints(self, trained: Path, tmp_path: Path) -> None:
        """Truncated, bit-flipped and malicious checkpoints are refused by name; nothing in them runs."""
        good = (self.checkpoints(trained, "whole") / f"{self.phase}.safetensors").read_bytes()
        truncated, flipped, bomb = tmp_path / "short.safetensors", tmp_path / "flip.safetensors", tmp_path / "bomb.pt"
        truncated.write_bytes(good[: len(good) // 2])
        flipped.write_bytes(flip(good, len(good) - len(good) // 4))
        bomb.write_bytes(pickle.dumps(_Bomb(tmp_path / "pwned")))
        for file in (truncated, flipped, bomb):
            self.refused(self.quick(tmp_path, "eval", "--checkpoint", str(file), *self.eval_options), 2, file.name)
        assert not (tmp_path / "pwned").exists()

    def test_broken_state(self, killed: Path, tmp_path: Path) -> None:
        """A damaged ``state.pt`` is refused by name."""
        shutil.copytree(killed / "runs", tmp_path / "runs")
        state = self.checkpoints(tmp_path, "whole") / "state.pt"
        good = state.read_bytes()
        for damaged in (good[: len(good) // 2], flip(good, *(len(good) * i // 16 for i in range(4, 12)))):
            state.write_bytes(damaged)
            self.refused(self.quick(tmp_path, *self.train_arguments("whole", "--resume")), 2, "state.pt")

    def test_evaluates_own_checkpoint(self, trained: Path) -> None:
        """A run folder and a weights file evaluate to the same."""
        run = self.checkpoints(trained, "whole").parent
        by_run = self.quick(trained, "eval", "--checkpoint", str(run), *self.eval_options)
        assert by_run.code == 0, by_run.err
        file = self.checkpoints(trained, "whole") / f"{self.phase}.safetensors"
        by_file = self.quick(trained, "eval", "--checkpoint", str(file), *self.eval_options)
        assert by_file.out == by_run.out != ""

    # claims

    def test_claims_name_recipes_that_exist(self) -> None:
        """Every arm of every claim names a recipe that is shipped."""
        known = recipes(self.package)
        for claim in load_claims(self.package).claims:
            for arm in claim.arms.values():
                assert arm.recipe in known, f"{claim.id}: {arm.recipe}"

    def test_committed_results_are_outcomes(self) -> None:
        """Every outcome the package ships is about a claim of the package and states its verdict."""
        claims = {claim.id for claim in load_claims(self.package).claims}
        for outcome in committed_outcomes(self.package):
            assert outcome.claim in claims

    def test_reproduce(self, tmp_path: Path) -> None:
        """Reproducing writes a valid outcome and a report of one file without network access, and resumes."""
        done = self.call(tmp_path, "reproduce", *self.reproduce)
        assert done.code == 0, done.err
        results = next((tmp_path / "runs" / self.slug).rglob("results.json"))
        outcomes = [Outcome.from_json(json.dumps(item)) for item in json.loads(results.read_text())["outcomes"]]
        assert outcomes
        for outcome in outcomes:
            assert outcome.claim in done.out
            assert outcome.verdict in done.out
        page = results.with_name("report.html").read_text()
        assert "<img" in page or "<svg" in page
        assert 'src="http' not in page
        assert 'href="//' not in page
        self.refused(self.quick(tmp_path, "reproduce", *self.reproduce), 2, "--resume")
        done = self.quick(tmp_path, "reproduce", *self.reproduce, "--resume", "--jobs", "1")
        assert done.code == 0, done.err
        again = [Outcome.from_json(json.dumps(item)) for item in json.loads(results.read_text())["outcomes"]]
        assert [outcome.arms for outcome in again] == [outcome.arms for outcome in outcomes]


def flip(content: bytes, *places: int) -> bytes:
    """The content with one bit flipped in the byte at each place."""
    changed = bytearray(content)
    for at in places:
        changed[at] ^= 64
    return bytes(changed)
