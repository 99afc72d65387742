"""`reproduce`: the arms of the claims with paired seeds, several at a time, then the verdicts and the report page."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import filelock
import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table

from .checkpoint import write_json, write_text
from .claims import (
    Arm,
    Claim,
    Measurement,
    Metric,
    Outcome,
    load_claims,
    mean_interval,
    measured_arm,
    paired_interval,
    summarise,
)
from .cli import config_digest, to_yaml
from .errors import Interrupted, RunFailure, UserError
from .progress import Progress
from .provenance import environment
from .report import ReportFigure, console_table, markdown_table, write_report
from .run import RunOptions


class Measure(Protocol):
    """A package's function that measures one arm with one seed; importable by name, since processes call it."""

    def __call__(self, claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
        """What came out; ``folder`` is for this reproduction's runs."""
        raise NotImplementedError


@dataclasses.dataclass
class Request:
    """What to reproduce."""

    scale: Literal["mini", "gpu", "paper"] = "mini"
    """Which claims when none is named: the embedded miniature, those for one GPU, or the paper's."""
    seeds: int = 0
    """Seeds per arm, counted from --seed; 0 takes as many as each claim states."""
    arms: list[str] = dataclasses.field(default_factory=list)
    """Arms to run besides the claim's method; all when none is named."""
    jobs: int = 0
    """Arms measured at the same time; 0 runs one per core on the CPU and one on a GPU."""
    strict: bool = False
    """Exit with 1 unless every claim is reproduced or its direction holds."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.seeds < 0 or self.jobs < 0:
            raise UserError(f"--seeds and --jobs take 0 or more, got {self.seeds} and {self.jobs}")


def reproduce_claims(
    slug: str,
    claim_ids: Sequence[str],
    request: Request,
    options: RunOptions,
    measure: Measure,
    figures: Callable[[Sequence[Claim], Sequence[Outcome], Path], list[ReportFigure]],
) -> list[Outcome]:
    """Run the arms of the chosen claims, write ``results.json``, ``results.md`` and ``report.html``, print the table.

    ``results/`` holds each outcome in a file of its own, in the form in which outcomes are committed to a package.
    Every finished (arm, seed) is kept at once, so that an interrupted call goes on where it was with ``--resume``.

    Raises:
        UserError: unknown claims or arms, or a folder that holds results already.
        RunFailure: with ``strict``, a claim that does not hold.

    """
    claim_set = load_claims(f"tenfold_{slug}")
    chosen = [
        _restrict(claim, request.arms) for claim in claim_set.select(claim_ids, None if claim_ids else request.scale)
    ]
    folder = options.output / slug / (options.name or f"reproduce-{'-'.join(claim_ids) or request.scale}")
    with _locked(folder, options):
        results = measure_all(chosen, request, options, measure, folder)
        where = environment(torch.device("cuda" if _on_gpu(options) else "cpu"))
        outcomes = []
        for claim in chosen:
            seeds = _seeds(claim, request, options)
            table = {arm: [results[claim.id, arm, seed] for seed in seeds] for arm in claim.arms}
            outcome = summarise(claim, table, seeds, package=slug, environment=where)
            if claim_set[claim.id].baselines and not claim.baselines:  # the value alone is not what is claimed
                outcome = dataclasses.replace(outcome, verdict="inconclusive", reason="no baseline was run (--arms)")
            outcomes.append(outcome)
        for outcome in outcomes:
            outcome.save(folder / "results" / f"{outcome.claim}.json")
        write_json(folder / "results.json", {"outcomes": [json.loads(outcome.to_json()) for outcome in outcomes]})
        write_text(folder / "results.md", markdown_table(claim_set, outcomes) + "\n")
        drawn = figures(chosen, outcomes, folder)
        write_report(folder / "report.html", claim_set, outcomes, drawn, where["command"], where)
    Console(width=None if sys.stdout.isatty() else 160).print(console_table(claim_set, outcomes))
    print(f"report: {folder / 'report.html'}")
    failed = [o.claim for o in outcomes if o.verdict not in ("reproduced", "direction holds")]
    if request.strict and failed:
        raise RunFailure(f"{', '.join(failed)}: the claim does not hold here (--strict); see {folder / 'report.html'}")
    return outcomes


def _restrict(claim: Claim, arms: Sequence[str]) -> Claim:
    for arm in arms:
        if arm not in claim.arms:
            raise UserError(f"--arms {arm}: claim {claim.id} has the arms {', '.join(claim.arms)}")
    kept = {name: arm for name, arm in claim.arms.items() if not arms or name in arms or name == claim.method}
    return dataclasses.replace(claim, arms=kept)


def _seeds(claim: Claim, request: Request, options: RunOptions) -> list[int]:
    return [options.seed + i for i in range(request.seeds or claim.seeds)]


def _on_gpu(options: RunOptions) -> bool:
    return options.device != "cpu" and torch.cuda.is_available()


@contextlib.contextmanager
def _locked(folder: Path, options: RunOptions) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}; choose another --output") from error
    begun = (folder / "arms").exists()
    if begun and not options.resume:
        raise UserError(
            f"{folder} holds results already; add --resume to keep what is measured or choose another --name"
        )
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process; wait for it or choose another --name") from None
    except OSError as error:
        raise UserError(f"cannot use {folder}: {error.strerror}; choose another --output") from error
    try:
        _keep_to_one_arithmetic(folder, options, begun)
        yield
    finally:
        lock.release()


def _keep_to_one_arithmetic(folder: Path, options: RunOptions, begun: bool) -> None:
    """Refuse to mix precisions or kinds of device in one folder: its measurements are compared with one another."""
    file, now = folder / "arithmetic.json", f"{options.precision} on {'cuda' if _on_gpu(options) else 'cpu'}"
    if begun and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != now:
            raise UserError(f"{folder} was measured in {before}, not in {now}: go on in that or choose another --name")
    else:
        write_json(file, now)


def measure_all(
    claims: Sequence[Claim], request: Request, options: RunOptions, measure: Measure, folder: Path
) -> dict[tuple[str, str, int], Measurement]:
    """Every (claim, arm, seed), seed-major, so that pairs complete together."""
    tasks = [
        (claim, arm, seed)
        for claim in claims
        for seed in _seeds(claim, request, options)
        for arm in claim.arms.values()
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(request.jobs or (1 if _on_gpu(options) else cores), len(tasks))
    progress = Progress(enabled=not options.quiet)
    progress.start("arms", len(tasks))
    inner = dataclasses.replace(options, quiet=jobs > 1 or options.quiet, resume=True, name="")
    results: dict[tuple[str, str, int], Measurement] = {}

    def note(claim: Claim, arm: Arm, seed: int, result: Measurement) -> None:
        results[claim.id, arm.name, seed] = result
        shown = "failed" if result.value is None else f"{result.value:.4g}"
        progress.note(
            f"{claim.id} {arm.name} seed {seed}: {shown} {claim.metric.unit if result.value is not None else result.error}"
        )
        progress.advance()

    try:
        if jobs == 1:
            for claim, arm, seed in tasks:
                note(claim, arm, seed, _measure_one(measure, claim, arm, seed, inner, folder))
        else:
            with _pool(jobs) as pool:
                futures: dict[Future, tuple[Claim, Arm, int]] = {
                    pool.submit(_Worker.measure_one, measure, claim, arm, seed, inner, folder): (claim, arm, seed)
                    for claim, arm, seed in tasks
                }
                for future in as_completed(futures):
                    note(*futures[future], future.result())
    except BrokenProcessPool as error:
        raise RunFailure(
            "a process that measured was killed, most often for want of memory; what is measured is kept: go on with "
            "--resume and fewer --jobs"
        ) from error
    finally:
        progress.close()
    return results


def _measure_one(measure: Measure, claim: Claim, arm: Arm, seed: int, options: RunOptions, folder: Path) -> Measurement:
    call = functools.partial(measure, claim, options=dataclasses.replace(options, seed=seed), folder=folder)
    return measured_arm(claim, arm, seed, call, folder / "arms")


class _Worker:
    """A process of the pool. A signal stops what it measures (a `Run` saves first) and all that would come after."""

    busy = False
    stopped: int | None = None

    @classmethod
    def start(cls, threads: int) -> None:
        torch.set_num_threads(threads)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls.on_signal)

    @classmethod
    def on_signal(cls, number: int, frame: FrameType | None) -> None:
        cls.stopped = number
        if cls.busy:  # between two arms it holds the lock of the queue, with which it must not die
            raise Interrupted(number)

    @classmethod
    def measure_one(cls, *task: Any) -> Measurement:
        cls.busy = True
        try:
            if cls.stopped is not None:
                raise Interrupted(cls.stopped)
            return _measure_one(*task)
        except (Interrupted, KeyboardInterrupt) as interruption:
            cls.stopped = getattr(interruption, "signal_number", signal.SIGINT)
            raise
        finally:
            cls.busy = False


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes with their share of the threads; a signal reaches them all, and they end in their own time."""
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_Worker.start, initargs=(threads,)
    )

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        pool.shutdown(wait=True, cancel_futures=True)


