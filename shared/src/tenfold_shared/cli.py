"""A package's command built from plain functions: verbs, typed options, recipes, one-sentence errors, exit codes.

A verb is a function whose parameters are dataclasses (their fields become options, their attribute docstrings the help)
or plain typed values (their help is what the function's docstring says under Args)::

    COMMANDS = {"train": Command("tenfold_bip.train:train", "prune a network"), ...}

    def main() -> None:
        run_command("bip", COMMANDS)
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from .errors import Interrupted, RunFailure, UserError, did_you_mean

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class Command:
    """One verb: ``target`` is ``module:function``, imported only when the verb is called, so that help is instant."""

    target: str
    help: str

    def function(self) -> Callable[..., None]:
        """The function that does the work."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


SHARED_COMMANDS = {
    "claims": Command("tenfold_shared.reproduction:show_claims", "the paper's tables and what has been measured"),
    "recipes": Command("tenfold_shared.cli:show_recipes", "the recipes shipped, one line each"),
}


def run_command(slug: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse ``argv``, call the verb, and leave with its exit code (0 done, 1 failed, 2 usage or data, 130/143 stopped)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    warnings.formatwarning = _format_warning
    try:
        _dispatch(slug, {**commands, **SHARED_COMMANDS}, [a for a in arguments if a != "--debug"])
    except Interrupted as stop:
        _fail(f"interrupted; the state is saved, add --resume to go on (exit {stop.exit_code})", stop.exit_code, debug)
    except KeyboardInterrupt:
        _fail("interrupted", 130, debug)
    except UserError as error:
        _fail(str(error), 2, debug)
    except RunFailure as error:
        _fail(str(error), 1, debug)
    except BrokenPipeError:  # the reader of our output has gone: nothing to say and nobody to say it to
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


_format_of_others = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> str:
    """Ours is a sentence, without the line of code that gave it."""
    if category is UserWarning and any(part.startswith("tenfold_") for part in Path(filename).parts):
        return f"note: {message}\n"
    return _format_of_others(message, category, filename, *where, **more)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)


def _dispatch(slug: str, commands: Mapping[str, Command], arguments: list[str]) -> None:
    program = f"tenfold-{slug}"
    verb = arguments.pop(0) if arguments else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        print(f"usage: {program} VERB [OPTION ...]\n\nverbs ({program} VERB --help lists the options of one):")
        print("\n".join(f"  {name:{width}}{command.help}" for name, command in commands.items()))
        print("\noptions:\n  --version  print the version\n  --debug    show the traceback of an error")
        return
    if verb == "--version":
        print(f"{program} {importlib.metadata.version(program)}")
        return
    if verb not in commands:
        raise UserError(f"{program} has no verb {verb!r}{did_you_mean(verb, commands)}; {program} --help lists them")
    function = commands[verb].function()
    parser, assemble = _parser(program, verb, commands[verb], function)
    arguments = _normalised(parser, _config_first(slug, arguments))
    _refuse_unknown(parser, verb, arguments, commands)
    values = parser.parse_args(arguments)
    try:
        call = assemble(parser.instantiate(values))
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # a dataclass refused its fields in __post_init__
        raise UserError(str(error)) from error
    if "package" in inspect.signature(function).parameters:
        call["package"] = f"tenfold_{slug}"
    positional = call.pop(
        next((n for n, p in inspect.signature(function).parameters.items() if p.kind is p.VAR_POSITIONAL), ""), []
    )
    function(*positional, **call)


def _parser(program: str, verb: str, command: Command, function: Callable[..., None]) -> tuple[Any, Callable]:
    """A jsonargparse parser for the verb, and the function that turns its result into the call's arguments."""
    import docstring_parser  # noqa: PLC0415 - `tenfold-x --help` should not pay for it
    import jsonargparse  # noqa: PLC0415

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(f"{program} {verb}: {_sentence(message)}") from ex

    parser = Parser(prog=f"{program} {verb}", description=command.help)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    hints = typing.get_type_hints(function)
    documented = docstring_parser.parse_from_object(function).params
    texts = {entry.arg_name: entry.description or "" for entry in documented}
    explained = {name: text[:1].upper() + text[1:] for name, text in texts.items()}
    groups: dict[str, type] = {}
    plain: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if name == "package":  # filled in by the dispatcher
            continue
        if dataclasses.is_dataclass(kind):
            groups[name] = typing.cast(type, kind)
        else:
            plain.append(name)
            about = {"type": kind, "help": explained.get(name)}
            if parameter.kind is parameter.VAR_POSITIONAL:
                parser.add_argument(name, nargs="*", default=[], **about)
            elif parameter.default is inspect.Parameter.empty:
                parser.add_argument(f"--{name}", required=True, **about)
            else:
                parser.add_argument(f"--{name}", default=parameter.default, **about)
    if groups:
        parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="Recipe name or YAML file.")
    for kind in groups.values():
        parser.add_class_arguments(kind, None)

    def assemble(values: Any) -> dict[str, Any]:
        call = {
            name: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
            for name, kind in groups.items()
        }
        for name, options in call.items():  # a run is called after its recipe unless it is given a name
            if values.get("config") and getattr(options, "name", None) == "" and hasattr(options, "seed"):
                stem = Path(str(values["config"][0])).stem
                call[name] = dataclasses.replace(options, name=f"{stem}-seed{options.seed}")
        return {**call, **{name: values[name] for name in plain}}

    return parser, assemble


