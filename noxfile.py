#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["nox[uv]>=2025.11.12"]
# ///
"""Every check of the repository, one session a purpose: `nox --list` shows them, `nox` runs lint and tests.

A distribution is a folder with a `pyproject.toml`: `shared`, and each one under `packages`. Its folder names it:
`nox -s "tests(bip)"`. Nothing here lists the packages; a new one is found because it is there.
With `CI` set, `.github/constraints.txt` fixes the versions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv|virtualenv"

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / ".github" / "constraints.txt"
PACKAGES = sorted(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml"))
DISTRIBUTIONS = ["shared", *PACKAGES]

each_distribution = nox.parametrize("name", DISTRIBUTIONS, ids=DISTRIBUTIONS)
each_package = nox.parametrize("name", PACKAGES, ids=PACKAGES)

# These three run in a session's environment, away from the sources.
ALONE = """
import importlib.util, pathlib, sys
own, *others = sys.argv[1:]
if strangers := [name for name in others if importlib.util.find_spec(name)]:
    sys.exit(f"{own} is not alone: {', '.join(strangers)} can be imported beside it")
place = pathlib.Path(importlib.util.find_spec(own).origin).resolve()
if pathlib.Path(sys.prefix).resolve() not in place.parents:
    sys.exit(f"{own} would be tested from {place}, which is not what was installed")
"""
IMPORT_TIME = """
import importlib, sys, time
start = time.perf_counter(); import torch
middle = time.perf_counter(); importlib.import_module(sys.argv[1])
print(middle - start, time.perf_counter() - middle)
"""
README_EXAMPLES = r"""
import doctest, pathlib, re, sys
readme = pathlib.Path(sys.argv[1])
text = readme.read_text(encoding="utf-8")
blocks = list(re.finditer(r"^```(?:python|pycon)\n(.*?)^```", text, re.M | re.S))
names, runner = {"__name__": "readme"}, doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
for block in blocks:
    source, line = block[1], text.count("\n", 0, block.start(1))
    if ">>>" in source:
        test = doctest.DocTestParser().get_doctest(source, names, readme.name, str(readme), line)
        test.globs = names  # the parser made a copy; later blocks use what earlier ones define
        runner.run(test, clear_globs=False)
    else:
        exec(compile("\n" * line + source, str(readme), "exec"), names)
failed = runner.summarize(verbose=False).failed
print(f"{readme}: {len(blocks)} examples, {failed} failures")
sys.exit(not blocks or failed > 0)
"""

REVIEWED = "PP002,PP003,PP004,PP005,PY005"  # sp-repo-review's checks that concern a distribution's folder
MOST_WORKERS = 8  # processes that share a distribution's tests; each of them imports torch
built_wheels: dict[str, Path] = {}


def folder(name: str) -> Path:
    """Where the distribution of that name lies."""
    return ROOT / name if name == "shared" else ROOT / "packages" / name


def pyproject(where: Path) -> dict:
    """The parsed `pyproject.toml` of a folder."""
    return nox.project.load_toml(where / "pyproject.toml")


def group(where: Path, table: str) -> list[str]:
    """The requirements of a `[dependency-groups]` table of a folder; none where it declares no such table."""
    groups = pyproject(where).get("dependency-groups", {})
    return list(nox.project.dependency_groups(pyproject(where), table)) if table in groups else []


def pins() -> list[str]:
    """What makes an installation use CI's exact versions, in CI."""
    return ["--constraint", str(CONSTRAINTS)] if os.environ.get("CI") else []


def wheel(session: nox.Session, name: str) -> Path:
    """The distribution's wheel, built at its first use in this run of nox."""
    if name not in built_wheels:
        out = session.cache_dir.resolve() / "wheels" / name
        shutil.rmtree(out, ignore_errors=True)
        if session.venv_backend == "uv":
            frozen = ["--build-constraint", str(CONSTRAINTS)] if pins() else []
            session.run("uv", "build", "--wheel", *frozen, "--out-dir", str(out), str(folder(name)))
        else:
            session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={out}", str(folder(name)))
        (built_wheels[name],) = out.glob("*.whl")
    return built_wheels[name]


def own_wheels(session: nox.Session, *names: str) -> list[str]:
    """The wheels to install for these distributions: theirs and that of `shared`, which each of them needs."""
    return [str(wheel(session, name)) for name in dict.fromkeys(("shared", *names))]


@contextlib.contextmanager
def away(session: nox.Session) -> Iterator[None]:
    """Work in an empty folder and without `PYTHONPATH`, so that only what is installed can be imported."""
    session.env["PYTHONPATH"] = None
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        yield


