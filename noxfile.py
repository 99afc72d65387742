#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["nox[uv]>=2025.11.12"]
# ///
"""Every check of the repository, one session a purpose: `nox --list` shows them, `nox` runs lint and tests.

A distribution is a folder with a `pyproject.toml`: `shared`, and each one under `packages`. It is named by its folder: `nox -s "tests(bip)"`.
Nothing here lists the packages; a new one is found because it is there. With `CI` set, `.github/constraints.txt` fixes the versions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / ".github" / "constraints.txt"
PACKAGES = sorted(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml"))
DISTRIBUTIONS = ["shared", *PACKAGES]

each_distribution = nox.parametrize("name", DISTRIBUTIONS, ids=DISTRIBUTIONS)
each_package = nox.parametrize("name", PACKAGES, ids=PACKAGES)

# Both scripts run in a session's environment, away from the sources.
ALONE = """
import importlib.util, pathlib, sys
own, *others = sys.argv[1:]
strangers = [name for name in others if importlib.util.find_spec(name)]
if strangers:
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
blocks = [(text.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"^```(?:python|pycon)\n(.*?)^```", text, re.M | re.S)]
if not blocks:
    sys.exit(f"{readme}: no python example")
shared_names, runner = {"__name__": "readme"}, doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
for line, source in blocks:
    if ">>>" in source:
        runner.run(doctest.DocTestParser().get_doctest(source, shared_names, readme.name, str(readme), line), clear_globs=False)
    else:
        exec(compile("\n" * line + source, str(readme), "exec"), shared_names)
print(f"{readme}: {len(blocks)} blocks, {runner.summarize().failed} failures")
sys.exit(runner.summarize(verbose=False).failed > 0)
"""

built_wheels: dict[str, Path] = {}


def folder(name: str) -> Path:
    """Where the distribution of that name lies."""
    return ROOT / name if name == "shared" else ROOT / "packages" / name


def project(name: str) -> dict:
    """The parsed `pyproject.toml` of a distribution."""
    return nox.project.load_toml(folder(name) / "pyproject.toml")


def group(name: str, *groups: str) -> list[str]:
    """The requirements of those `[dependency-groups]` of a distribution that it declares."""
    tables = project(name)
    declared = [table for table in groups if table in tables.get("dependency-groups", {})]
    return list(nox.project.dependency_groups(tables, *declared)) if declared else []


def tools(table: str) -> list[str]:
    """The requirements of a `[dependency-groups]` table of the root `pyproject.toml`."""
    return list(nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), table))


def pins() -> list[str]:
    """What makes an installation use CI's exact versions, in CI."""
    return ["--constraint", str(CONSTRAINTS)] if os.environ.get("CI") else []


def uses_uv(session: nox.Session) -> bool:
    """Whether uv made the session's environment."""
    return session.venv_backend == "uv"


def wheel(session: nox.Session, name: str) -> Path:
    """The distribution's wheel, built at its first use in this run of nox."""
    if name not in built_wheels:
        out = ROOT / ".nox" / "wheels" / name
        shutil.rmtree(out, ignore_errors=True)
        if uses_uv(session):
            frozen = ["--build-constraint", str(CONSTRAINTS)] if pins() else []
            session.run("uv", "build", "--wheel", "--quiet", *frozen, "--out-dir", str(out), str(folder(name)))
        else:
            session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(folder(name)))
        (built_wheels[name],) = out.glob("*.whl")
    return built_wheels[name]


def own_wheels(session: nox.Session, *names: str) -> list[str]:
    """The wheels to install for these distributions: theirs and that of `shared`, which each of them needs."""
    return [str(wheel(session, name)) for name in dict.fromkeys(("shared", *names))]


def run_tests(session: nox.Session, name: str) -> None:
    """Run a distribution's tests on what is installed, from an empty folder."""
    # A package's shapes are checked while its tests run; tenfold_shared's tests hand wrong types to it on purpose.
    shapes = [] if name == "shared" else [f"--jaxtyping-packages=tenfold_{name},beartype.beartype"]
    environment: dict[str, str | None] = {"PYTHONPATH": None}
    if fixtures := os.environ.get("TENFOLD_PARITY_DIR"):
        environment["TENFOLD_PARITY_DIR"] = str(Path(session.invoked_from, fixtures).resolve())
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "--import-mode=importlib", *shapes]
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        session.run("pytest", *options, str(folder(name) / "tests"), *session.posargs, env=environment)


