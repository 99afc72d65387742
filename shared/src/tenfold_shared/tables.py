"""The paper's tables as data: a package's `claims.yaml` as frozen dataclasses, read with every mistake named."""

import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from tenfold_shared.errors import UserError, did_you_mean

if TYPE_CHECKING:  # its module moved between the supported Python versions
    from importlib.abc import Traversable

Scale = Literal["mini", "gpu", "paper"]
Provenance = Literal["seen", "recalled", "none"]

_FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_+.-]*")


@dataclass(frozen=True)
class Metric:
    """What is measured. `unit` is what stands behind a value ("%", "dB", "" for none).

    A count is neither better nor worse: `tolerance` says how far from the paper's value a mean may lie and still be the
    same number, such as half a unit of the last digit that the paper prints. None judges by the direction instead.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    tolerance: float | None = None


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a recipe of the package with options over it, and the paper's value (None: not known).

    `recipe_sha256` is the digest of the recipe's file, so that a measurement made with an earlier text of the recipe is
    not reused.
    """

    name: str
    paper: float | None = None
    recipe: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe_sha256: str | None = None

    @property
    def key(self) -> str:
        """Hash of everything in this arm that decides what is run."""
        return _digest({"recipe": self.recipe, "options": dict(self.options), "recipe_sha256": self.recipe_sha256})


@dataclass(frozen=True)
class Claim:
    """One cell (or one row) of the paper: the arm `method` against every other arm."""

    id: str
    table: str
    statement: str
    data: str
    model: str
    scale: Scale
    metric: Metric
    provenance: Provenance
    method: str
    arms: Mapping[str, Arm]
    seeds: int = 3
    cost: str = ""
    deterministic: bool = False
    """Whether nothing about it is drawn at random: one measurement then says all, without an interval."""

    @property
    def baselines(self) -> tuple[Arm, ...]:
        """The arms that the method is compared with, in the file's order."""
        return tuple(arm for name, arm in self.arms.items() if name != self.method)

    @property
    def key(self) -> str:
        """Hash of the configuration of all arms."""
        return _digest({name: arm.key for name, arm in self.arms.items()})


@dataclass(frozen=True)
class Paper:
    """Where the claims come from."""

    title: str
    arxiv: str = ""
    venue: str = ""
    authors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimSet:
    """All claims of one package. `headline` is the id of the claim shown in the house table, `summary` the paper's
    claim in a line.
    """

    package: str
    paper: Paper
    headline: str
    summary: str
    claims: tuple[Claim, ...]

    def __getitem__(self, claim_id: str) -> Claim:
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        known = [claim.id for claim in self.claims]
        raise UserError(
            f"{self.package} has no claim {claim_id!r}{did_you_mean(claim_id, known)}; `claims` lists all {len(known)}"
        )

    def select(self, ids: Iterable[str] = (), scale: str | None = None) -> tuple[Claim, ...]:
        """The claims named (all when none is), in the file's order, restricted to one scale when given. UserError for
        an unknown id.
        """
        wanted = {self[claim_id].id for claim_id in ids}
        chosen = tuple(c for c in self.claims if (not wanted or c.id in wanted) and (scale is None or c.scale == scale))
        if not chosen:
            scales = ", ".join(sorted({claim.scale for claim in self.claims}))
            raise UserError(f"{self.package} has no such claim at scale {scale!r}: its scales are {scales}")
        return chosen


def load_claims(package_import_name: str) -> ClaimSet:
    """The `claims.yaml` inside an importable package. Raises UserError naming the claim and the key that is wrong."""
    try:
        folder = importlib.resources.files(package_import_name)
    except ModuleNotFoundError as error:
        raise UserError(f"the claims of {package_import_name} cannot be read: install that package") from error
    return read_claims(folder)


