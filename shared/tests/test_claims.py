"""Reading claims, the interval and its error rates, the four verdicts, and resumption."""

import json
import math

import numpy as np
import pytest
import yaml
from scipy import stats

from tenfold_shared.claims import (
    Interval,
    Measurement,
    Metric,
    Outcome,
    mean_interval,
    measured_arm,
    paired_interval,
    read_claims,
    summarise,
    verdict,
)
from tenfold_shared.errors import RunFailure, UserError

CONTENT = {
    "package": "demo",
    "title": "A Demonstration",
    "paper": {"arxiv": "0000.00000", "venue": "Nowhere 2022", "authors": ["A. Author"]},
    "headline": "main",
    "summary": "the method is better",
    "claims": [
        {
            "id": "main",
            "table": "Table 1",
            "statement": "better than the baseline",
            "data": "digits",
            "model": "mlp",
            "scale": "paper",
            "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
            "provenance": "seen",
            "method": "ours",
            "arms": {
                "ours": {"paper": 95.0, "recipe": "digits", "options": {"keep": 0.2}},
                "theirs": {"paper": 94.0, "recipe": "digits", "options": {"keep": 0.2, "method": "omp"}},
            },
        }
    ],
}


def claim_set(folder, **changes):
    """The demonstration's claims with keys of its one claim replaced (None removes one)."""
    content = json.loads(json.dumps(CONTENT))
    entry = content["claims"][0]
    entry.update(changes)
    for key in [key for key, value in entry.items() if value is None]:
        del entry[key]
    folder.mkdir(exist_ok=True)
    (folder / "claims.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_claims(folder)


@pytest.fixture
def claim(tmp_path):
    return claim_set(tmp_path / "demo")["main"]


def outcome_of(claim, ours, theirs):
    results = {"ours": [Measurement(v) for v in ours], "theirs": [Measurement(v) for v in theirs]}
    return summarise(claim, results, range(len(ours)), environment={})


def test_claims_are_read_with_defaults(claim):
    assert claim.seeds == 3
    assert not claim.deterministic
    assert claim.metric == Metric("accuracy", "%", True)
    assert [arm.name for arm in claim.baselines] == ["theirs"]
    assert claim.arms["ours"].paper == 95.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tabel": 1}, "unknown key 'tabel'; did you mean 'table'"),
        ({"table": None}, "the key 'table' is missing"),
        ({"method": "our"}, "method 'our' is no arm; did you mean 'ours'"),
        ({"provenance": "sean"}, "provenance is 'sean'.*; did you mean 'seen'"),
        ({"provenance": "none"}, "yet an arm has a paper value"),
        ({"scale": "tiny"}, "scale is 'tiny'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"deterministic": "no"}, "deterministic is 'no'"),
        ({"id": "../x"}, "the id names a folder"),
        ({"arms": {"ours": {"paper": "1e-5"}}}, "paper is '1e-5'"),
        ({"arms": {"ours": {"paper": 1.0}}, "metric": {"name": "n", "tolerance": -1}}, "tolerance is -1"),
        ({"metric": {"name": "n", "tolerance": 0.5}}, "leave out the other arms"),
        ({"arms": {"ours": {"option": {}}}}, "arm ours: unknown key 'option'; did you mean 'options'"),
        ({"metric": {"name": "x", "unti": "%"}}, "metric: unknown key 'unti'; did you mean 'unit'"),
    ],
)
def test_a_mistake_in_claims_yaml_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        claim_set(tmp_path / "demo", **changes)


def test_unknown_claims_and_scales_are_refused(tmp_path):
    claims = claim_set(tmp_path / "demo")
    assert [c.id for c in claims.select(["main"], "paper")] == ["main"]
    with pytest.raises(UserError, match="did you mean 'main'"):
        claims.select(["mian"])
    with pytest.raises(UserError, match="at scale 'mini'"):
        claims.select(scale="mini")


