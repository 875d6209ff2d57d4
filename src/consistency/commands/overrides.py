"""Overrides: options of the command line, quoted for Hydra, and command lines, quoted for a shell."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from consistency.commands import schema
from consistency.errors import require
from consistency.runtime.files import ROOT, expanded, path_of

OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
SWEEP = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)
FOLDERS = ("output", "hydra.run.dir", "hydra.sweep.dir")
"""Options that a sweep does not vary: a comma in them belongs to the path."""


POSITIONAL = {"plot": "runs"}
"""Verbs whose arguments without a name are paths, and the option that lists them."""
VALUED = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")  # fmt: skip
"""Flags of Hydra that take the next argument."""


def named(verb: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a verb with its positional paths as one option: `a b` of `plot` is runs=['a','b']."""
    if verb not in POSITIONAL:
        return list(arguments)
    paths, options = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument.startswith(("-", "~", "+")) or before in VALUED
        option = option or ("=" in argument and not _exists(argument))
        (options if option else paths).append(argument)
    listed = ",".join(quoted(expanded(path)) for path in paths)
    return [*options, f"{POSITIONAL[verb]}=[{listed}]"] if paths else options


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether the arguments start a sweep."""
    given = set(arguments)
    preset = any(a.startswith("search=") for a in arguments) and "search=null" not in given
    asked = preset or bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & given)
    return asked and "hydra.mode=RUN" not in given  # as a further rank of a job has it


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with every path quoted, so that Hydra's grammar takes it literally."""
    sweep = is_sweep(arguments)
    options = [option for argument in arguments for option in spelled_out(argument)]
    for option in options:
        _require_in_menu(option)
    return [_with_quoted_paths(option, sweep=sweep) for option in options]


def _require_in_menu(argument: str) -> None:
    """Refuse an argument of a part at its place in the mode instead of in the menu."""
    match = OVERRIDE.fullmatch(argument)
    key = match[2] if match else ""
    kinds = schema.places() if key.startswith(("mode.", "callbacks.")) else {}
    place = next((place for place in kinds if key.startswith(f"{place}.")), "")
    kind = kinds.get(place)
    expected = f"the arguments of a part at parts.{kind}.<name>, with the name of mode.{kind}"
    remedy = f"say parts.{kind}.<name>{key.removeprefix(place)}=<value>"
    require(not place, expected, argument, remedy)


def _with_quoted_paths(argument: str, *, sweep: bool) -> str:
    match = OVERRIDE.fullmatch(argument)
    if match is None or not schema.is_path(match[2]):
        return argument
    prefix, key, value = match.groups()
    single = not sweep or key in FOLDERS or _exists(value)
    if not single and SWEEP.fullmatch(value):
        return argument
    paths = [value] if single else _split_paths(value)
    return f"{prefix}{key}={','.join(map(_quoted_path, paths))}"


def _split_paths(value: str) -> Iterator[str]:
    """Split the paths of a sweep at commas: the longest that exist, else as short as possible."""
    parts = value.split(",")
    while parts:
        starts = [",".join(parts[:n]) for n in range(1, len(parts) + 1)]
        whole = [piece for piece in starts if piece.count("${") <= piece.count("}")]
        known = (p for p in starts[::-1] if QUOTED.fullmatch(p.strip()) or _exists(p.strip()))
        piece = next(known, (whole or starts[-1:])[0])
        yield piece if _exists(piece) else piece.strip()
        parts = parts[starts.index(piece) + 1 :]


def _exists(value: str) -> bool:
    return bool(value) and os.path.lexists(expanded(value))


def _quoted_path(value: str) -> str:
    """Quote a path, except null and an empty text; an interpolation works in quotes as well."""
    if QUOTED.fullmatch(value) and not _exists(value):
        value = str(OverridesParser.create().parse_override(f"x={value}").value())
    elif value.lower() in ("", "null"):
        return value
    return quoted(expanded(value))


def quoted(text: str) -> str:
    """Quote a text so that Hydra takes every character of it literally."""
    return QuotedString(text, Quote.single).with_quotes()


def spelled_out(argument: str) -> list[str]:
    """Spell out the short forms of a choice.

    null is its option `none`; a path is its option `file`: mask=a.png is mask=file mask.path=a.png. Several widths of
    an average are several sets of weights: weights=posthoc:[0.05,0.1].
    """
    if argument == "experiment=null":
        return []
    if widths := re.fullmatch(r"weights=posthoc:\[(.+)\]", argument):
        sets = (f"posthoc:{width.strip()}" for width in widths[1].split(","))
        return [f"weights=[{','.join(sets)}]"]
    group, _, value = argument.partition("=")
    choice = "sampler" if group == "samplers" else group.partition("@")[0]
    options = {file.stem for file in (ROOT / "conf" / choice).glob("*.yaml")}
    if options and "null" in value.split(","):
        expected = f"{group}= among {', '.join(sorted(options))}"
        require("none" in options, expected, argument, "choose one")
        return [f"{group}={','.join('none' if v == 'null' else v for v in value.split(','))}"]
    if "file" not in options or value in options or not group.isidentifier():
        return [argument]
    is_file = bool(Path(value).suffix) or path_of(value).is_file()
    return [f"{group}=file", f"{group}.path={value}"] if is_file else [argument]


def given_options(hydra: Any) -> list[str]:
    """Return the options of a job, unresolved; `hydra` is Hydra's own configuration."""
    options: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return list(map(str, options))


def changes(old: dict[str, Any], new: dict[str, Any], above: str = "") -> Iterator[str]:
    """Yield the overrides that turn the configuration `old` into `new`, except `output`."""
    for name in dict.fromkeys([*old, *new]):
        key = f"{above}.{name}" if above else name
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            yield from changes(old[name], new[name], key)
        elif name not in new:
            yield f"~{key}"
        elif key != "output" and (name not in old or old[name] != new[name]):
            yield f"++{key}={_literal(new[name])}"


def _literal(value: Any) -> str:
    """Write a plain value in Hydra's grammar."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_literal(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value)


def shell_line(verb: str, *options: str) -> str:
    """Return the command line of a verb, quoted for a shell."""
    return shlex.join([sys.executable, str(ROOT / "src" / f"{verb}.py"), *options])
