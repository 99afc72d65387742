"""`Run`: everything around a training loop that is not the paper.

One folder a run: ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/``. A loop reads::

    with Run("bip", config, options) as run:
        model, optimizer = run.prepare(model, optimizer)
        for step in run.steps("train", total, model=model, optimizer=optimizer):
            loss = ...
            run.backward(loss)
            optimizer.step()
            run.log(loss=loss)
        run.save_weights("last", model)

Randomness is a function of (seed, phase, step, process): the generators are seeded anew at every step, so that a run
killed at any moment and resumed takes the very steps of one that was not.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypedDict

import filelock
import numpy as np
import psutil
import torch
import yaml
from torch import Tensor, nn

from .batch_norm import synchronise_batch_norm
from .checkpoint import atomic_write, load_state, load_weights, save_state, save_weights, write_json
from .cli import to_yaml
from .errors import DISK_FULL, Interrupted, RunFailure, UserError
from .progress import Progress
from .provenance import environment
from .tracking import Tracker

logger = logging.getLogger(__name__)
SAME_ON_RESUME = ("seed", "precision", "deterministic")  # what an exact resume needs; the rest may change
FLUSH_SECONDS = 2.0  # how long logged values may stay on the device before they are read, checked and written
SAME_WISH_SECONDS = 1.0  # Ctrl-C reaches a whole terminal, and whoever launched this process passes it on once more


@dataclasses.dataclass
class RunOptions:
    """How to run, apart from what to run."""

    output: Path = Path("runs")
    """Folder under which every run has its own."""
    name: str = ""
    """Name of the run's folder; default: the recipe and the seed."""
    seed: int = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU when there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; fp32 is the reference."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Deterministic CUDA kernels only, so that resuming is exact there too (always so on the CPU)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves every five minutes."""
    tracker: Literal["none", "wandb"] = "none"
    """Experiment tracker that receives the metrics."""
    resume: bool = False
    """Go on with the run of this name where it stopped."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        """Refuse what no run can have."""
        if self.checkpoint_every < 0:
            raise UserError(f"--checkpoint_every takes 0 or more steps, got {self.checkpoint_every}")
        if self.name and not re.fullmatch(r"[\w.=-]+", self.name):
            raise UserError(f"--name {self.name!r}: use letters, digits and . _ = - only, it names a folder")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no usable CUDA device; use --device cpu or auto")


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a fixed function of its parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(*parts: object) -> None:
    """Seed Python, NumPy and torch (every device) from the parts."""
    seed = derived_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    # Without an accelerator torch.manual_seed would still queue a call, with its traceback, for each kind there could be.
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


class Usage(TypedDict):
    """What a run took: wall-clock seconds, and the most memory it held (of the device where that is a GPU)."""

    seconds: float
    peak_memory_bytes: int


class Run:
    """A run's folder, devices and processes, metrics, checkpoints and interruption; a context manager.

    Args:
        slug: the package's short name, ``bip``.
        config: the recipe, a dataclass; saved as ``config.yaml`` together with the options.
        options: how to run.
        parent: the folder of the run; default ``<output>/<slug>``.

    Raises:
        UserError: the folder is in use, or holds a run and ``resume`` is off, or holds another run's configuration.

    """

    def __init__(self, slug: str, config: Any, options: RunOptions, parent: Path | None = None):
        from accelerate import Accelerator  # noqa: PLC0415 - the slowest import of all
        from accelerate.state import AcceleratorState, PartialState  # noqa: PLC0415

        self.slug, self.config, self.options = slug, config, options
        self.directory = (parent or options.output / slug) / (options.name or f"run-seed{options.seed}")
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if PartialState._shared_state:  # one process may make runs of several precisions, one after the other
            AcceleratorState._reset_state()
        precision = "no" if options.precision == "fp32" else options.precision
        self.accelerator = Accelerator(
            cpu=options.device == "cpu", mixed_precision=precision, step_scheduler_with_optimizer=False
        )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self._pending: list[tuple[str, int, float, dict[str, Any]]] = []
        self._stop: int | None = None
        self._stopped = 0.0
        self._state: dict[str, Any] = {}
        self._kept: tuple[str, int, int] | None = None  # phase, step and length of the log of the state on disk
        self._phase, self._step = "", 0
        self._tracked: dict[str, Any] = {}
        self._closed: set[str] = set()

    @classmethod
    @contextlib.contextmanager
    def evaluation(cls, slug: str, options: RunOptions) -> Iterator["Run"]:
        """A run without a folder, for verbs that only read a checkpoint: devices, processes and precision."""
        run = cls(slug, None, options)
        seed_everything(options.seed, "run")
        yield run

    # -- the folder ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        """Lock the folder, write what identifies the run, take the state to resume from."""
        self._lock = filelock.FileLock(self.directory / ".lock", timeout=0)
        if self.is_main:
            self._claim_folder()
        if (
            self.options.resume
        ):  # as it is before any process goes on: what one of them closes from now on is not earlier
            self._closed = {file.stem for file in (self.directory / "checkpoints").glob("*.safetensors")}
        self.accelerator.wait_for_everyone()
        state = self.directory / "checkpoints" / "state.pt"
        try:
            if self.options.resume and state.exists():
                self._state = load_state(state)
                self._kept = (self._state["phase"], self._state["step"], self._state["metrics_bytes"])
            tracked = (self.options.tracker, self.slug, self.directory, self.config)
            self._tracker = Tracker(*tracked) if self.is_main else None
            self._metrics = self._open_metrics() if self.is_main else None
        except BaseException as error:
            self._give_back_folder(error)
            raise
        self._progress = Progress(enabled=self.is_main and not self.options.quiet)
        self._handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: whoever started us handles signals
                break
        self._flushed = self._saved = time.monotonic()
        self._started = self._flushed - self._state.get("seconds", 0.0)  # earlier lives count
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        forget_peak_memory()
        seed_everything(self.options.seed, "run")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Flush the metrics and give everything back."""
        try:
            if not isinstance(error, RunFailure):
                self._flush()
        finally:
            self._progress.close()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._metrics:
                with contextlib.suppress(OSError):  # on a full disk it tries once more, which has been told of
                    self._metrics.close()
            if self._tracker:
                self._tracker.close()
            self._give_back_folder(error)

    def _give_back_folder(self, error: BaseException | None) -> None:
        """Unlock the folder; that of a run refused before a step goes, so that its name is free for the next."""
        if isinstance(error, UserError) and self.is_main and self._fresh and not self._step:
            self._leave_no_folder()
        self._lock.release()

    def _leave_no_folder(self) -> None:
        if (self.directory / "checkpoints").exists():
            return
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "wandb-id", ".lock"):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody's own files are in it
            self.directory.rmdir()

    def _claim_folder(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.directory} is in use by another process; wait for it or choose another --name"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot use {self.directory} as the run's folder: {error.strerror}; choose another --output"
            ) from error
        try:
            self._write_identity()
        except BaseException:
            self._lock.release()
            raise

    def _write_identity(self) -> None:
        for leftover in self.directory.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        saved = self.directory / "config.yaml"
        again = dataclasses.replace(self.options, resume=False, quiet=False)
        text = to_yaml(self.config, again)
        self._fresh = not saved.exists()
        if saved.exists() and not self.options.resume:
            raise UserError(
                f"{self.directory} holds a run already; add --resume to go on with it or choose another --name"
            )
        if saved.exists():
            there = saved.read_text(encoding="utf-8")
            if not there.startswith(to_yaml(self.config)):
                raise UserError(
                    f"{saved} differs from the configuration given; resume with --config {saved} or choose another --name"
                )
            for name, value in (yaml.safe_load(there) or {}).items():
                if name in SAME_ON_RESUME and value != getattr(self.options, name):
                    raise UserError(
                        f"{self.directory} was begun with --{name} {value}: resume it so, or choose another --name"
                    )
        with atomic_write(saved) as file:
            file.write(text.encode())
        write_json(self.directory / "environment.json", environment(self.device))

    def _open_metrics(self) -> Any:
        """The metrics log, cut back to what the checkpoint had seen: later lines are written again."""
        file = (self.directory / "metrics.jsonl").open("ab")
        file.truncate(self._state.get("metrics_bytes", 0))
        file.seek(0, os.SEEK_END)
        return file

    # -- the loop -----------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, channels_last: bool = False) -> Any:
        """Models and optimisers placed on the device, wrapped for processes and precision (see Accelerate).

        ``channels_last``: on a GPU the model's kernels lie as its tensor cores take them, and so do the maps they give.
        """
        return self.accelerator.prepare(*(self._place(item, channels_last) for item in objects))

    def _place(self, item: Any, channels_last: bool) -> Any:
        if isinstance(item, nn.Module):
            item = self.unwrap(item)  # a model goes through several phases
            if channels_last and self.device.type == "cuda":
                item = item.to(memory_format=torch.channels_last)
            item = synchronise_batch_norm(item, self.world, self.device) if self.world > 1 else item
            return torch.compile(item) if self.options.compile else item
        return item

    def steps(self, phase: str, total: int, **tracked: Any) -> Iterator[int]:
        """The steps of a phase still to do, 0-based; ``tracked`` objects (``state_dict``) are restored first.

        A phase that `complete` has closed yields nothing. Between two steps the run checkpoints and answers signals.

        Raises:
            RunFailure: a logged value is not finite.
            Interrupted: a signal came; the state has been saved.

        """
        self._phase, self._step, self._tracked = phase, 0, {}
        if self.completed(phase):
            return
        self._tracked = tracked
        if self._state.get("phase") == phase:
            self._restore(tracked)
        self._progress.start(phase, total, self._step)
        while self._step < total:
            seed_everything(self.options.seed, phase, self._step, self.rank)
            yield self._step
            self._step += 1
            self._progress.advance()
            now = time.monotonic()
            if now - self._flushed > FLUSH_SECONDS:
                self._flush()
            every = self.options.checkpoint_every
            due = self._step % every == 0 if every else now - self._saved > 300
            if due or self._stop is not None:
                self._checkpoint(tracked)
            if self._stop is not None:
                raise Interrupted(self._stop)
        self._checkpoint(tracked)

    def _restore(self, tracked: dict[str, Any]) -> None:
        if set(self._state["tracked"]) != set(tracked):
            raise UserError(
                f"{self.directory}/checkpoints/state.pt was written by another version; start again under another --name"
            )
        for name, item in tracked.items():
            self.unwrap(item).load_state_dict(self._state["tracked"][name])
        if self.accelerator.scaler is not None and "scaler" in self._state:
            self.accelerator.scaler.load_state_dict(self._state["scaler"])
        self._step = self._state["step"]

    def _checkpoint(self, tracked: dict[str, Any]) -> None:
        self._flush()
        self._saved = time.monotonic()
        if self._metrics is None:  # not the main process
            return
        here = (self._phase, self._step, self._metrics.tell())
        if here == self._kept:
            return
        state: dict[str, Any] = {
            "phase": self._phase,
            "step": self._step,
            "seconds": self._saved - self._started,
            "metrics_bytes": here[2],
            "tracked": {name: self.unwrap(item).state_dict() for name, item in tracked.items()},
        }
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        save_state(self.directory / "checkpoints" / "state.pt", state)
        self._kept = here

    def completed(self, phase: str) -> bool:
        """Whether an earlier life of this run closed the phase with `complete`."""
        return phase in self._closed

    def complete(self, phase: str, model: nn.Module, **metadata: Any) -> dict[str, Any]:
        """Close a phase: keep the model's weights and plain ``metadata`` as its outcome, or load what was kept.

        Returns the metadata: the given one, or, when a resumed run had closed the phase before, the kept one.
        """
        path = self.directory / "checkpoints" / f"{phase}.safetensors"
        if self.completed(phase):
            tensors, kept = load_weights(path)
            self.unwrap(model).load_state_dict(tensors)
            return kept
        if self._tracked:  # the log is whole as of this state: a later resume cuts nothing of it
            self._checkpoint(self._tracked)
        self._flush()
        self.save_weights(phase, model, **metadata)
        self.accelerator.wait_for_everyone()
        for held in (self.accelerator._models, self.accelerator._optimizers):  # they would keep every phase's
            held.clear()  # free_memory() would also collect all garbage, a third of a second
        self._tracked = {}
        return metadata

    def save_weights(self, name: str, model: nn.Module, **metadata: Any) -> Path:
        """Write ``checkpoints/<name>.safetensors`` (from the main process) and return its path."""
        path = self.directory / "checkpoints" / f"{name}.safetensors"
        if self.is_main:
            save_weights(path, self.unwrap(model).state_dict(), metadata)
        return path

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled where the precision asks for it."""
        if self.accelerator.scaler is None:
            loss.backward()  # Accelerate would look for other engines at every step
        else:
            self.accelerator.backward(loss)

    def log(self, **values: Tensor | float) -> None:
        """Record values of this step; tensors stay on the device until they are flushed, so nothing waits."""
        held = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        if self._pending and self._pending[-1][:2] == (self._phase, self._step):
            self._pending[-1][3].update(held)
        else:
            self._pending.append((self._phase, self._step, time.monotonic() - self._started, held))

    def logged(self, phase: str, name: str) -> list[float]:
        """Every value logged under a name in a phase, in the order of the steps, earlier lives of the run included."""
        self._flush()
        self.accelerator.wait_for_everyone()
        lines = (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = (line for line in map(json.loads, lines) if line["phase"] == phase and name in line)
        return [line[name] for line in found]

    def reduce(self, value: Tensor, how: Literal["sum", "mean"] = "sum") -> Tensor:
        """A tensor summed or averaged over the processes; as it is when there is one."""
        return self.accelerator.reduce(value, how) if self.world > 1 else value

    def usage(self) -> "Usage":
        """Seconds that the run took, earlier lives up to their last checkpoint included, and this life's peak memory in
        bytes (of the device where it is a GPU).
        """
        on_gpu = self.device.type == "cuda"
        peak = float(torch.cuda.max_memory_allocated()) if on_gpu else peak_memory()
        return {"seconds": time.monotonic() - self._started, "peak_memory_bytes": int(peak)}

    def unwrap(self, item: Any) -> Any:
        """The module itself, without what `prepare` put around it."""
        return self.accelerator.unwrap_model(item, keep_torch_compile=False) if isinstance(item, nn.Module) else item

    def _flush(self) -> None:
        """Read the pending values (the one place that waits for the device), check and write them."""
        pending, self._pending = self._pending, []
        self._flushed = time.monotonic()
        for phase, step, seconds, held in pending:
            values = {name: float(value) for name, value in held.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise RunFailure(
                        f"{name} became {value} at step {step} of phase {phase} in {self.directory}; the last checkpoint "
                        "is kept: lower the learning rate, or look at the data of that step"
                    )
            if self._metrics:
                line = {"phase": phase, "step": step, "seconds": round(seconds, 3), **values}
                with self._told_if_full():
                    self._metrics.write((json.dumps(line) + "\n").encode())
            if self._tracker:
                self._tracker.log({f"{phase}/{name}": value for name, value in values.items()})
        if pending:
            self._progress.show(values)
        if self._metrics:
            with self._told_if_full():
                self._metrics.flush()

    @contextlib.contextmanager
    def _told_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in DISK_FULL else error.strerror
            raise RunFailure(
                f"cannot write {self.directory / 'metrics.jsonl'}: {reason}; free some space and resume with --resume"
            ) from error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop is not None and now - self._stopped > SAME_WISH_SECONDS:
            raise KeyboardInterrupt  # the second time: do not wait for the step
        self._stop, self._stopped = number, now


def peak_memory() -> float:
    """The most memory this process has held so far, or since `forget_peak_memory`, in bytes."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415 - not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew: one process may make several runs. Only Linux can; elsewhere it stays the process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
