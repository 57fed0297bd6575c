"""Errors that the user can fix, and how a program ends on one."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth.console import print_anything
from kron_formats.errors import KroneckerError

logger = logging.getLogger(__name__)


class UserError(ValueError):
    """Something the user can fix. The message says what is wrong, where, and what to do."""

    exit_code = 2  # argparse's own


class SaveError(UserError):
    """Something could not be written, for example to a full disk."""

    exit_code = 74  # EX_IOERR of sysexits.h


@contextmanager
def readable_errors() -> Iterator[None]:
    """The outermost context of a program, in which it can print any text.

    On a UserError or a KroneckerError, it prints the message alone and exits with the error's own `exit_code`, 2 by
    default. Other errors keep their traceback.
    """
    print_anything()
    try:
        yield
    except (UserError, KroneckerError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))


@contextmanager
def warn_only(consequence: str) -> Iterator[None]:
    """Turn any error in this context into a warning that begins with `consequence`, for what must not end training."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s", consequence, type(error).__name__, error)
