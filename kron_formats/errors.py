"""What goes wrong with adapters and their files. Imports nothing, so that anything may catch it."""


class KroneckerError(ValueError):
    """A request or a file that does not fit the model. The message is meant for the user."""
