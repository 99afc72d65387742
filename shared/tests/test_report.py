"""The report page, its tables, and the generated blocks of the READMEs."""

import dataclasses
import html.parser
import re

import matplotlib.figure
import pytest
import rich.console

from tenfold_shared.claims import Measurement, Metric, summarise
from tenfold_shared.errors import UserError
from tenfold_shared.report import (
    GalleryEntry,
    ReportFigure,
    console_table,
    figure_style,
    gallery,
    main,
    markdown_table,
    write_report,
)
from tenfold_shared.tables import Arm, Claim, ClaimSet, Paper

ARMS = {"ours": Arm("ours", 95.0, "digits", {"keep": 0.2}), "theirs": Arm("theirs", 94.0, "digits")}
METRIC = Metric("accuracy", "%")
CLAIM = Claim("main", "Table 1", "better than <b> | others", "CIFAR-10", "mlp", "paper", METRIC, "seen", "ours", ARMS)
OTHER = Claim("other", "Table 2", "also", "CIFAR-10", "mlp", "mini", METRIC, "seen", "ours", ARMS)
CLAIMS = ClaimSet(
    "demo", Paper("A Demonstration", "0000.00000", "Venue 2022", ("A. Author",)), "main", "it helps", (CLAIM, OTHER)
)


def outcome(ours, theirs, label=""):
    results = {
        "ours": [Measurement(v) for v in ours],
        "theirs": [Measurement(v, error="NaN at step 3") for v in theirs],
    }
    return summarise(CLAIM, results, range(len(ours)), label=label, environment={"commit": "abc"})


GOOD = outcome([95.0, 95.2, 95.1], [94.0, 94.1, 94.05])
BAD = outcome([94.0, 94.1, 94.05], [95.0, 95.2, 95.1], label="CIFAR-10 (JPEG)")
FAILED = outcome([95.0, 95.1, 95.2], [94.0, None, 94.2])


@pytest.fixture
def picture():
    with figure_style():
        figure = matplotlib.figure.Figure()
        figure.subplots().plot([1, 2], [2, 1], label="ours")
    return ReportFigure(figure, "The curve", "A caption & more", 'falling "line"')