def _config_first(slug: str, arguments: list[str]) -> list[str]:
    """The arguments with ``--config`` moved to the front (so that options override it) and its name made a path."""
    config: list[str] = []
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config":
            value = next(pending, None)
            if value is None:
                raise UserError(
                    f"--config takes the name of a recipe or a YAML file; tenfold-{slug} recipes lists them"
                )
            config += ["--config", str(recipe_path(f"tenfold_{slug}", value))]
        elif argument.startswith("--config="):
            config += ["--config", str(recipe_path(f"tenfold_{slug}", argument.partition("=")[2]))]
        else:
            rest.append(argument)
    return config + rest


def _normalised(parser: Any, arguments: list[str]) -> list[str]:
    """The arguments as jsonargparse wants them: ``--some-option`` as ``--some_option``, a bare boolean option with its
    value, and ``--list a,b`` as ``--list [a,b]``.
    """
    kinds = {flag: getattr(action, "_typehint", None) for action in parser._actions for flag in action.option_strings}
    normal: list[str] = []
    pending = list(reversed(arguments))
    while pending:
        flag, equals, value = pending.pop().partition("=")
        if flag not in kinds and f"--{flag[2:].replace('-', '_')}" in kinds:
            flag = f"--{flag[2:].replace('-', '_')}"
        kind = kinds.get(flag)
        takes_list = typing.get_origin(kind) is list
        if kind is bool and not equals and (not pending or pending[-1].lower() not in ("true", "false")):
            equals, value = "=", "true"
        if takes_list and not equals and pending and not pending[-1].startswith("--"):
            equals, value = "=", pending.pop()
        if takes_list and equals and not value.startswith("["):
            value = f"[{value}]"
        normal.append(f"{flag}{equals}{value}")
    return normal


def recipes(package: str) -> dict[str, Path]:
    """Name to path of every recipe that the installed package ships."""
    folder = resources.files(package) / "recipes"
    if not folder.is_dir():
        return {}
    return {
        p.name[: -len(".yaml")]: Path(str(p)) for p in sorted(folder.iterdir(), key=str) if p.name.endswith(".yaml")
    }


def recipe_path(package: str, name_or_path: str) -> Path:
    """The file of a recipe given by its name, or the given file.

    Raises:
        UserError: it is neither a recipe nor a file.

    """
    known = recipes(package)
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    command = package.replace("_", "-")
    raise UserError(
        f"--config {name_or_path}: neither a file nor a recipe{did_you_mean(name_or_path, known)}; {command} recipes lists them"
    )


def show_recipes(package: str) -> None:
    """Print every recipe with its first comment line."""
    known = recipes(package)
    width = max(map(len, known), default=0) + 2
    for name, path in known.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}{first.lstrip('# ') if first.startswith('#') else ''}")


def load_recipe(package: str, name_or_path: str, kind: type, **changes: Any) -> Any:
    """The dataclass ``kind`` with the values of a recipe and ``changes`` (dotted names allowed) on top.

    Raises:
        UserError: the recipe does not exist, or a key or value of it is refused.

    """
    import jsonargparse  # noqa: PLC0415

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(f"recipe {name_or_path}: {_sentence(message)}") from ex

    path = recipe_path(package, name_or_path)
    parser = Parser()
    parser.add_class_arguments(kind, None)
    known, groups = _destinations(parser)
    values = _flatten(_read_yaml(path), groups.__contains__)
    for key in [*values, *changes]:
        if not _is_known(key, known, groups):
            raise UserError(f"recipe {name_or_path}: unknown key {key!r}{did_you_mean(key, known)}")
    _refuse_values(parser, values, groups, f"recipe {name_or_path}")
    namespace = parser.parse_path(path)
    try:
        for key, value in changes.items():
            namespace[key] = value
        parser.validate(namespace)
        built = parser.instantiate(namespace)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe {name_or_path}: {_sentence(str(error))}") from error
    return kind(**{field.name: built[field.name] for field in dataclasses.fields(kind) if field.init})


def given(options: Any) -> dict[str, Any]:
    """The fields of a dataclass of options that were given: None stands for one that was not."""
    return {name: value for name, value in vars(options).items() if value is not None}