def run_tests(session: nox.Session, name: str) -> None:
    """Run a distribution's tests on what is installed, where no other package of this repository may be."""
    # A package's shapes are checked while its tests run; tenfold_shared's tests hand wrong types to it on purpose.
    shapes = [] if name == "shared" else [f"--jaxtyping-packages=tenfold_{name},tenfold_shared.typecheck.check"]
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "--import-mode=importlib", *shapes]
    # The networks of tests are too small for several threads: every core has a process. A class shares what its tests make.
    cores = os.cpu_count() or 1
    workers = min(cores, MOST_WORKERS)
    session.env["OMP_NUM_THREADS"] = str(cores // workers)
    options += [f"--numprocesses={workers}", "--dist=loadscope"]
    if fixtures := os.environ.get("TENFOLD_PARITY_DIR"):
        session.env["TENFOLD_PARITY_DIR"] = str(Path(session.invoked_from, fixtures).resolve())
    others = [f"tenfold_{other}" for other in PACKAGES if other != name]
    with away(session):
        session.run("python", "-c", ALONE, f"tenfold_{name}", *others, log=False)
        session.run("pytest", *options, str(folder(name) / "tests"), *session.posargs)


def check_import_time(session: nox.Session, name: str) -> None:
    """Refuse a package whose import takes half as long as that of torch, or more, on top of it."""
    torch_times, own_times = [], []
    with away(session):
        # Other processes only ever add time, so the least of a few runs is the cost; noise earns more runs.
        for runs in range(1, 13):
            answer = session.run("python", "-c", IMPORT_TIME, f"tenfold_{name}", silent=True, log=False)
            torch_time, own_time = map(float, str(answer).split()[-2:])
            torch_times.append(torch_time)
            own_times.append(own_time)
            if runs >= 3 and min(own_times) < min(torch_times) / 2:
                break
    tell = session.log if min(own_times) < min(torch_times) / 2 else session.error
    tell(f"import tenfold_{name} adds {min(own_times):.2f} s to torch's {min(torch_times):.2f} s (limit: half)")


@nox.session(default=True)
@each_distribution
def tests(session: nox.Session, name: str) -> None:
    """Install one distribution alone, from its wheel, and run its tests on it."""
    session.install(*own_wheels(session, name), *group(folder(name), "test"), *group(ROOT, "parallel"), *pins())
    run_tests(session, name)
    if name in PACKAGES:
        check_import_time(session, name)


def direct_requirements(name: str) -> list[str]:
    """What a distribution and its tests require, `tenfold-*` requirements replaced by what they stand for."""
    waiting = [Requirement(f"tenfold-{name}"), *map(Requirement, group(folder(name), "test"))]
    found: dict[str, None] = {}
    while waiting:
        requirement = waiting.pop(0)
        if not requirement.name.startswith("tenfold-"):
            found[str(requirement)] = None
            continue
        table = pyproject(folder(requirement.name.removeprefix("tenfold-")))["project"]
        extras = [table["optional-dependencies"][extra] for extra in sorted(requirement.extras)]
        waiting += [Requirement(text) for declared in (table.get("dependencies", []), *extras) for text in declared]
    return list(found)


def lowest_python() -> str | None:
    """The oldest supported Python on the path that answers (a version manager's stub may not), as `3.x`."""
    versions = ("3.10", "3.11", "3.12", "3.13")
    return next((v for v in versions if subprocess.getstatusoutput(f"python{v} -V")[0] == 0), None)


@nox.session(default=False, venv_backend="uv", python=lowest_python())
@each_distribution
def lowest(session: nox.Session, name: str) -> None:
    """Run a distribution's tests with the oldest Python and the lower bound of every dependency it declares."""
    wanted = [*direct_requirements(name), *group(ROOT, "parallel")]
    session.install("--resolution", "lowest-direct", *own_wheels(session, name), *wanted)
    run_tests(session, name)


@nox.session(default=True)
def lint(session: nox.Session) -> None:
    """Style, types, imports between distributions, wheel contents, workflows and repository conventions."""
    tested = [requirement for name in DISTRIBUTIONS for requirement in group(folder(name), "test")]
    session.install(*group(ROOT, "dev"), *own_wheels(session, *PACKAGES), *tested, *pins())
    sources = os.pathsep.join(str(folder(name) / "src") for name in DISTRIBUTIONS)
    workflows = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(".github/workflows/*.y*ml"))

    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy", env={"MYPYPATH": sources})
    contracts = session.cache_dir / "importlinter.ini"
    contracts.write_text(import_contracts(), encoding="utf-8")
    session.run("lint-imports", "--config", str(contracts), "--no-cache", env={"PYTHONPATH": sources})
    for name in DISTRIBUTIONS:
        check_wheel(session, name)
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    session.run("zizmor", "--offline", "--no-progress", "--persona=pedantic", ".github")
    session.run("repo-review", ".", "--show=err")
    for where in (folder(name).relative_to(ROOT).as_posix() for name in DISTRIBUTIONS):
        session.run("repo-review", ".", f"--package-dir={where}", f"--select={REVIEWED}", "--show=err")


