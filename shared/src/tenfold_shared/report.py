"""What was measured, for people: one self-contained page per reproduce, Markdown, a console table, the generated
tables.

`python -m tenfold_shared.report {check,write} ROOT` keeps the READMEs' tables equal to the committed results;
`... gallery ROOT` writes one page over all packages.
"""

import argparse
import base64
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_shared.checkpoint import write_text
from tenfold_shared.claims import ArmResult, Claim, ClaimSet, Comparison, Outcome, read_claims
from tenfold_shared.errors import UserError

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

_BADGES = {
    "reproduced": ("✓", "green"),
    "direction holds": ("↗", "cyan"),
    "inconclusive": ("?", "yellow"),
    "not reproduced": ("✗", "red"),
}

TEMPLATES = Path(__file__).parent / "templates"

# Okabe and Ito's colours that stay apart for every kind of colour vision, on white; in an order of falling contrast.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report: a matplotlib figure, or a finished .svg or .png; `alt` says what it shows to those who
    cannot see it.
    """

    figure: "Figure | Path"
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class GalleryEntry:
    """One package in the gallery; `link` is the address of its report, relative to the gallery."""

    claim_set: ClaimSet
    outcomes: Sequence[Outcome]
    link: str | None = None
    figure: ReportFigure | None = None


def figure_style() -> AbstractContextManager[None]:
    """The look of all figures, as a context manager in which figures are made."""
    import matplotlib as mpl  # noqa: PLC0415  - slow to import, needed for figures alone
    from cycler import cycler  # noqa: PLC0415

    return mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "figure.figsize": (5.6, 3.7),
            "font.size": 11,
            "grid.color": "#dddddd",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "lines.markersize": 5,
            "savefig.dpi": 160,
        }
    )


# --- the rows that all forms share ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One comparison as text: method against one baseline (or against the paper's value alone)."""

    claim: Claim
    outcome: Outcome
    statement: str
    where: str
    arms: str
    paper: str
    ours: str
    difference: str
    verdict: str
    reason: str

    @property
    def badge(self) -> str:
        return f"{_BADGES[self.verdict][0]} {self.verdict}"


def _rows(claim_set: ClaimSet, outcomes: Sequence[Outcome]) -> list[_Row]:
    return [row for outcome in outcomes for row in _outcome_rows(claim_set[outcome.claim], outcome)]


def _outcome_rows(claim: Claim, outcome: Outcome) -> list[_Row]:
    method = outcome.arms[outcome.method]
    where = f"{outcome.label or claim.data}, {claim.model}"
    unit = claim.metric.unit
    rows = []
    for comparison in outcome.comparisons or (None,):
        arms = [method] if comparison is None else [method, outcome.arms[comparison.baseline]]
        digits = _digits(arms, comparison)
        rows.append(
            _Row(
                claim=claim,
                outcome=outcome,
                statement=claim.statement,
                where=where,
                arms=" vs ".join(arm.name for arm in arms),
                paper=_paper_values(claim, [arm.paper for arm in arms]),
                ours=" vs ".join(_mean_std(arm, digits) for arm in arms) + _behind(unit) + _seeds(arms),
                difference="" if comparison is None else _difference(comparison, digits),
                verdict=outcome.verdict if comparison is None else comparison.verdict,
                reason=outcome.reason if comparison is None else comparison.reason,
            )
        )
    return rows


def _digits(arms: Sequence[ArmResult], comparison: Comparison | None) -> int | None:
    """Decimals so that the largest spread keeps two figures; None where there is no spread."""
    spreads = [arm.std for arm in arms]
    if comparison is not None and comparison.low is not None and comparison.high is not None:
        spreads.append((comparison.high - comparison.low) / 2)
    known = [spread for spread in spreads if spread]
    return min(6, max(0, 1 - math.floor(math.log10(max(known))))) if known else None


def _number(value: float | None, digits: int | None, sign: str = "") -> str:
    if value is None:
        return "–"
    if digits is None and _is_count(value):
        return f"{value:{sign}.0f}"
    return f"{value:{sign}.{digits}f}" if digits is not None else f"{value:{sign}.4g}"


