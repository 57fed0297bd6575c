"""Parse options from a YAML file and the command line, and check them."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from dreambooth.errors import UserError
from dreambooth.options.checking import check_options, idle_options
from dreambooth.options.field import Declaration, declarations, describe_group, groups_of, option_names, public_options
from dreambooth.options.foreign import explain_unknown
from dreambooth.options.paths import expand_home
from dreambooth.options.yaml_file import flags_from_yaml, nested_value

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}
HINT = "--help lists all options"


def parse_options(config_class: type[C], description: str | None, argv: Sequence[str] | None = None) -> C:
    """Return the options from `--config FILE`, overridden by the command line and checked by `check_options`.

    Reads only that file and those that nested options name, and writes nothing. If anything is wrong, exits with code 2
    and a message that names the flags. Options that were set and have no effect are warned of, by the first of several
    processes.
    """
    try:
        config = read_options(config_class, description, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}\n{HINT}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    if os.environ.get("RANK", "0") == "0":
        public = public_options(config)
        for name, lack in idle_options(config).items():
            value = f" {_words(public[name])}" if name in public else ""
            print(f"warning: --{name}{value} has no effect {lack}", file=sys.stderr, flush=True)
    return config


def read_options(config_class: type[C], description: str | None, argv: Sequence[str]) -> C:
    """Return the same options. Raises UserError if anything is wrong with them; warns of nothing."""
    config = _parse(config_class, description, argv)
    check_options(config)
    return config


def _parse(config_class: type[C], description: str | None, argv: Sequence[str]) -> C:
    _refuse_unknown(argv, config_class)
    first_look = _Parser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    known, rest = first_look.parse_known_args(argv)
    flags = []
    if known.config is not None:
        flags = flags_from_yaml(expand_home(known.config, "--config"), config_class)
    *groups, _, strays = _build_parser(config_class, description).parse_args_into_dataclasses(
        [*flags, *rest], look_for_args_file=False, return_remaining_strings=True
    )
    if strays:
        source = f" (on the command line or in {known.config})" if known.config else ""
        raise UserError(f"unexpected: {' '.join(strays)}{source}")
    declared = declarations(config_class)
    values = {name: value for group in groups for name, value in vars(group).items()}
    return config_class(**{name: _meant(name, value, declared[name]) for name, value in values.items()})


def _meant(name: str, value: Any, declared: Declaration) -> Any:
    """Return what an option means by its value: paths with ~ replaced, what is nested read from its file.

    Raises UserError if text is not text, or the file cannot be read.
    """
    if declared.nested and isinstance(value, str):
        return nested_value(value, f"--{name}")
    if isinstance(value, list):
        return [_meant(name, entry, declared) for entry in value]
    if not isinstance(value, str):
        return value
    if declared.path:
        return expand_home(value, f"--{name}")
    if re.search("[\ud800-\udfff]", value):  # bytes that are not text in the system's encoding, as Python has them
        raise UserError(f"--{name} contains a character that is not text: {value!a}")
    return value


def _refuse_unknown(argv: Sequence[str], config_class: type["DataclassInstance"]) -> None:
    """Raise UserError, saying what to use instead, if a flag is not an option.

    This comes first: a command pasted from another trainer would also lack what is required here.
    """
    names = option_names(config_class)
    known = {*names, *(f"no_{name}" for name in names), "config", "help", "local_rank"}
    flags = [match[1] for word in argv if (match := re.match(r"--([A-Za-z][\w-]*)(=|$)", word))]
    unknown = [flag for flag in dict.fromkeys(flags) if flag.replace("-", "_") not in known]
    if unknown:
        raise UserError(
            "\n".join(f"--{flag}: {explain_unknown(flag.replace('-', '_'), config_class)}" for flag in unknown)
        )


class _Parser(HfArgumentParser):
    """Raises UserError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        # argparse names a flag in all its spellings: "argument --kron_a1/--kron-a1: invalid int value: 'x'"
        raise UserError(re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", message.removeprefix("argument ")))


def _build_parser(config_class: type["DataclassInstance"], description: str | None) -> _Parser:
    own_fields = {entry.name: entry for entry in fields(config_class)}
    groups: list[Any] = [
        make_dataclass(
            group.__name__,
            [
                (name, str | None if declared.nested else own_fields[name].type, _flag(own_fields[name], declared))
                for name, declared in options.items()
            ],
            namespace={"_argument_group_name": describe_group(group)},
            kw_only=True,
        )
        for group, options in groups_of(config_class).items()
    ]
    parser = _Parser(
        groups,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the module docstring's lines
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line overrides it.")
    # torch's old launcher passes this flag; accelerate reads the same number from the environment
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _flag(own: Field, declared: Declaration) -> Any:
    """Return the field from which HfArgumentParser makes a flag: its metadata are argparse's keyword arguments."""
    default = own.default if own.default_factory is MISSING else own.default_factory()
    shown = "required" if default is MISSING else f"default: {_words(default)}"
    tells_nothing = default is None or default is False or default in ("", [])
    text = declared.help if tells_nothing else f"{declared.help} ({shown})"
    metadata: dict[str, Any] = {"help": text.replace("%", "%%")}
    if declared.nested:
        metadata["metavar"] = "FILE"
    elif declared.choices is not None:
        metadata["choices"] = declared.choices
    elif metavars := [METAVARS[kind] for kind in _kinds(own.type) if kind in METAVARS]:
        metadata["metavar"] = "|".join(metavars)
    if own.default_factory is not MISSING:
        return field(default_factory=own.default_factory, metadata=metadata)
    return field(default=own.default, metadata=metadata)


def _kinds(kind: Any) -> list[Any]:
    """Return a field's type and its members: int | None -> [int | None, int, NoneType]."""
    return [kind, *getattr(kind, "__args__", ())]


def _words(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