def import_contracts() -> str:
    """Import-linter's configuration: its lists are the folders."""
    packages = "\n    ".join(["", *(f"tenfold_{name}" for name in PACKAGES)])
    return f"""
[importlinter]
root_packages =
    tenfold_shared{packages}
[importlinter:contract:apart]
name = Packages never import one another
type = independence
modules = {packages}
[importlinter:contract:below]
name = tenfold_shared knows no paper
type = forbidden
source_modules = tenfold_shared
forbidden_modules = {packages}
"""


def check_wheel(session: nox.Session, name: str) -> None:
    """Refuse a wheel that differs from the source tree, or comes without its licence, recipes and claims."""
    archive, source = wheel(session, name), folder(name) / "src"
    # W102, files that are not in the source tree, is left to the exact comparison below: it knows the results
    expected = ["--ignore=W102", f"--toplevel=tenfold_{name}", f"--package={source / f'tenfold_{name}'}"]
    session.run("check-wheel-contents", *expected, str(archive))
    packed = {entry for entry in zipfile.ZipFile(archive).namelist() if ".dist-info/" not in entry}
    present = {file.relative_to(source).as_posix() for file in source.rglob("*.*") if file.suffix != ".pyc"}
    committed = folder(name) / "results"  # what was measured travels with the package
    present |= {f"tenfold_{name}/results/{file.relative_to(committed).as_posix()}" for file in committed.rglob("*.*")}
    if packed != present:
        session.error(f"{archive.name} and {source.relative_to(ROOT)} differ in: {', '.join(sorted(packed ^ present))}")
    licences = [entry for entry in zipfile.ZipFile(archive).namelist() if entry.endswith(".dist-info/licenses/LICENSE")]
    if not licences or (folder(name) / "LICENSE").read_text("utf-8") != (ROOT / "LICENSE").read_text("utf-8"):
        session.error(f"{archive.name} lacks the repository's LICENSE: copy it to {folder(name).relative_to(ROOT)}")
    recipes = [entry for entry in packed if entry.startswith(f"tenfold_{name}/recipes/") and entry.endswith(".yaml")]
    has_command = "scripts" in pyproject(folder(name))["project"]
    if has_command and not (recipes and f"tenfold_{name}/claims.yaml" in packed):
        session.error(f"{archive.name} lacks tenfold_{name}/claims.yaml or tenfold_{name}/recipes/*.yaml")


@nox.session(default=False)
@each_package
def reproduce(session: nox.Session, name: str) -> None:
    """Run a package's main job; what follows `--` goes to its command."""
    session.install(*own_wheels(session, name), *pins())
    session.run(f"tenfold-{name}", "reproduce", *session.posargs)


@nox.session(default=False)
@each_package
def bench(session: nox.Session, name: str) -> None:
    """Run every benchmark of a package; what follows `--` goes to each."""
    session.install(*own_wheels(session, name), *group(folder(name), "bench"), *pins())
    for script in sorted(folder(name).glob("benchmarks/*.py")):
        session.run("python", str(script), *session.posargs)


@nox.session(default=False)
@each_distribution
def docs(session: nox.Session, name: str) -> None:
    """Run the examples of a package's README; for `shared`, see that every generated table is up to date."""
    session.install(*own_wheels(session, name), *pins())
    with away(session):
        if name == "shared":
            session.run("python", "-m", "tenfold_shared.report", "check", str(ROOT))
        else:
            session.run("python", "-c", README_EXAMPLES, str(folder(name) / "README.md"), log=False)


@nox.session(default=False, venv_backend="uv")
def constraints(session: nox.Session) -> None:
    """Write .github/constraints.txt anew: the newest versions that fit every distribution on every supported Python."""
    wanted = {"hatchling", *group(ROOT, "dev")}
    for name in DISTRIBUTIONS:
        extras = pyproject(folder(name))["project"].get("optional-dependencies", {})
        wanted.update(direct_requirements(name), group(folder(name), "bench"), *extras.values())
    lines = [text for text in sorted(wanted) if not text.startswith("tenfold-")]
    requirements = session.cache_dir / "requirements.in"
    requirements.write_text("\n".join(lines), encoding="utf-8")
    how = ["--universal", "--python-version=3.10", "--upgrade", "--no-annotate"]
    told = ["--quiet", "--custom-compile-command=nox -s constraints"]
    session.run("uv", "pip", "compile", *how, *told, f"--output-file={CONSTRAINTS}", str(requirements))


if __name__ == "__main__":
    nox.main()