def _is_count(value: float) -> bool:
    """Whether it is a whole number that four figures would cut."""
    return abs(value) >= 1e4 and float(value).is_integer()


def _mean_std(arm: ArmResult, digits: int | None) -> str:
    if arm.mean is None:
        return "failed"
    return _number(arm.mean, digits) + (f" ± {_number(arm.std, digits)}" if arm.std is not None else "")


def _behind(unit: str) -> str:
    return f" {unit}" if unit else ""


def _seeds(arms: Sequence[ArmResult]) -> str:
    total = len(arms[0].values)
    failed = [f"{total - arm.n} of {arm.name} failed" for arm in arms if arm.n < total]
    return f" ({total} seed{'s' * (total != 1)}{''.join(f'; {text}' for text in failed)})"


def _paper_values(claim: Claim, values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return "none published"
    shown = ["–" if value is None else f"{value:.0f}" if _is_count(value) else f"{value:g}" for value in values]
    text = " vs ".join(shown) + _behind(claim.metric.unit)
    return f"{text} (recalled)" if claim.provenance == "recalled" else text


def _difference(comparison: Comparison, digits: int | None) -> str:
    if comparison.mean is None:
        return "–"
    text = _number(comparison.mean, digits, "+")
    if comparison.low is None:
        return text
    return f"{text} [{_bound(comparison.low, digits)}, {_bound(comparison.high, digits)}]"


def _bound(value: float | None, digits: int | None) -> str:
    """One that would be rounded to zero keeps a figure: on which side of zero it lies decides."""
    shown = _number(value, digits, "+")
    return f"{value:+.1g}" if value and not float(shown) else shown


# --- Markdown and console ---------------------------------------------------------------------------------------------


def markdown_table(claim_set: ClaimSet, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, one row a comparison. UserError for an outcome of an unknown claim."""
    lines = [
        "| claim | arms | paper | ours: mean ± std | better by [95 % interval] | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in _rows(claim_set, outcomes):
        claim = f"{row.statement}<br>{row.where} ({row.claim.table})"
        verdict = f"**{row.verdict}**<br>{row.reason}"
        cells = (claim, row.arms, row.paper, row.ours, row.difference, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def console_table(claim_set: ClaimSet, outcomes: Sequence[Outcome]) -> "rich.table.Table":
    """The same for the terminal."""
    import rich.table  # noqa: PLC0415

    table = rich.table.Table(show_lines=True)
    for column in ("claim", "arms", "paper", "ours: mean ± std", "better by [95 %]", "verdict"):
        table.add_column(column, overflow="fold")
    for row in _rows(claim_set, outcomes):
        colour = _BADGES[row.verdict][1]
        cells = (f"{row.claim.id}: {row.statement}\n{row.where}", row.arms, row.paper, row.ours, row.difference)
        table.add_row(*(_literal(cell) for cell in cells), f"[bold {colour}]{row.badge}[/]\n{_literal(row.reason)}")
    return table


def _literal(text: str) -> str:
    from rich.markup import escape  # noqa: PLC0415

    return escape(text)


# --- pages ------------------------------------------------------------------------------------------------------------


def write_report(
    path: str | Path,
    claim_set: ClaimSet,
    outcomes: Sequence[Outcome],
    figures: Sequence[ReportFigure],
    command: str,
    environment: Mapping[str, Any],
) -> None:
    """One HTML file that needs nothing else: figures, verdicts, how to run it again, environment and configuration."""
    content = _render(
        TEMPLATES / "report.html.j2",
        claim_set=claim_set,
        rows=_rows(claim_set, outcomes),
        outcomes=[(claim_set[outcome.claim], outcome) for outcome in outcomes],
        figures=[(figure, _data_uri(figure)) for figure in figures],
        command=command,
        environment=environment,
    )
    write_text(Path(path), content)


def gallery(path: str | Path, reports: Sequence[GalleryEntry]) -> None:
    """One HTML file over several packages: a card each, with its figure, its headline's verdicts and a link."""
    cards = []
    for entry in reports:
        headline = [outcome for outcome in entry.outcomes if outcome.claim == entry.claim_set.headline]
        uri = _data_uri(entry.figure) if entry.figure is not None else None
        cards.append((entry, _rows(entry.claim_set, headline), uri))
    write_text(Path(path), _render(TEMPLATES / "gallery.html.j2", cards=cards))


def _render(template: Path, **content: Any) -> str:
    """A page, or the Markdown of a template named ``.md.j2``."""
    import jinja2  # noqa: PLC0415  - needed for pages alone

    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=".md." not in template.name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    pages.filters["plain"] = lambda value: (
        "–" if value is None else f"{value:.6g}" if isinstance(value, float) else value
    )
    try:
        return pages.get_template(template.name).render(**content)
    except jinja2.TemplateError as error:
        raise UserError(f"{template}: {error}") from error


def _data_uri(figure: ReportFigure) -> str:
    """The figure as an image inside the page: its identifiers cannot collide with those of another figure."""
    if isinstance(figure.figure, Path):
        kind = {".svg": "svg+xml", ".png": "png"}.get(figure.figure.suffix)
        if kind is None or not figure.figure.is_file():
            raise UserError(f"the figure {figure.figure} is no .svg or .png file that is there: make it first")
        return f"data:image/{kind};base64,{base64.b64encode(figure.figure.read_bytes()).decode()}"
    svg = _saved(figure.figure, "svg")
    if len(svg) <= 1 << 20:
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f"data:image/png;base64,{base64.b64encode(_saved(figure.figure, 'png')).decode()}"


def _saved(figure: "Figure", kind: str) -> bytes:
    import matplotlib as mpl  # noqa: PLC0415

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "tenfold"}):  # the same figure gives the same bytes
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(stream, format=kind, facecolor="white", bbox_inches="tight", metadata=metadata, dpi=160)
    return stream.getvalue()


