"""Errors that the user can fix, and how a program ends on one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kron_formats.errors import KroneckerError


class UserError(ValueError):
    """Something the user can fix. The message says what is wrong, where, and what to do."""

    exit_code = 2  # argparse's own


class SaveError(UserError):
    """Something could not be written, for example to a full disk."""

    exit_code = 74  # EX_IOERR of sysexits.h


@contextmanager
def readable_errors(*kinds: type[Exception]) -> Iterator[None]:
    """On a UserError, a KroneckerError or one of `kinds`, print the message alone and exit with the error's own
    `exit_code`, 2 by default. Other errors keep their traceback."""
    try:
        yield
    except (UserError, KroneckerError, *kinds) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))