def test_the_interval_is_scipys(claim):
    rng = np.random.default_rng(0)
    method, baseline = rng.normal(size=(2, 7))
    expected = stats.ttest_rel(method, baseline).confidence_interval(0.95)
    interval = paired_interval(list(method), list(baseline))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean_interval([2.0]) == Interval(1, 2.0, None, None)
    with pytest.raises(ValueError, match="1 of the method, 2 of the baseline"):
        paired_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_coverage_and_false_verdicts_are_five_percent(n):
    """Arms with a common seed effect and no difference. 4,000 repetitions: +-0.0138 is four standard deviations."""
    rng = np.random.default_rng(n)
    common = rng.normal(scale=3.0, size=(4000, n, 1))
    values = 90 + common + rng.normal(size=(4000, n, 2))
    metric = Metric("accuracy")
    verdicts = []
    for pair in values:
        difference = paired_interval(pair[:, 0].tolist(), pair[:, 1].tolist())
        own = mean_interval(pair[:, 0].tolist())
        verdicts.append(verdict(difference, own, scale="paper", metric=metric, paper_method=None))
    tolerance = 4 * math.sqrt(0.05 * 0.95 / 4000)
    inconclusive = verdicts.count("inconclusive") / 4000
    assert inconclusive == pytest.approx(0.95, abs=tolerance)
    # no preference for either side
    one_sided = 4 * math.sqrt(0.025 * 0.975 / 4000)
    assert verdicts.count("direction holds") / 4000 == pytest.approx(0.025, abs=one_sided)
    assert verdicts.count("not reproduced") / 4000 == pytest.approx(0.025, abs=one_sided)


LOSS = {"name": "loss", "higher_is_better": False}
AHEAD = {"ours": {"paper": 95.0}, "theirs": {"paper": 96.0}}
UNPUBLISHED = {"provenance": "none", "arms": {"ours": {}, "theirs": {}}}
ROWS = [
    # ours, theirs, changes of the claim, verdict
    ([94.9, 95.2, 95.1], [94.0, 94.1, 94.1], {}, "reproduced"),  # our interval contains the paper's
    ([97.9, 98.2, 98.1], [94.0, 94.1, 94.1], {}, "reproduced"),  # better than the paper
    ([92.9, 93.2, 93.1], [92.0, 92.1, 92.1], {}, "direction holds"),  # the value is below
    ([94.9, 95.2, 95.1], [94.0, 94.1, 94.1], {"scale": "mini"}, "direction holds"),
    ([94.9, 95.2, 95.1], [94.0, 94.1, 94.1], UNPUBLISHED, "direction holds"),
    ([94.9, 95.2, 95.1], [95.0, 95.1, 95.2], {}, "inconclusive"),
    ([94.9], [90.0], {}, "inconclusive"),  # one seed
    ([95.0], [90.0], {"deterministic": True}, "reproduced"),  # nothing is drawn: one measurement says all
    ([94.9], [90.0], {"deterministic": True}, "direction holds"),
    ([90.0], [94.9], {"deterministic": True}, "not reproduced"),
    ([95.0], [95.0], {"deterministic": True}, "inconclusive"),  # a tie
    ([94.0, 94.1, 94.1], [94.9, 95.2, 95.1], {}, "not reproduced"),
    ([94.0, 94.1, 94.1], [96.9, 96.2, 96.1], {"metric": LOSS, "arms": AHEAD}, "reproduced"),
    ([94.9, 95.2, 95.1], [94.0, 94.1, 94.1], {"metric": LOSS}, "not reproduced"),
    # the paper has the baseline ahead: beating it is no reproduction
    (
        [94.9, 95.2, 95.1],
        [94.0, 94.1, 94.1],
        {"arms": AHEAD},
        "direction holds",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "changes", "expected"), ROWS)
def test_verdict_rows(tmp_path, ours, theirs, changes, expected):
    outcome = outcome_of(claim_set(tmp_path / "demo", **changes)["main"], ours, theirs)
    assert outcome.verdict == expected
    assert outcome.comparisons[0].verdict == expected
    assert outcome.reason


