"""The statistics over paired seeds, the verdict on a claim, and running the arms of one.

`load_claims` reads the cells of the paper (see `tenfold_shared.tables`); `measured_arm` measures an arm of one with
paired seeds; the `Outcome` says what was measured, how sure it is, and which of four verdicts follows.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from tenfold_shared.checkpoint import write_json, write_text
from tenfold_shared.errors import RunFailure, UserError
from tenfold_shared.tables import Arm, Claim, ClaimSet, Metric, Paper, load_claims, read_claims

__all__ = [
    "Arm",
    "ArmResult",
    "Claim",
    "ClaimSet",
    "Comparison",
    "Interval",
    "Measurement",
    "Metric",
    "Outcome",
    "Paper",
    "Verdict",
    "load_claims",
    "mean_interval",
    "measured_arm",
    "paired_interval",
    "read_claims",
    "summarise",
    "verdict",
]  # fmt: skip

Verdict = Literal["reproduced", "direction holds", "inconclusive", "not reproduced"]

SCHEMA = 1
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # from the best to the worst


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its Student-t interval; `low` and `high` are None for fewer than two values, `mean`
    for none.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None

    @property
    def off_zero(self) -> bool:
        """Whether the interval exists and leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Two-sided Student-t interval of the mean of independent values."""
    n = len(values)
    if n == 0:
        return Interval(0, None, None, None)
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(1, mean, None, None)
    from scipy.special import stdtrit  # noqa: PLC0415  - a slow import that only a finished measurement needs

    half = float(stdtrit(n - 1, (1 + level) / 2)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def paired_interval(method: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Interval:
    """Student-t interval of the mean of method minus baseline, whose entries are paired by seed. ValueError for unequal
    lengths.
    """
    if len(method) != len(baseline):
        raise ValueError(
            f"paired values differ in number: {len(method)} of the method, {len(baseline)} of the baseline"
        )
    return mean_interval([a - b for a, b in zip(method, baseline, strict=True)], level)


def verdict(
    difference: Interval,
    own: Interval,
    *,
    scale: str,
    metric: Metric,
    paper_method: float | None = None,
    paper_baseline: float | None = None,
) -> Verdict:
    """The verdict on method against baseline.

    `difference` is the paired interval in the metric's direction (positive: the method is better), `own` the interval
    of the method's value.

    - reproduced: the method beats the baseline with the interval off zero, as it does in the paper, and `own` contains
      the paper's value or lies on its better side; never at the miniature's scale, never without a published value.
    - direction holds: the method beats the baseline with the interval off zero.
    - inconclusive: the interval includes zero, or there is none.
    - not reproduced: the baseline beats the method with the interval off zero.

    A claim about one value is judged by that value alone, see `_overall`.
    """
    if difference.low is None or difference.high is None or not difference.off_zero:
        return "inconclusive"
    if difference.high < 0:
        return "not reproduced"
    if scale == "mini" or paper_method is None or own.low is None or own.high is None:
        return "direction holds"
    sign = 1 if metric.higher_is_better else -1
    contains_or_better = own.high >= paper_method if metric.higher_is_better else own.low <= paper_method
    published_direction = paper_baseline is None or sign * (paper_method - paper_baseline) >= 0
    return "reproduced" if contains_or_better and published_direction else "direction holds"


@dataclass(frozen=True)
class Measurement:
    """What one arm gave with one seed. A value that is None or not finite is a failed seed; `error` says why.

    `seconds` is wall time (None: `measured_arm` takes the time of the call), `peak_memory_bytes` of the device, `extras`
    whatever else the figures need, in JSON's types.
    """

    value: float | None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether there is no usable value."""
        return self.value is None or not math.isfinite(self.value)


@dataclass(frozen=True)
class ArmResult:
    """One arm over all seeds, in the order of `Outcome.seeds`. `mean`, `std` (n - 1) and the interval are over the `n`
    seeds that gave a value.
    """

    name: str
    paper: float | None
    values: tuple[float | None, ...]
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    seconds: tuple[float | None, ...]
    peak_memory_bytes: tuple[int | None, ...]
    extras: tuple[Mapping[str, Any], ...]
    errors: tuple[str | None, ...]


