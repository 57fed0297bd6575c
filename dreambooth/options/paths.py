"""Paths as people write them: ~ is the home folder in every option and argument of every program, quoted or not."""

import argparse
import os
from pathlib import Path

from dreambooth.errors import UserError


def expand_home(path: str, flag: str) -> str:
    """Return a path with ~ and ~user replaced by their folders; `flag` is what messages call it.

    Raises UserError if the path is empty, or there is no such user.
    """
    if not path.strip():
        raise UserError(f"{flag} is empty; give a path, or leave the option out")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = Path(expanded).parts[0]
        raise UserError(f"{flag} {path}: there is no user {user[1:]}; if {user} is a folder here, write ./{path}")
    return expanded


def path_argument(text: str) -> Path:
    """Return a path on a command line: a `type` for argparse."""
    return Path(path_or_name(text))


def path_or_name(text: str) -> str:
    """Return a path, or a name on the Hub, on a command line: a `type` for argparse."""
    try:
        return expand_home(text, "the path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_folder(folder: str, flag: str) -> None:
    """Raise UserError, before anything is computed, if files cannot be written to a folder, which may not exist yet."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a file" if existing == path else f"in {existing}, which is a file"
        raise UserError(f"{flag} {folder} is {what}; choose another folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {folder}: {existing} cannot be written to; choose another folder")