def test_reasons_say_what_keeps_a_direction_from_being_a_reproduction(tmp_path):
    def reason(name: str, **changes: object) -> str:
        return outcome_of(claim_set(tmp_path / name, **changes)["main"], [92.9, 93.2, 93.1], [92.0, 92.1, 92.1]).reason

    assert reason("new", **UNPUBLISHED).endswith("no published value to compare with")
    assert reason("below").endswith("the value is below the paper's")
    assert reason("mini", scale="mini").endswith("the data is the miniature")
    assert reason("turned", arms=AHEAD).endswith("in the paper theirs is ahead")


def test_differences_point_in_the_direction_of_the_metric(tmp_path):
    claim = claim_set(tmp_path / "demo", metric={"name": "loss", "higher_is_better": False})["main"]
    comparison = outcome_of(claim, [1.0, 1.1], [2.0, 2.3]).comparisons[0]
    assert comparison.differences == pytest.approx((1.0, 1.2))


def test_a_failed_seed_is_counted_and_forbids_a_verdict(claim):
    outcome = outcome_of(claim, [95.0, 95.1, 95.2, math.nan], [90.0, 90.1, 90.3, 90.0])
    assert outcome.failed_seeds == 1
    assert outcome.arms["ours"].n == 3
    assert outcome.comparisons[0].differences[3] is None
    assert outcome.verdict == "inconclusive"
    assert "ours seed 3 failed" in outcome.reason


def test_the_overall_verdict_is_the_worst(tmp_path):
    arms = {"ours": {"paper": 95.0}, "weak": {"paper": 90.0}, "strong": {"paper": 94.0}}
    claim = claim_set(tmp_path / "demo", arms=arms)["main"]
    values = {"ours": [95.0, 95.1, 95.2], "weak": [90.0, 90.2, 90.1], "strong": [97.0, 97.2, 97.1]}
    outcome = summarise(claim, {k: [Measurement(x) for x in v] for k, v in values.items()}, [0, 1, 2], environment={})
    assert [c.verdict for c in outcome.comparisons] == ["reproduced", "not reproduced"]
    assert outcome.verdict == "not reproduced"
    assert outcome.reason.startswith("against strong: ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([94.9, 95.2], "reproduced"), ([90.0, 90.1, 90.1], "not reproduced"), ([95.0], "inconclusive")],
)
def test_a_claim_without_a_baseline_is_about_the_value(tmp_path, values, expected):
    claim = claim_set(tmp_path / "demo", arms={"ours": {"paper": 95.0}})["main"]
    outcome = summarise(claim, {"ours": [Measurement(v) for v in values]}, range(len(values)), environment={})
    assert outcome.verdict == expected


COUNTS = [
    # values, tolerance, changes of the claim, verdict
    ([95.04, 95.03], 0.05, {}, "reproduced"),
    ([95.05], 0.05, {"deterministic": True}, "reproduced"),  # the edge of what rounds to it
    ([94.7, 94.8], 0.05, {}, "inconclusive"),  # two values of which the interval is wide
    ([96.0, 96.1, 96.0, 96.1], 0.05, {}, "not reproduced"),  # more is not better
    ([94.0, 94.1, 94.0, 94.1], 0.05, {}, "not reproduced"),
    ([95], 0, {"deterministic": True}, "reproduced"),
    ([96], 0, {"deterministic": True}, "not reproduced"),
    ([95.0], 0.05, {}, "inconclusive"),  # one seed of something drawn at random
]  # fmt: skip


@pytest.mark.parametrize(("values", "tolerance", "changes", "expected"), COUNTS)
def test_a_count_is_to_be_the_papers_within_its_tolerance(tmp_path, values, tolerance, changes, expected):
    metric = {"name": "parameters", "tolerance": tolerance}
    counted = claim_set(tmp_path / "demo", arms={"ours": {"paper": 95.0}}, metric=metric, **changes)["main"]
    outcome = summarise(counted, {"ours": [Measurement(v) for v in values]}, range(len(values)), environment={})
    assert outcome.verdict == expected


