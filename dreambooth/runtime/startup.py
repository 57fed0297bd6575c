"""A short start: importing diffusers without two costs that no run has to pay."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth.runtime.library_warnings import drop_needless_warnings

# If it is installed, diffusers imports it, and with it PyTorch's compiler, for models that were saved quantised. Here
# dreambooth/base_model/quantise.py quantises base models as they are loaded, and imports bitsandbytes itself.
SPARED = "bitsandbytes"


@contextmanager
def lean_imports() -> Iterator[None]:
    """Make the first import of diffusers cheaper and quiet: a context for the program's heavy imports.

    Inside it bitsandbytes is hidden, and garbage is not collected, since imports leave none. Afterwards the collector
    ignores everything that was imported.
    """
    drop_needless_warnings()
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