def as_trained(kind: type[Options], trained: Mapping[str, Any], asked: Any) -> Options:
    """The data options of a checkpoint's training, changed in what is asked for; another data set begins at its defaults.

    Args:
        kind: the dataclass, of which ``name`` is the data set and ``root`` its folder.
        trained: its fields as the checkpoint keeps them; empty where it keeps none.
        asked: a dataclass with fields of these names, None for what is not asked for.

    """
    changes = given(asked)
    if changes.get("name", trained.get("name")) != trained.get("name"):
        trained = {}
    root = trained.get("root")
    return kind(**{**trained, "root": None if root is None else Path(root), **changes})


def to_yaml(*configurations: Any) -> str:
    """The fields of dataclasses as one YAML document that ``--config`` accepts."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    merged: dict[str, Any] = {}
    for configuration in configurations:
        merged |= plain(configuration)
    return yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)


def config_digest(*configurations: Any) -> str:
    """What tells folders of different configurations apart: the first digits of a hash of `to_yaml`."""
    return hashlib.sha256(to_yaml(*configurations).encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--config {path} is no readable YAML file: {' '.join(str(error).split())[:200]}") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"--config {path}: expected keys and values, got a {type(value).__name__}")
    return value or {}


def _flatten(values: Mapping[str, Any], is_group: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and is_group(name):
            flat |= _flatten(value, is_group, f"{name}.")
        else:
            flat[name] = value
    return flat


def _destinations(parser: Any) -> tuple[set[str], set[str]]:
    """Names of the options, and of the groups of options (nested dataclasses) that they lie in."""
    known = {action.dest for action in parser._actions}
    return known, {name.rsplit(".", n)[0] for name in known for n in range(1, name.count(".") + 1)}


def _is_known(key: str, known: set[str], groups: set[str]) -> bool:
    """Whether a key is an option, or an entry of one that takes a mapping."""
    parents = {key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)}
    return key in known or bool((parents & known) - groups)


def _refuse_unknown(parser: Any, verb: str, arguments: list[str], commands: Mapping[str, Command]) -> None:
    """Unknown options and recipe keys, refused with their full name and the nearest valid one."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    known, groups = _destinations(parser)
    previous = ""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if previous == "--config":
            values = _flatten(_read_yaml(Path(argument)), groups.__contains__)
            for key in values:
                if not _is_known(key, known, groups):
                    raise UserError(f"{parser.prog}: unknown key {key!r} in {argument}{did_you_mean(key, known)}")
            _refuse_values(parser, values, groups, f"{parser.prog}: {argument}")
        elif flag.startswith("--") and flag not in flags and not _is_known(flag[2:], known, groups):
            owners = [name for name in commands if name != verb and flag in _flags_of(commands[name])]
            elsewhere = f"; it is an option of {' and '.join(owners)}" if owners else did_you_mean(flag, flags)
            raise UserError(f"{parser.prog}: unknown option {flag}{elsewhere}; {parser.prog} --help lists the options")
        previous = argument


def _refuse_values(parser: Any, values: Mapping[str, Any], groups: set[str], where: str) -> None:
    """What jsonargparse lets pass in a file, or refuses in words of its own: null for any type, no mapping for a group."""
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    for key, value in values.items():
        if key in groups and not isinstance(value, str):  # a name is that of a file
            raise UserError(f"{where}: the key {key!r} takes keys and values, got {json.dumps(value, default=str)}")
        kind = kinds.get(key)
        if value is None and kind not in (None, Any) and not {None, type(None)} & {*typing.get_args(kind)}:
            name = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
            raise UserError(f"{where}: the key {key!r} takes {name.replace('typing.', '')}, got null")


def _flags_of(command: Command) -> set[str]:
    parser, _ = _parser("", "", command, command.function())
    return {flag for action in parser._actions for flag in action.option_strings}


def _sentence(message: str) -> str:
    """Jsonargparse's message on one line, in the words of the command line."""
    text = " ".join(message.split())
    if text.startswith('Parser key "'):
        key, _, rest = text[len('Parser key "') :].partition('":')
        union = re.search(r"Union subtypes Subtypes: \[(.*?)\] Errors: .*Given value: (.*)", rest)
        if union:
            kinds = (
                re.sub(r"<class '(\w+\.)*(\w+)'>", r"\2", union[1]).replace("typing.", "").replace("NoneType", "null")
            )
            ordered = sorted(re.split(r", (?![^[]*])", kinds))  # their order is the library version's
            return f"--{key} takes {' or '.join(ordered)}, got {union[2]!r}"
        expected, _, got = rest.strip().removeprefix("Expected a ").partition(". Got value: ")
        expected = expected.replace("typing.", "").replace("<class '", "").replace("'>", "")
        if expected.startswith("Literal["):
            expected = f"one of {expected[len('Literal[') : -1].replace(chr(39), '')}"
        return f"--{key} takes {expected}, got {got!r}" if got else f"--{key}: {rest.strip()}"
    return text