def once(name: str, folder: Path, measure: Callable[[], Measurement]) -> Measurement:
    """The measurement of that name in a reproduction's folder, made by whoever needs it first: claims share arms."""
    file = folder / "measured" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, dataclasses.asdict(measure()))
        return Measurement(**json.loads(file.read_text(encoding="utf-8")))


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def compare_points(
    slug: str,
    verb: str,
    recipe: Any,
    points: Sequence[dict[str, Any]],
    metric: Metric,
    request: Request,
    options: RunOptions,
    measure: Measure,
    also: Callable[[Sequence[Measurement]], dict[str, Any]] = lambda _: {},
) -> None:
    """Run a recipe with each set of changed values; print and keep the table, best point first.

    ``<verb>.json`` in the folder ``<verb>-<name>`` has of every point the values by seed, their mean and its interval,
    the paired difference to the first of the points, and what ``also`` says of its measurements.
    """
    if not points or request.seeds < 1:
        raise UserError(
            f"{verb} takes one point and one seed or more, got {len(points)} points and {request.seeds} seeds"
        )
    folder = options.output / slug / f"{verb}-{options.name or 'recipe'}"
    path, digest = str(folder / "recipe.yaml"), config_digest(recipe)
    arms = {
        f"point-{i}": Arm(f"point-{i}", recipe=path, options=point, recipe_sha256=digest)
        for i, point in enumerate(points)
    }
    claim = Claim(
        id=verb, table="", statement="", data="", model="", scale="mini", provenance="none",
        metric=metric, method="point-0", arms=arms, seeds=request.seeds,
    )  # fmt: skip
    with _locked(folder, options):
        write_text(folder / "recipe.yaml", to_yaml(recipe))
        results = measure_all([claim], request, options, measure, folder)
    seeds = _seeds(claim, request, options)
    first = [results[verb, "point-0", seed].value for seed in seeds]
    rows = []
    for name, point in zip(arms, points, strict=True):
        found = [results[verb, name, seed] for seed in seeds]
        values = [measured.value for measured in found]
        pairs = [(a, b) for a, b in zip(values, first, strict=True) if a is not None and b is not None]
        mean = mean_interval([value for value in values if value is not None])
        difference = paired_interval([a for a, _ in pairs], [b for _, b in pairs])
        intervals = {**dataclasses.asdict(mean), "against_first": dataclasses.asdict(difference)}
        rows.append({**point, "values": values, **intervals, **also(found)})
    worst = -math.inf if metric.higher_is_better else math.inf
    rows.sort(key=lambda row: worst if row["mean"] is None else row["mean"], reverse=metric.higher_is_better)
    unit = f", {metric.unit}" if metric.unit else ""
    content = {
        "recipe": yaml.safe_load(to_yaml(recipe)),
        "metric": f"{metric.name}{unit}",
        "seeds": seeds,
        "points": rows,
    }
    write_json(folder / f"{verb}.json", content)
    for row in rows:
        print(json.dumps(row))
    print(f"written to {folder / f'{verb}.json'}")