# --- the generated tables of the READMEs ------------------------------------------------------------------------------


def committed_results(root: Path) -> dict[str, tuple[ClaimSet, list[Outcome]]]:
    """The claims of every package under `root` and the outcomes committed beside them, by the package's folder."""
    packages = {}
    for file in sorted(root.glob("packages/*/src/*/claims.yaml")):
        folder = file.parents[2]
        outcomes = [Outcome.load(result) for result in sorted((folder / "results").glob("*.json"))]
        packages[folder.name] = read_claims(file.parent), outcomes
    return packages


def readme_blocks(root: Path) -> dict[Path, str]:
    """What each README under `root` should say: the results of every package, and the house's table of papers."""
    expected: dict[Path, str] = {}
    packages = committed_results(root)
    for name, (claim_set, outcomes) in packages.items():
        readme = root / "packages" / name / "README.md"
        text = _with_block(_text(readme), readme, "results", _results_block(claim_set, outcomes))
        for template in sorted((readme.parent / "results").rglob("*.md.j2")):
            filled = _render(template, **_contents(template.parent)).strip()
            text = _with_block(text, readme, template.name.removesuffix(".md.j2"), filled)
        expected[readme] = text
    readme = root / "README.md"
    if packages:
        expected[readme] = _with_block(_text(readme), readme, "papers", _papers_block(readme, packages))
    return expected


def _results_block(claim_set: ClaimSet, outcomes: Sequence[Outcome]) -> str:
    measured = {outcome.claim for outcome in outcomes}
    rest = sum(claim.id not in measured for claim in claim_set.claims)
    parts = [markdown_table(claim_set, outcomes)] if outcomes else []
    if rest:
        claims = "claim is" if rest == 1 else "claims are"
        further = "further " if outcomes else ""
        parts.append(
            f"{rest} {further}{claims} not measured yet: `tenfold-{claim_set.package} claims` says what each takes."
        )
    return "\n\n".join(parts)


