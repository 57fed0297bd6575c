"""A short start: two costs of importing diffusers that no run has to pay."""

import gc
import sys

# Diffusers imports it wherever it is installed, and that PyTorch's compiler, to load models that were saved quantised.
# Here a base model is quantised as it is loaded, by dreambooth/quantise.py, which imports it itself.
SPARED = "bitsandbytes"


def before_imports() -> None:
    """Hide what is not needed, and stop looking for garbage: imports make none."""
    sys.modules[SPARED] = None
    gc.disable()


def after_imports() -> None:
    """Look for garbage again, but never among what was imported, neither between steps nor at the end."""
    del sys.modules[SPARED]
    gc.freeze()
    gc.enable()