class Page(html.parser.HTMLParser):
    """What a page would load from elsewhere, its texts, and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.alts, self.text = [], [], [], text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.loads += [given[key] for key in ("src", "srcset", "data") if key in given]
        self.loads += [given.get("href")] if tag == "link" else []
        self.alts += [given.get("alt")] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_with_the_figure_first(tmp_path, picture):
    file = tmp_path / "deep" / "report.html"
    write_report(file, CLAIMS, [GOOD, BAD, FAILED], [picture], "tenfold-demo reproduce --seeds 3", {"torch": "2.x"})
    page = Page(file.read_text())
    assert page.open == []
    assert page.loads
    assert all(address.startswith("data:image/") for address in page.loads)
    assert not re.search(r"<script|@import|url\(", page.text)
    assert page.alts == ['falling "line"']
    places = [
        page.text.index(part) for part in ("<img", "What was claimed", "Run it again", "Environment", "Configuration")
    ]
    assert places == sorted(places)
    assert "better than &lt;b&gt;" in page.text
    for text in (
        "tenfold-demo reproduce --seeds 3",
        "CIFAR-10 (JPEG)",
        "failed: NaN at step 3",
        "prefers-color-scheme",
    ):
        assert text in page.text
    # a negative verdict is shown in the same form as a positive one
    assert '<span class="badge reproduced">✓ reproduced</span>' in page.text
    assert '<span class="badge not-reproduced">✗ not reproduced</span>' in page.text


def test_figures_are_the_same_bytes_each_time(tmp_path, picture):
    for name in ("a", "b"):
        write_report(tmp_path / name, CLAIMS, [GOOD], [picture], "x", {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_finished_figures_are_embedded(tmp_path):
    (tmp_path / "figure.png").write_bytes(b"png")
    ready = ReportFigure(tmp_path / "figure.png", "t", "c", "a")
    write_report(tmp_path / "report.html", CLAIMS, [GOOD], [ready], "x", {})
    assert "data:image/png;base64,cG5n" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"none.svg is no .svg or .png"):
        write_report(tmp_path / "r.html", CLAIMS, [], [ReportFigure(tmp_path / "none.svg", "", "", "")], "x", {})


def test_the_gallery(tmp_path, picture):
    entries = [GalleryEntry(CLAIMS, [GOOD], "demo/report.html", picture), GalleryEntry(CLAIMS, [])]
    gallery(tmp_path / "index.html", entries)
    page = Page((tmp_path / "index.html").read_text())
    assert page.open == []
    assert 'href="demo/report.html"' in page.text
    assert page.text.count("not measured yet") == 1


def test_markdown():
    lines = markdown_table(CLAIMS, [GOOD, BAD, FAILED]).splitlines()
    assert len(lines) == 5
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in lines)
    assert "| ours vs theirs | 95 vs 94 % | 95.10 ± 0.10 vs 94.05 ± 0.05 % (3 seeds) | +1.05 [" in lines[2]
    assert "**reproduced**" in lines[2]
    assert "CIFAR-10 (JPEG), mlp" in lines[3]
    assert "**not reproduced**" in lines[3]
    assert "(3 seeds; 1 of theirs failed)" in lines[4]
    assert "**inconclusive**<br>incomplete pairs: theirs seed 1 failed" in lines[4]


def test_whole_numbers_are_shown_in_full():
    claim = dataclasses.replace(CLAIM, arms={"ours": Arm("ours", paper=50703838.0)}, deterministic=True)
    counted = summarise(claim, {"ours": [Measurement(50703838)]}, [0], environment={})
    claims = dataclasses.replace(CLAIMS, claims=(claim,))
    assert "| ours | 50703838 % | 50703838 % (1 seed) |" in markdown_table(claims, [counted])


def test_a_bound_near_zero_shows_its_side():
    """A verdict follows from it: +0.0 would be either."""
    close = outcome([3.486, 2.486, 1.486], [0.0, 0.0, 0.0])
    assert "+2.5 [+0.002, +5.0] | **direction holds**" in markdown_table(CLAIMS, [close])
    assert "-2.5 [-5.0, -0.002] |" in markdown_table(CLAIMS, [outcome([0.0] * 3, [3.486, 2.486, 1.486])])
    assert "+1 [+1, +1]" in markdown_table(CLAIMS, [outcome([1.0] * 3, [0.0] * 3)])


def test_console_table():
    console = rich.console.Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(console_table(CLAIMS, [GOOD, BAD]))
    text = console.export_text()
    assert "✓ reproduced" in text
    assert "✗ not reproduced" in text
    assert re.search(r"\+1\.05\s+\[\+0", text)  # brackets are no markup


def test_an_outcome_of_an_unknown_claim_is_refused():
    claims = ClaimSet("demo", CLAIMS.paper, "other", "", (OTHER,))
    with pytest.raises(UserError, match="no claim 'main'"):
        markdown_table(claims, [GOOD])


CLAIMS_YAML = """
package: demo
title: A | Demonstration
paper: {arxiv: "0000.00000", venue: Venue 2022, authors: [A. Author]}
headline: main
summary: it helps
claims:
  - {id: main, table: Table 1, statement: better, data: CIFAR-10, model: mlp, scale: paper, provenance: seen,
     method: ours, metric: {name: accuracy, unit: "%"}, arms: {ours: {paper: 95}, theirs: {paper: 94}}}
  - {id: other, table: Table 2, statement: also, data: CIFAR-10, model: mlp, scale: mini, provenance: none,
     method: ours, metric: {name: accuracy}, arms: {ours: {}, theirs: {}}}