def _contents(folder: Path) -> dict[str, Any]:
    """What a README's template is filled with: the files beside it and below, by their names with ``_`` for ``-``."""
    below = {path.name: _contents(path) for path in folder.iterdir() if path.is_dir()}
    return below | {file.stem.replace("-", "_"): json.loads(_text(file)) for file in folder.glob("*.json")}


def _papers_block(readme: Path, packages: Mapping[str, tuple[ClaimSet, Sequence[Outcome]]]) -> str:
    """The table as it stands, with the rows of the packages that are there made anew, by the columns of its header."""
    lines = _block(_text(readme), readme, "papers").strip().splitlines()
    if len(lines) < 2:
        lines = ["| package | paper | claim | paper value | measured here |", "|---|---|---|---|---|"]
    columns = [cell.strip().lower() for cell in lines[0].strip().strip("|").split("|")]
    rows: dict[str, str] = {}
    for line in lines[2:]:
        named = re.match(r"\|[^|]*?`([a-z0-9-]+)`", line)
        if named is None:
            raise UserError(
                f"{readme}: a row of the papers table names no package as `slug` in its first cell: {line[:60]}"
            )
        rows[named[1]] = line
    for slug, (claim_set, outcomes) in packages.items():
        cells = _paper_cells(slug, claim_set, outcomes, named="package" not in columns)
        unknown = [column for column in columns if column not in cells]
        if unknown:
            raise UserError(
                f"{readme}: the papers table has a column {unknown[0]!r}: its columns are {', '.join(cells)}"
            )
        rows[slug] = "| " + " | ".join(cells[column].replace("|", "\\|") for column in columns) + " |"
    return "\n".join([*lines[:2], *rows.values()])


def _paper_cells(slug: str, claim_set: ClaimSet, outcomes: Sequence[Outcome], named: bool) -> dict[str, str]:
    paper = claim_set.paper
    link = f"[`{slug}`](packages/{slug})"
    source = ", ".join(part for part in (f"*{paper.title}*", paper.venue) if part)
    if paper.arxiv:
        source += f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    claim = claim_set[claim_set.headline]
    rows = _rows(claim_set, [outcome for outcome in outcomes if outcome.claim == claim.id])
    measured = [f"{row.where}: {row.arms}: {row.ours}: **{row.verdict}**" for row in rows]
    return {
        "package": link,
        "paper": f"{link} {source}" if named else source,
        "claim": claim_set.summary,
        "paper value": _paper_values(claim, [claim.arms[claim.method].paper, *(arm.paper for arm in claim.baselines)]),
        "measured here": "<br>".join(measured) or "not measured yet",
    }


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _block(text: str, readme: Path, name: str) -> str:
    begin, end = _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{readme} needs one {begin} followed by one {end}: the generated table goes between them")
    return text[text.index(begin) + len(begin) : text.index(end)]


def _with_block(text: str, readme: Path, name: str, content: str) -> str:
    earlier = _block(text, readme, name)
    begin, end = _markers(name)
    return text.replace(f"{begin}{earlier}{end}", f"{begin}\n{content}\n{end}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or write the generated tables below ROOT, or write a gallery page over all packages.

    Returns 0, 1 when a table is stale, 2 when they cannot be made.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tenfold_shared.report", description="What was measured, for people."
    )
    help_text = "compare the READMEs' tables with the results, write them, or write ROOT/gallery.html"
    parser.add_argument("action", choices=("check", "write", "gallery"), help=help_text)
    parser.add_argument("root", type=Path, help="the folder that holds packages/ and README.md")
    given = parser.parse_args(arguments)
    try:
        if given.action == "gallery":
            found = committed_results(given.root).items()
            gallery(given.root / "gallery.html", [GalleryEntry(*what, link=f"packages/{name}") for name, what in found])
            return 0
        expected = readme_blocks(given.root)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [file for file, text in expected.items() if file.read_text(encoding="utf-8") != text]
    if given.action == "write":
        for file in stale:
            write_text(file, expected[file])
        return 0
    if stale:
        again = f"python -m tenfold_shared.report write {given.root}"
        print(f"{stale[0]} does not show the committed results: run `{again}`", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
