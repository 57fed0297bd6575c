"""From a YAML file and the command line to options."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from dreambooth.checks import check_config
from dreambooth.config import UserError
from dreambooth.files import read_text

C = TypeVar("C")
LARGEST_FILE = 2**18  # bytes of a file of options


def parse_config(config_class: type[C], description: str, argv: Sequence[str] | None = None) -> C:
    """Return the options of a training run, checked against each other. See `parse_options`."""
    return parse_options(config_class, description, argv, check_config)


def parse_options(
    config_class: type[C],
    description: str,
    argv: Sequence[str] | None = None,
    check: Callable[[C], None] = lambda config: None,
) -> C:
    """Return the options from `--config FILE`, overridden by the command line. Touches nothing but that file.

    What does not parse or does not go together ends the program with exit code 2 and a message that names the flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    known, rest = first_look.parse_known_args(argv)

    parser = HfArgumentParser(
        config_class, description=description, allow_abbrev=False, formatter_class=_ManPageFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins.")
    try:
        names = [option.name for option in fields(config_class)]
        flags = flags_from_yaml(known.config, names) if known.config is not None else []
        config, _, unknown = parser.parse_args_into_dataclasses(
            [*flags, *rest], look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            source = f" (on the command line or in {known.config})" if known.config else ""
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}{source}")
        check(config)
    except UserError as error:
        parser.error(str(error))
    return config


class _ManPageFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the module docstring's lines, and shows defaults."""


class _TextLoader(yaml.BaseLoader):
    """Hands on every value as it is written, so that 5e-4, no and true mean what they mean on a command line and one
    parser judges them all. Only a null that is not quoted is None, and a name that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return mapping


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def flags_from_yaml(path: str, names: Sequence[str]) -> list[str]:
    """Return the flags that a YAML file of the options `names` stands for; a null means the default."""
    try:
        options = yaml.load(read_text(Path(path), LARGEST_FILE), Loader=_TextLoader)
    # Beside its own errors, YAML has those of Python for characters that there are not, and for nests without end.
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path}: expected lines of the form 'option: value'")
    if strangers := [str(name) for name in options if name not in names]:
        raise UserError(f"--config {path}: there is no option {', '.join(strangers)}")
    flags = []
    for name, value in options.items():
        words = _words(value)
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"--config {path}: {name} is no list of plain values; put what holds ': ' in quotes")
        if any(re.search("[\0\ud800-\udfff]", word) for word in words):
            raise UserError(f"--config {path}: {name} holds a character that is no text: {words!a}")
        if isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif words:
            if flag := next((word for word in words if word.startswith("--")), None):
                raise UserError(f"--config {path}: {name} holds {flag}, which would be taken for an option")
            flags += [f"--{name}", *words]
    return flags


def _words(value: Any) -> list[Any]:
    """Return the words that a value stands for on a command line: {"to_k": ["8", "64"]} -> ["to_k=8,64"].

    What is no text stays as it is.
    """
    if isinstance(value, dict):
        lists = {key: entry if isinstance(entry, list) else [entry] for key, entry in value.items()}
        if all(isinstance(word, str) for key, entries in lists.items() for word in (key, *entries)):
            return [f"{key}={','.join(entries)}" for key, entries in lists.items()]
        return [value]
    if isinstance(value, list):
        return value
    return [] if value is None else [value]