def test_json_round_trip(claim, tmp_path):
    results = {
        "ours": [Measurement(95.0, 1.5, 1024, {"curve": [1.0, math.inf]}), Measurement(None, error="loss is NaN")],
        "theirs": [Measurement(94.0), Measurement(94.5)],
    }
    outcome = summarise(
        claim, results, [3, 4], label="digits", package="demo", environment={"commit": "abc", "gpus": [1]}
    )
    assert outcome.commit == "abc"
    json.loads(outcome.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Outcome.from_json(outcome.to_json()) == outcome
    outcome.save(tmp_path / "deep" / "main.json")
    assert Outcome.load(tmp_path / "deep" / "main.json") == outcome
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["main.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "seeds": [1], "arms": {}}'])
def test_damaged_outcomes_are_refused(text):
    with pytest.raises(UserError, match="there"):
        Outcome.from_json(text, "there")


def run_arms(claim, measure, seeds, directory):
    """What a reproduction does, one arm after the other."""
    results = {name: [] for name in claim.arms}
    for seed in seeds:
        for name, arm in claim.arms.items():
            results[name].append(measured_arm(claim, arm, seed, measure, directory))
    return summarise(claim, results, seeds, environment={})


def test_an_interrupted_run_resumes(claim, tmp_path):
    calls = []

    def measure(arm, seed):
        calls.append((arm.name, seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Measurement(90.0 + seed + (arm.name == "ours"), extras={"seed": np.int64(seed)})

    with pytest.raises(KeyboardInterrupt):
        run_arms(claim, measure, [0, 1], tmp_path)
    assert calls == [("ours", 0), ("theirs", 0), ("ours", 1), ("theirs", 1)]  # pairs complete together
    outcome = run_arms(claim, measure, [0, 1], tmp_path)
    assert calls[4:] == [("theirs", 1)]
    assert outcome.arms["ours"].values == (91.0, 92.0)
    assert outcome.arms["ours"].extras[1] == {"seed": 1}
    assert all(seconds is not None for seconds in outcome.arms["ours"].seconds)


def test_stale_and_damaged_results_are_measured_again(claim, tmp_path):
    calls = []

    def measure(arm, seed):
        calls.append(arm.name)
        return Measurement(1.0)

    run_arms(claim, measure, [0], tmp_path)
    changed = claim_set(
        tmp_path / "demo",
        arms={**CONTENT["claims"][0]["arms"], "theirs": {"recipe": "digits", "options": {"keep": 0.3}}},
    )["main"]
    run_arms(changed, measure, [0], tmp_path)
    assert calls == ["ours", "theirs", "theirs"]
    (tmp_path / "main" / "ours-seed0.json").write_text('{"key": ')
    run_arms(changed, measure, [0], tmp_path)
    assert calls[3:] == ["ours"]


def test_an_edited_recipe_is_measured_again(tmp_path):
    before = claim_set(tmp_path / "demo")["main"]
    (tmp_path / "demo" / "recipes").mkdir()
    (tmp_path / "demo" / "recipes" / "digits.yaml").write_text("epochs: 1")
    after = read_claims(tmp_path / "demo")["main"]
    assert before.arms["ours"].key != after.arms["ours"].key


def test_a_run_failure_is_a_failed_seed_and_other_errors_propagate(claim, tmp_path):
    def diverge(arm, seed):
        if arm.name == "theirs":
            raise RunFailure("step 3: the loss is NaN")
        return Measurement(1.0)

    outcome = run_arms(claim, diverge, [0, 1], tmp_path)
    assert outcome.arms["theirs"].errors == ("step 3: the loss is NaN",) * 2
    assert outcome.arms["theirs"].mean is None
    with pytest.raises(ZeroDivisionError):
        run_arms(claim, lambda arm, seed: 1 / 0, [5], tmp_path)