def read_claims(folder: "Traversable") -> ClaimSet:
    """`claims.yaml` of a package's source folder, which also holds its `recipes/`."""
    where = f"{folder.name}/claims.yaml"
    try:
        content = yaml.safe_load((folder / "claims.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{where} does not exist: a package states its paper's claims there") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error

    top = _checked(content, {"package", "title", "paper", "headline", "summary", "claims"}, set(), where)
    source = _checked(top["paper"], {"arxiv", "venue", "authors"}, set(), f"{where}: paper")
    authors = source["authors"]
    if not isinstance(authors, list):
        raise UserError(f"{where}: paper.authors is {authors!r}: write a list of names")
    paper = Paper(top["title"], str(source["arxiv"]), str(source["venue"]), tuple(str(name) for name in authors))
    if not isinstance(top["claims"], list) or not top["claims"]:
        raise UserError(f"{where}: claims is {top['claims']!r}: write a list with at least one claim")
    claims = tuple(_claim(entry, folder, f"{where}: claim {i}") for i, entry in enumerate(top["claims"], 1))
    ids = [claim.id for claim in claims]
    for claim_id in ids:
        if ids.count(claim_id) > 1:
            raise UserError(f"{where}: the id {claim_id!r} is used more than once: give each claim its own")
    if top["headline"] not in ids:
        raise UserError(
            f"{where}: headline {top['headline']!r} is no claim's id{did_you_mean(str(top['headline']), ids)}"
        )
    return ClaimSet(str(top["package"]), paper, top["headline"], str(top["summary"]), claims)


def _claim(entry: Any, folder: "Traversable", where: str) -> Claim:
    required = {"id", "table", "statement", "data", "model", "scale", "metric", "provenance", "method", "arms"}
    entry = _checked(entry, required, {"seeds", "cost", "deterministic"}, where)
    where = f"{where} ({entry['id']})"
    if not _FILE_NAME.fullmatch(str(entry["id"])):
        raise UserError(f"{where}: the id names a folder too: use letters, digits, '-', '_', '+' and '.' alone")
    for key, valid in (("scale", get_args(Scale)), ("provenance", get_args(Provenance))):
        if entry[key] not in valid:
            hint = did_you_mean(str(entry[key]), valid)
            raise UserError(f"{where}: {key} is {entry[key]!r}: it is one of {', '.join(valid)}{hint}")
    metric = _checked(entry["metric"], {"name"}, {"unit", "higher_is_better", "tolerance"}, f"{where}: metric")
    if not isinstance(metric.get("higher_is_better", True), bool):
        raise UserError(f"{where}: metric.higher_is_better is {metric['higher_is_better']!r}: write true or false")
    tolerance = metric.get("tolerance")
    if tolerance is not None:
        if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
            raise UserError(f"{where}: metric.tolerance is {tolerance!r}: write a number, 0 or more")
        if not isinstance(entry["arms"], dict) or len(entry["arms"]) != 1:
            raise UserError(f"{where}: metric.tolerance is for one arm and the paper's value: leave out the other arms")
    if not isinstance(entry["arms"], dict) or not entry["arms"]:
        raise UserError(f"{where}: arms is {entry['arms']!r}: write a mapping from each arm's name to its recipe")
    arms = {str(name): _arm(str(name), arm, folder, f"{where}: arm {name}") for name, arm in entry["arms"].items()}
    if entry["method"] not in arms:
        raise UserError(f"{where}: method {entry['method']!r} is no arm{did_you_mean(str(entry['method']), arms)}")
    if entry["provenance"] == "none" and any(arm.paper is not None for arm in arms.values()):
        raise UserError(f"{where}: provenance is none, yet an arm has a paper value: write seen or recalled")
    if entry["provenance"] != "none" and all(arm.paper is None for arm in arms.values()):
        raise UserError(f"{where}: provenance is {entry['provenance']}, yet no arm has a paper value: write none")
    deterministic = entry.get("deterministic", False)
    if type(deterministic) is not bool:
        raise UserError(f"{where}: deterministic is {deterministic!r}: write true or false")
    seeds = entry.get("seeds", 1 if deterministic else 3)
    if type(seeds) is not int or seeds < 1:
        raise UserError(f"{where}: seeds is {seeds!r}: write how many seeds each arm is run with, 1 or more")
    return Claim(
        **{key: str(entry[key]) for key in ("id", "table", "statement", "data", "model", "method")},
        scale=entry["scale"],
        provenance=entry["provenance"],
        metric=Metric(
            str(metric["name"]), str(metric.get("unit", "")), metric.get("higher_is_better", True), tolerance
        ),
        arms=arms,
        seeds=seeds,
        deterministic=deterministic,
        cost=str(entry.get("cost", "")),
    )


def _arm(name: str, entry: Any, folder: "Traversable", where: str) -> Arm:
    entry = _checked({} if entry is None else entry, set(), {"paper", "recipe", "options"}, where)
    if not _FILE_NAME.fullmatch(name):
        raise UserError(f"{where}: the name names a file too: use letters, digits, '-', '_', '+' and '.' alone")
    value, recipe, options = entry.get("paper"), entry.get("recipe"), entry.get("options") or {}
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise UserError(f"{where}: paper is {value!r}: write a number (1.0e-5, not 1e-5) or null where none is known")
    if not isinstance(options, dict):
        raise UserError(f"{where}: options is {options!r}: write a mapping from the option's name to its value")
    digest = None
    if recipe is not None:
        file = folder / "recipes" / f"{recipe}.yaml"
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return Arm(name, None if value is None else float(value), recipe, options, digest)


def _checked(entry: Any, required: set[str], optional: set[str], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {entry!r}: write a mapping with the keys {', '.join(sorted(required | optional))}")
    for key in entry:
        if key not in required | optional:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(str(key), required | optional)}")
    missing = sorted(required - set(entry))
    if missing:
        raise UserError(f"{where}: the key {missing[0]!r} is missing: add it")
    return entry


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
