"""The error of everything that concerns adapters. Importing it imports nothing else."""


class KroneckerError(ValueError):
    """A request or a file that does not fit the model. The message is meant for the user."""
