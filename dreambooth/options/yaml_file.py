"""Options as a YAML file: read into flags, so that one parser judges all, and written so that they read back."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dreambooth.errors import UserError
from dreambooth.options.field import public_options
from dreambooth.options.foreign import explain_unknown
from kron_formats.files import read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_FILE = 2**18  # bytes


def save_config(config: "DataclassInstance", path: Path) -> None:
    """Write the options as YAML that `--config` reads back. Secrets, and what is None or empty, are left out."""
    options = {name: value for name, value in public_options(config).items() if value not in (None, [])}
    path.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _TextLoader(yaml.BaseLoader):
    """Keeps every value as text, so that 5e-4, no and true mean what they mean on the command line. Only an unquoted
    null is None, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return mapping


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def flags_from_yaml(path: str, names: Sequence[str]) -> list[str]:
    """Return the flags that a YAML file of the options `names` stands for; a null means the default.

    Raises UserError, naming the file, if it is anything else; the file is untrusted.
    """
    try:
        options = yaml.load(read_text(Path(path), LARGEST_FILE), Loader=_TextLoader)
    # YAML raises Python's own errors for invalid code points and for endless nesting.
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path}: expected lines of the form 'option: value'")
    if unknown := [str(name) for name in options if name not in names]:
        answers = "; ".join(f"{name} ({explain_unknown(name, names)})" for name in unknown)
        raise UserError(f"--config {path}: unknown keys: {answers}")
    flags = []
    for name, value in options.items():
        words = _words(value)
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"--config {path}: {name} is not a list of plain values; quote text that contains ': '")
        if any(re.search("[\0\ud800-\udfff]", word) for word in words):
            raise UserError(f"--config {path}: {name} holds a character that is not text: {words!a}")
        if isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif words:
            if flag := next((word for word in words if word.startswith("--")), None):
                raise UserError(f"--config {path}: {name} holds {flag}, which would be taken for an option")
            flags += [f"--{name}", *words]
    return flags


def _words(value: Any) -> list[Any]:
    """Return the words that a value stands for on a command line: {"to_k": ["8", "64"]} -> ["to_k=8,64"].

    What is not text stays as it is.
    """
    if isinstance(value, dict):
        lists = {key: entry if isinstance(entry, list) else [entry] for key, entry in value.items()}
        if all(isinstance(word, str) for key, entries in lists.items() for word in (key, *entries)):
            return [f"{key}={','.join(entries)}" for key, entries in lists.items()]
        return [value]
    if isinstance(value, list):
        return value
    return [] if value is None else [value]