def check_alone(session: nox.Session, name: str) -> None:
    """Refuse an environment in which another package of this repository, or the source tree, can be imported."""
    others = [f"tenfold_{other}" for other in PACKAGES if other != name]
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        session.run("python", "-c", ALONE, f"tenfold_{name}", *others, env={"PYTHONPATH": None}, log=False)


def check_import_time(session: nox.Session, name: str) -> None:
    """Refuse a package whose import takes half as long as that of torch, or more, on top of it."""
    torch_times, own_times = [], []
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        # Other processes only ever add time, so the least of a few runs is what the imports cost; noise earns more runs, not a wider bound.
        for runs in range(1, 13):
            answer = session.run("python", "-c", IMPORT_TIME, f"tenfold_{name}", env={"PYTHONPATH": None}, silent=True, log=False)
            torch_time, own_time = map(float, str(answer).split()[-2:])
            torch_times.append(torch_time)
            own_times.append(own_time)
            ratio = min(own_times) / min(torch_times)
            if runs >= 3 and ratio < 0.5:
                session.log(f"import tenfold_{name}: {min(own_times):.2f} s on top of torch's {min(torch_times):.2f} s")
                return
    session.error(f"import tenfold_{name} takes {ratio:.2f} times as long as import torch, on top of it; it must stay under 0.5")


@nox.session
@each_distribution
def tests(session: nox.Session, name: str) -> None:
    """Install one distribution alone, from its wheel, and run its tests on it."""
    session.install(*own_wheels(session, name), *group(name, "test"), *pins())
    check_alone(session, name)
    run_tests(session, name)
    if name in PACKAGES:
        check_import_time(session, name)


def direct_requirements(name: str) -> list[str]:
    """What a distribution and its tests require, `tenfold-*` requirements replaced by what they stand for."""
    open_ones = [Requirement(text) for text in (*project(name)["project"].get("dependencies", []), *group(name, "test"))]
    found: dict[str, None] = {}
    while open_ones:
        requirement = open_ones.pop(0)
        if not requirement.name.startswith("tenfold-"):
            found[str(requirement)] = None
            continue
        tables = project(requirement.name.removeprefix("tenfold-"))["project"]
        extras = [tables["optional-dependencies"][extra] for extra in sorted(requirement.extras)]
        # The distribution under test has its own dependencies in the list already: only its extras are new.
        base = [] if requirement.name == tables["name"] == project(name)["project"]["name"] else tables.get("dependencies", [])
        open_ones += [Requirement(text) for table in (base, *extras) for text in table]
    return list(found)


def lowest_python() -> str | None:
    """The oldest supported Python on the path that answers (a version manager's stub may not), as `3.x`."""
    for version in ("3.10", "3.11", "3.12", "3.13"):
        program = shutil.which(f"python{version}")
        if program and subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0:
            return version
    return None


