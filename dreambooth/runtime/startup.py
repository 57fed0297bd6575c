"""A short start: two costs of importing diffusers that no run has to pay."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Diffusers imports it if it is installed, and with it PyTorch's compiler, to load models that were saved quantised.
# Here a base model is quantised as it is loaded, by dreambooth/base_model/quantise.py, which imports it itself.
SPARED = "bitsandbytes"


@contextmanager
def lean_imports() -> Iterator[None]:
    """Inside this context, the program's first heavy imports: what they do not need is hidden, and garbage is not
    collected, since imports make none; afterwards never among what was imported."""
    if "diffusers" in sys.modules:
        yield
        return
    sys.modules[SPARED] = None  # pyright: ignore[reportArgumentType]  None is how Python marks a module as absent
    gc.disable()
    try:
        yield
    finally:
        del sys.modules[SPARED]
        gc.freeze()
        gc.enable()
