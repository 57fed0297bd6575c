"""The error of everything that concerns adapters. Importing it imports nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager


class KroneckerError(ValueError):
    """A request or a file that does not fit the model. The message is meant for the user."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of a KroneckerError with what it is about."""
    try:
        yield
    except KroneckerError as error:
        raise KroneckerError(f"{what}: {error}") from error