"""


@pytest.fixture
def house(tmp_path):
    package = tmp_path / "packages" / "demo"
    (package / "src" / "tenfold_demo").mkdir(parents=True)
    (package / "src" / "tenfold_demo" / "claims.yaml").write_text(CLAIMS_YAML)
    (package / "README.md").write_text("# demo\n\n<!-- results:begin -->\n<!-- results:end -->\n\nmore\n")
    rows = "| `demo` | typed | typed | typed |\n| `later` | its paper | its claim | not there yet |"
    header = "| package | paper | claim | measured here |\n|---|---|---|---|"
    (tmp_path / "README.md").write_text(f"# house\n<!-- papers:begin -->\n{header}\n{rows}\n<!-- papers:end -->\nend\n")
    return tmp_path


def test_tables_of_the_readmes_are_generated_and_checked(house, capsys):
    assert main(["check", str(house)]) == 1
    assert (
        "README.md does not show the committed results: run `python -m tenfold_shared.report write"
        in capsys.readouterr().err
    )
    assert main(["write", str(house)]) == 0
    assert main(["check", str(house)]) == 0
    package, front = house / "packages" / "demo" / "README.md", house / "README.md"
    assert "2 claims are not measured yet: `tenfold-demo claims`" in package.read_text()
    assert package.read_text().endswith("<!-- results:end -->\n\nmore\n")
    assert (
        "| [`demo`](packages/demo) | *A \\| Demonstration*, Venue 2022, [arXiv 0000.00000](https" in front.read_text()
    )
    assert (
        "| it helps | not measured yet |\n| `later` | its paper | its claim | not there yet |\n<!--"
        in front.read_text()
    )

    BAD.save(house / "packages" / "demo" / "results" / "main.json")
    assert main(["check", str(house)]) == 1
    assert main(["write", str(house)]) == 0
    assert main(["check", str(house)]) == 0
    assert "**not reproduced**" in package.read_text()
    assert "1 further claim is not measured yet" in package.read_text()
    assert (
        "CIFAR-10 (JPEG), mlp: ours vs theirs: 94.05 ± 0.05 vs 95.10 ± 0.10 % (3 seeds): **not reproduced**"
        in front.read_text()
    )

    front.write_text(front.read_text().replace("not reproduced", "reproduced"))
    assert main(["check", str(house)]) == 1
    assert main(["gallery", str(house)]) == 0
    assert "not reproduced" in (house / "gallery.html").read_text()


def test_numbers_in_a_readme_are_filled_in_from_the_result_files(house, capsys):
    readme = house / "packages" / "demo" / "README.md"
    readme.write_text(
        readme.read_text() + "<!-- found:begin -->\n<!-- found:end -->\n<!-- cost:begin -->\n<!-- cost:end -->\n"
    )
    benchmarks = house / "packages" / "demo" / "results" / "benchmarks"
    benchmarks.mkdir(parents=True)
    (benchmarks / "step-cpu.json").write_text('{"ratio": 3.0588, "rows": [{"pool": 10000}, {"pool": 50000}]}')
    template = benchmarks / "cost.md.j2"
    template.write_text(
        "a step of <b> costs {{ '%.1f' % step_cpu.ratio }} x less\n\n| pool |\n|---|\n"
        "{% for row in step_cpu.rows %}\n| {{ '{:,}'.format(row.pool) }} |\n{% endfor %}\n"
    )
    (benchmarks.parent / "found.md.j2").write_text("{{ benchmarks.step_cpu.rows | length }} pools")
    assert main(["check", str(house)]) == 1
    assert main(["write", str(house)]) == 0
    assert main(["check", str(house)]) == 0
    assert "<!-- found:begin -->\n2 pools\n<!-- found:end -->" in readme.read_text()
    filled = "a step of <b> costs 3.1 x less\n\n| pool |\n|---|\n| 10,000 |\n| 50,000 |\n"
    assert readme.read_text().endswith(f"<!-- found:end -->\n<!-- cost:begin -->\n{filled}<!-- cost:end -->\n")
    readme.write_text(readme.read_text().replace("3.1 x", "4.1 x"))
    assert main(["check", str(house)]) == 1
    template.write_text("{{ step_gpu.ratio }}")
    assert main(["check", str(house)]) == 2
    assert "cost.md.j2: 'step_gpu' is undefined" in capsys.readouterr().err


def test_a_table_that_names_papers_first_shows_the_slug_and_the_papers_value(house):
    front = house / "README.md"
    header = "| paper | claim | paper value | measured here |\n|---|---|---|---|\n"
    front.write_text(f"<!-- papers:begin -->\n{header}<!-- papers:end -->")
    assert main(["write", str(house)]) == 0
    assert "| [`demo`](packages/demo) *A \\| Demonstration*" in front.read_text()
    assert "| 95 vs 94 % | not measured yet |" in front.read_text()
    assert main(["check", str(house)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no block", "needs one <!-- papers:begin -->"),
        ("<!-- papers:end --><!-- papers:begin -->", "needs one <!-- papers:begin -->"),
        ("<!-- papers:begin -->\n| a |\n|-|\n| x |\n<!-- papers:end -->", "names no package"),
        ("<!-- papers:begin -->\n| colour |\n|-|\n| `x` |\n<!-- papers:end -->", "has a column 'colour'"),
    ],
)
def test_a_readme_that_cannot_hold_the_table_is_named(house, capsys, text, message):
    (house / "README.md").write_text(text)
    assert main(["check", str(house)]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_result_is_named(house, capsys):
    (house / "packages" / "demo" / "results").mkdir()
    (house / "packages" / "demo" / "results" / "main.json").write_text("{")
    assert main(["write", str(house)]) == 2
    assert "main.json is no outcome" in capsys.readouterr().err
