"""Options as a YAML file: read into flags, for the same parser as the command line, and written so as to read back."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dreambooth.errors import UserError
from dreambooth.options.field import declarations, option_names, public_options, shared_options
from dreambooth.options.foreign import explain_unknown
from dreambooth.options.paths import expand_home
from kron_formats.files import read_text, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_FILE = 2**18  # bytes


def save_config(config: "DataclassInstance", path: Path) -> None:
    """Write the options as YAML that `--config` reads back. Secrets, None and empty lists are left out."""
    write_text(path, _yaml(public_options(config)))


def shared_yaml(config: "DataclassInstance") -> str:
    """Return the same for others to read: of paths on this computer, only the last part."""
    return _yaml(shared_options(config))


def _yaml(options: dict[str, Any]) -> str:
    given = {name: value for name, value in options.items() if value not in (None, [])}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


class _TextLoader(yaml.BaseLoader):
    """Keeps every value as text: 5e-4, no and true mean what they mean on the command line. Only an unquoted null is
    None, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return mapping


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def read_mapping(path: str, flag: str) -> dict[str, Any]:
    """Return the entries of a YAML file, every value as text, in lists and dicts where it has them; null is None.

    The file is untrusted: UserError, beginning with the flag that names it, if it is anything else.
    """
    try:
        text = read_text(Path(path), LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: {error}") from error
    return _mapping_in(text, f"{flag} {path}")


def nested_value(text: str, flag: str) -> dict[str, Any]:
    """Return the value of a nested option: in the YAML file that `text` names, or written out as {name: value}.

    Raises UserError, beginning with the flag, as `read_mapping` does.
    """
    mapping = _mapping_in(text, flag) if text.startswith("{") else read_mapping(expand_home(text, flag), flag)
    if not_text := re.search("[\0\ud800-\udfff]", json.dumps(mapping, ensure_ascii=False)):
        raise UserError(f"{flag} contains a character that is not text: {not_text[0]!a}")
    return mapping


def _mapping_in(text: str, source: str) -> dict[str, Any]:
    try:
        entries = yaml.load(text, Loader=_TextLoader)
    # For invalid code points and endless nesting, PyYAML raises Python's own errors.
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{source}: {error}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{source}: expected lines of the form 'option: value'")
    return entries


def flags_from_yaml(path: str, config_class: type["DataclassInstance"]) -> list[str]:
    """Return the flags equivalent to a YAML file with the options of a class; null means the default.

    The file is untrusted: UserError, naming it, if it is anything else.
    """
    options = read_mapping(path, "--config")
    if unknown := [str(name) for name in options if name not in option_names(config_class)]:
        answers = "; ".join(f"{name} ({explain_unknown(name, config_class)})" for name in unknown)
        raise UserError(f"--config {path}: unknown keys: {answers}")
    declared = declarations(config_class)
    written_out = {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in options.items()
        if declared[name].nested and isinstance(value, dict)
    }
    paths = [name for name in options if declared[name].path]
    return flags_of({**options, **written_out}, f"--config {path}", paths)


def flags_of(options: Mapping[str, Any], source: str, paths: Sequence[str] = ()) -> list[str]:
    """Return the flags equivalent to options as `read_mapping` returns them; None means the default.

    Raises UserError, beginning with `source`, for what no flag can mean. Only options in `paths` may hold bytes that
    are not text, since Unix has files with such names.
    """
    flags = []
    for name, value in options.items():
        words = _words(value)
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{source}: {name} is not a list of plain values; quote text that contains ': '")
        not_text = "[\0]" if name in paths else "[\0\ud800-\udfff]"
        if any(re.search(not_text, word) for word in words):
            raise UserError(f"{source}: {name} contains a character that is not text: {words!a}")
        if isinstance(value, str):
            flags.append(f"--{name}={value}")
        elif words:
            if flag := next((word for word in words if word.startswith("--")), None):
                raise UserError(f"{source}: {name} contains {flag}, which would be taken for an option")
            flags += [f"--{name}", *words]
    return flags


def _words(value: Any) -> list[Any]:
    """Return a value as words of a command line: {"to_k": ["8", "64"]} -> ["to_k=8,64"].

    What is not text is returned as it is.
    """
    if isinstance(value, dict):
        lists = {key: entry if isinstance(entry, list) else [entry] for key, entry in value.items()}
        if all(isinstance(word, str) for key, entries in lists.items() for word in (key, *entries)):
            return [f"{key}={','.join(entries)}" for key, entries in lists.items()]
        return [value]
    if isinstance(value, list):
        return value
    return [] if value is None else [value]
