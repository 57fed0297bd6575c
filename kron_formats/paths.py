"""Paths of this computer, and what becomes of them in files that are shared: their last part alone.

Importing this module does not import torch.
"""

import json
import ntpath
import os
import re
from collections.abc import Mapping
from typing import Any

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
LOCAL = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:")  # how a path begins that says where it is


def is_hub_name(name: str) -> bool:
    """Whether a model is a name on the Hub: it looks like one, and no such folder exists. Asks no server."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def last_part(path: str) -> str:
    """Return the last part of a path of any system: C:\\Users\\me\\dog -> dog."""
    return ntpath.basename(path.rstrip("/\\"))


def shared_name(name: str) -> str:
    """Return a model as files that are shared call it: a name on the Hub, or the last part of a path."""
    return name if is_hub_name(name) else last_part(name)


def shared_metadata(own: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of one of our files without the folders of the computer that wrote it, whichever it was."""
    shared = {key: _without_folders(key, value) for key, value in own.items() if key != "config"}
    if "base_model" in own:
        shared["base_model"] = shared_name(own["base_model"])
    try:
        config = json.loads(own.get("config", ""))
    except (ValueError, RecursionError):
        return shared  # what cannot be read cannot be cleared
    if isinstance(config, dict):
        shared["config"] = json.dumps({key: _without_folders(key, value) for key, value in config.items()})
    return shared


def _without_folders(key: str, value: Any) -> Any:
    """Return a value, of an option or in metadata, without folders. Prompts stay as they are."""
    if isinstance(value, list):
        return [_without_folders(key, entry) for entry in value]
    if isinstance(value, str) and "prompt" not in key and LOCAL.match(value):
        return last_part(value)
    return value