def results_folder(package: str) -> Path:
    """Where the measured outcomes of a package lie: inside the wheel, or beside ``src`` in a source tree."""
    inside = Path(str(resources.files(package) / "results"))
    return inside if inside.is_dir() else inside.parents[2] / "results"


def committed_outcomes(package: str) -> list[Outcome]:
    """The outcomes that the package ships."""
    return [Outcome.load(path) for path in sorted(results_folder(package).glob("*.json"))]


def show_claims(package: str) -> None:
    """Print the paper's tables: every claim, the paper's values, what has been measured and what measuring takes."""
    claim_set = load_claims(package)
    measured = {outcome.claim: outcome for outcome in committed_outcomes(package)}
    table = Table(title=f"{claim_set.paper.title}: {claim_set.summary}", show_lines=True)
    for column in ("id", "claim", "arms (paper)", "scale, seeds, cost", "measured here"):
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    for claim in claim_set.claims:
        arms = ", ".join(f"{a.name} ({'unknown' if a.paper is None else f'{a.paper:g}'})" for a in claim.arms.values())
        source = {"seen": "", "recalled": " recalled", "none": " no published value"}[claim.provenance]
        outcome = measured.get(claim.id)
        table.add_row(
            claim.id,
            f"{claim.statement}\n{claim.model} on {claim.data} ({claim.table})",
            f"{arms} {claim.metric.unit}{source}",
            f"{claim.scale}, {claim.seeds} seeds, {claim.cost or 'cost unknown'}",
            "not yet" if outcome is None else f"{outcome.verdict}: {outcome.reason}",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table, highlight=False, markup=False)