@dataclass(frozen=True)
class Comparison:
    """The method against one baseline. Differences are paired by seed and positive where the method is better; None
    where a seed failed.
    """

    baseline: str
    differences: tuple[float | None, ...]
    mean: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured for one claim. `label` says what was really run where that is not the claim's data
    as published.
    """

    package: str
    claim: str
    scale: str
    method: str
    seeds: tuple[int, ...]
    arms: Mapping[str, ArmResult]
    comparisons: tuple[Comparison, ...]
    verdict: Verdict
    reason: str
    config_hash: str
    commit: str | None
    created: str
    label: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def failed_seeds(self) -> int:
        """How many (arm, seed) runs gave no value."""
        return sum(value is None for arm in self.arms.values() for value in arm.values)

    def to_json(self) -> str:
        """Strict JSON (no NaN): a failed seed's value is null."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the outcome") -> "Outcome":
        """The outcome that `to_json` wrote. UserError for another schema or a damaged file."""
        try:
            content = json.loads(text)
            if content.get("schema") != SCHEMA:
                raise UserError(
                    f"{where} has schema {content.get('schema')!r}, this version reads {SCHEMA}: run `reproduce` again"
                )
            content["seeds"] = tuple(content["seeds"])
            content["arms"] = {name: ArmResult(**_tuples(arm)) for name, arm in content["arms"].items()}
            content["comparisons"] = tuple(Comparison(**_tuples(comparison)) for comparison in content["comparisons"])
            outcome = cls(**content)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{where} is no outcome of `reproduce` ({error}): run it again") from error
        if outcome.verdict not in VERDICTS:
            raise UserError(f"{where} has the verdict {outcome.verdict!r}: it is one of {', '.join(VERDICTS)}")
        return outcome

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Outcome":
        """Read the JSON file that `save` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}): run `reproduce` to write it") from error


def measured_arm(
    claim: Claim, arm: Arm, seed: int, measure: Callable[[Arm, int], Measurement], directory: Path
) -> Measurement:
    """What one arm gives with one seed, measured or, where it is there already, read again.

    The result is kept as ``directory/<claim id>/<arm>-seed<k>.json`` as soon as it is there, so an interrupted
    reproduction goes on where it was; one measured with another recipe or other options is measured again. A
    `RunFailure` of ``measure`` is a failed seed; any other error propagates.
    """
    file = directory / claim.id / f"{arm.name}-seed{seed}.json"
    kept = _kept(file, arm.key)
    if kept is not None:
        return kept
    result = _measured(measure, arm, seed)
    write_json(file, {"key": arm.key, **_plain(asdict(result))})
    return result


def summarise(
    claim: Claim,
    results: Mapping[str, Sequence[Measurement]],
    seeds: Sequence[int],
    *,
    label: str = "",
    package: str = "",
    environment: Mapping[str, Any],
) -> Outcome:
    """The outcome of measurements already made: `results[arm][i]` belongs to `seeds[i]`."""
    arms = {name: _arm_result(claim, claim.arms[name], results[name]) for name in claim.arms}
    comparisons = tuple(_compare(claim, arms[claim.method], arms[baseline.name], seeds) for baseline in claim.baselines)
    overall, reason = _overall(claim, arms[claim.method], comparisons)
    return Outcome(
        package=package,
        claim=claim.id,
        scale=claim.scale,
        method=claim.method,
        seeds=tuple(seeds),
        arms=arms,
        comparisons=comparisons,
        verdict=overall,
        reason=reason,
        config_hash=claim.key,
        commit=environment.get("commit"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        label=label,
        environment=_plain(environment),
    )


def _measured(measure: Callable[[Arm, int], Measurement], arm: Arm, seed: int) -> Measurement:
    started = time.perf_counter()
    try:
        result = measure(arm, seed)
    except RunFailure as failure:
        result = Measurement(None, error=str(failure))
    if result.failed:
        result = replace(result, value=None, error=result.error or f"the value is {result.value}")
    else:
        result = replace(result, value=_plain(result.value))
    if result.seconds is None:
        result = replace(result, seconds=time.perf_counter() - started)
    return replace(result, extras=_plain(result.extras))


def _kept(file: Path, key: str) -> Measurement | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("key") != key:
            return None
        return Measurement(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or left damaged by a failing disk: it is measured again


def _interval(claim: Claim, values: Sequence[float]) -> Interval:
    """The interval of the mean; a point where the claim says that nothing is drawn at random and one value is there."""
    found = mean_interval(values)
    return Interval(1, found.mean, found.mean, found.mean) if claim.deterministic and found.n == 1 else found


def _arm_result(claim: Claim, arm: Arm, results: Sequence[Measurement]) -> ArmResult:
    values = tuple(None if result.failed else result.value for result in results)
    finite = [value for value in values if value is not None]
    interval = _interval(claim, finite)
    return ArmResult(
        name=arm.name,
        paper=arm.paper,
        values=values,
        n=interval.n,
        mean=interval.mean,
        std=statistics.stdev(finite) if interval.n > 1 else None,
        low=interval.low,
        high=interval.high,
        seconds=tuple(result.seconds for result in results),
        peak_memory_bytes=tuple(result.peak_memory_bytes for result in results),
        extras=tuple(_plain(result.extras) for result in results),
        errors=tuple(result.error for result in results),
    )


def _compare(claim: Claim, method: ArmResult, baseline: ArmResult, seeds: Sequence[int]) -> Comparison:
    sign = 1 if claim.metric.higher_is_better else -1
    pairs = list(zip(method.values, baseline.values, strict=True))
    differences = tuple(None if a is None or b is None else sign * (a - b) for a, b in pairs)
    interval = _interval(claim, [difference for difference in differences if difference is not None])
    failed = [
        f"{arm.name} seed {seed}"
        for arm in (method, baseline)
        for seed, v in zip(seeds, arm.values, strict=True)
        if v is None
    ]
    decided: Verdict
    if failed:
        # Judging by the seeds that survived would reward an arm for diverging on the hard ones.
        decided, reason = "inconclusive", f"incomplete pairs: {', '.join(failed)} failed"
    else:
        own = Interval(method.n, method.mean, method.low, method.high)
        decided = verdict(
            interval,
            own,
            scale=claim.scale,
            metric=claim.metric,
            paper_method=method.paper,
            paper_baseline=baseline.paper,
        )
        reason = _reason(decided, claim, method, baseline, interval)
    return Comparison(baseline.name, differences, interval.mean, interval.low, interval.high, decided, reason)


def _reason(decided: Verdict, claim: Claim, method: ArmResult, baseline: ArmResult, interval: Interval) -> str:
    if interval.low is None:
        return "one seed gives no interval: run two or more"
    if decided == "inconclusive":
        tie = f"{method.name} and {baseline.name} tie"
        return tie if claim.deterministic else f"the interval over {interval.n} seeds includes zero"
    sure = "" if claim.deterministic else " with the interval off zero"
    if decided == "not reproduced":
        return f"{baseline.name} beats {method.name}{sure}"
    ahead = f"{method.name} beats {baseline.name}{sure}"
    if decided == "reproduced":
        return f"{ahead}, at the paper's value or better"
    if claim.scale == "mini":
        return f"{ahead}; the data is the miniature"
    if method.paper is None:
        return f"{ahead}; no published value to compare with"
    sign = 1 if claim.metric.higher_is_better else -1
    if baseline.paper is not None and sign * (method.paper - baseline.paper) < 0:
        return f"{ahead}; in the paper {baseline.name} is ahead"
    return f"{ahead}; the value is below the paper's" if sign > 0 else f"{ahead}; the value is above the paper's"


def _overall(claim: Claim, method: ArmResult, comparisons: Sequence[Comparison]) -> tuple[Verdict, str]:
    """The worst of the verdicts per baseline; a claim without a baseline is about the value alone.

    Such a value is to be the paper's or better, or the paper's within `Metric.tolerance` where that is given:
    reproduced if the mean is, inconclusive if its interval reaches there.
    """
    if comparisons:
        worst = max(comparisons, key=lambda comparison: VERDICTS.index(comparison.verdict))
        return worst.verdict, worst.reason if len(comparisons) == 1 else f"against {worst.baseline}: {worst.reason}"
    if None in method.values:
        return "inconclusive", f"{method.values.count(None)} of {len(method.values)} seeds failed"
    if method.mean is None or method.low is None or method.high is None:
        return "inconclusive", "one seed gives no interval: run two or more"
    if claim.scale == "mini" or method.paper is None:
        return "inconclusive", "no baseline, and no published value at this scale to compare with"
    if claim.metric.tolerance is not None:
        return _equal(claim.metric.tolerance, method.paper, method.mean, (method.low, method.high))
    if method.high >= method.paper if claim.metric.higher_is_better else method.low <= method.paper:
        return "reproduced", "at the paper's value or better"
    return "not reproduced", "the paper's value lies on the better side of the interval"


def _equal(tolerance: float, paper: float, mean: float, own: tuple[float, float]) -> tuple[Verdict, str]:
    """The verdict on a mean that is to be the paper's value, neither better nor worse; `own` is its interval."""
    allowed = tolerance + 1e-9 * abs(paper)  # 0.05 more than 5.0 is not exactly 5.05
    if abs(mean - paper) <= allowed:
        return "reproduced", "the paper's value" if tolerance == 0 else f"within {tolerance:g} of the paper's value"
    missed = f"the mean is {abs(mean - paper):.3g} {'above' if mean > paper else 'below'} the paper's value"
    if own[0] - allowed <= paper <= own[1] + allowed:
        return "inconclusive", f"{missed}, which its interval reaches"
    return "not reproduced", missed


def _plain(content: Any) -> Any:
    """The content in JSON's types; numbers that JSON lacks become null."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if hasattr(content, "tolist"):  # an array or a tensor
        return _plain(content.tolist())
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
