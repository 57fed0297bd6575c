"""The libraries' warnings: each is shown once, in the main process, except those that tell the user nothing."""

import logging
import re

# Logger -> what its needless messages begin with. Exact, so that all other warnings are seen.
NEEDLESS = {
    # Optional packages that nothing here uses
    "transformers.utils.import_utils": r"`\w+` requires torchvision \(not installed\)",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community",
    # The toy world's base model has no safety checker, and training and scoring use none
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": r"You have disabled the safety checker for ",
    # It names none
    "diffusers.models.modeling_utils": r"There are modules in \w+ that should be kept in float32: \[\]",
    # dreambooth/tokens.py says which prompts are cut, and where they come from
    "transformers.tokenization_utils_base": r"Token indices sequence length is longer than ",
}
LIBRARIES = ("transformers", "diffusers", "huggingface_hub")


def drop_needless_warnings() -> None:
    """Have the needless messages dropped. Called before the libraries are imported, which causes some of them."""
    for name, beginning in NEEDLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Needless) for known in logger.filters):
            logger.addFilter(_Needless(beginning))


def show_library_warnings(is_main_process: bool = True) -> None:
    """Show the libraries' warnings among our own, each once. Imports them. Sets logging up if that is not done yet."""
    drop_needless_warnings()
    logging.basicConfig(format="%(levelname)s %(message)s")
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        log = library.utils.logging
        log.disable_default_handler()
        log.enable_propagation()
        if not is_main_process:
            log.set_verbosity_error()
    logging.getLogger("huggingface_hub").handlers.clear()  # its own one, which would say everything twice
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _Once) for known in handler.filters):
            handler.addFilter(_Once())


class _Needless(logging.Filter):
    """Drops messages with a given beginning."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.beginning.match(record.getMessage())


class _Once(logging.Filter):
    """Drops messages of the libraries that were shown before."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.name, record.getMessage()
        if record.name.split(".")[0] not in LIBRARIES:
            return True
        new = message not in self.shown
        self.shown.add(message)
        return new