@nox.session(venv_backend="uv", python=lowest_python())
@each_distribution
def lowest(session: nox.Session, name: str) -> None:
    """Run a distribution's tests with the oldest Python and the lower bound of every dependency it declares."""
    session.install("--resolution", "lowest-direct", *own_wheels(session, name), *direct_requirements(name))
    check_alone(session, name)
    run_tests(session, name)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, imports between distributions, wheel contents, workflows and repository conventions."""
    names = [f"tenfold_{name}" for name in PACKAGES]
    tested = [requirement for name in DISTRIBUTIONS for requirement in group(name, "test")]
    session.install(*tools("lint"), *own_wheels(session, *PACKAGES), *tested, *pins())
    sources = os.pathsep.join(str(folder(name) / "src") for name in DISTRIBUTIONS)
    workflows = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(".github/workflows/*.y*ml"))

    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy", env={"MYPYPATH": sources})
    with tempfile.TemporaryDirectory() as temporary:
        contracts = Path(temporary) / "importlinter.ini"
        contracts.write_text(import_contracts(names), encoding="utf-8")
        session.run("lint-imports", "--config", str(contracts), "--no-cache", env={"PYTHONPATH": sources})
    for name in DISTRIBUTIONS:
        check_wheel(session, name)
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    session.run("zizmor", "--offline", "--no-progress", "--persona=pedantic", ".github")
    session.run("repo-review", ".", "--show=err")


def import_contracts(names: list[str]) -> str:
    """Import-linter's configuration for the packages of these import names."""
    listed = "".join(f"\n    {name}" for name in names)
    return "\n".join([
        f"[importlinter]\nroot_packages =\n    tenfold_shared{listed}",
        f"[importlinter:contract:apart]\nname = Packages never import one another\ntype = independence\nmodules ={listed}",
        "[importlinter:contract:below]\nname = tenfold_shared knows no paper\ntype = forbidden",
        f"source_modules =\n    tenfold_shared\nforbidden_modules ={listed}\n",
    ])  # fmt: skip


def check_wheel(session: nox.Session, name: str) -> None:
    """Refuse a wheel that lacks a file of the source tree, has any other, or comes without its recipes and claims."""
    archive, source = wheel(session, name), folder(name) / "src"
    session.run("check-wheel-contents", "--toplevel", f"tenfold_{name}", "--package", str(source / f"tenfold_{name}"), str(archive))
    packed = {entry for entry in zipfile.ZipFile(archive).namelist() if ".dist-info/" not in entry}
    present = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    if packed != present:
        session.error(f"{archive.name} and {source.relative_to(ROOT)} differ in: {', '.join(sorted(packed ^ present))}")
    recipes = [entry for entry in packed if entry.startswith(f"tenfold_{name}/recipes/") and entry.endswith(".yaml")]
    if name in PACKAGES and not (recipes and f"tenfold_{name}/claims.yaml" in packed):
        session.error(f"{archive.name} lacks tenfold_{name}/claims.yaml or tenfold_{name}/recipes/*.yaml")


@nox.session
@each_package
def reproduce(session: nox.Session, name: str) -> None:
    """Run a package's main job; what follows `--` goes to its command."""
    session.install(*own_wheels(session, name), *pins())
    session.run(f"tenfold-{name}", "reproduce", *session.posargs)


@nox.session
@each_package
def bench(session: nox.Session, name: str) -> None:
    """Run every benchmark of a package; what follows `--` goes to each."""
    session.install(*own_wheels(session, name), *group(name, "bench"), *pins())
    for script in sorted(folder(name).glob("benchmarks/*.py")):
        session.run("python", str(script), *session.posargs)


@nox.session
@each_distribution
def docs(session: nox.Session, name: str) -> None:
    """Run the examples of a package's README; for `shared`, see that every generated table is up to date."""
    session.install(*own_wheels(session, name), *pins())
    with tempfile.TemporaryDirectory() as empty, session.chdir(empty):
        if name == "shared":
            session.run("python", "-m", "tenfold_shared.report", "check", str(ROOT))
        else:
            session.run("python", "-c", README_EXAMPLES, str(folder(name) / "README.md"), log=False)


@nox.session(venv_backend="uv")
def constraints(session: nox.Session) -> None:
    """Write .github/constraints.txt anew: the newest versions that fit every distribution on every supported Python."""
    wanted = {"hatchling", *tools("nox"), *tools("lint")}
    for name in DISTRIBUTIONS:
        wanted.update(direct_requirements(name))
        wanted.update(text for table in project(name)["project"].get("optional-dependencies", {}).values() for text in table)
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.in"
        lines = sorted(text for text in wanted if not text.startswith("tenfold-"))
        requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
        how = ["--universal", "--python-version=3.10", "--upgrade", "--no-annotate", "--custom-compile-command=nox -s constraints"]
        session.run("uv", "pip", "compile", "--quiet", *how, "--output-file", str(CONSTRAINTS), str(requirements))


if __name__ == "__main__":
    nox.main()
