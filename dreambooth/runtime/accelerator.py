"""The accelerator: devices, precision, logging and random state, set up from the options."""

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed

from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.library_warnings import show_library_warnings
from dreambooth.runtime.ranks import PATIENCE, check_sharding


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator; set up logging, TF32 and the global seed.

    Raises UserError if the launcher's settings, the precision or the trackers are not supported.
    """
    check_sharding(config)
    try:
        accelerator = Accelerator(
            # Explicit: accelerate connects several processes without a GPU only if it is told to use the CPU.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[PATIENCE],
            # Batches are endless, so accelerate must not sync at the end of a data loader: with 5 images and
            # accumulation 4, full and quarter gradients would alternate.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if "none" in config.report_to else [*config.report_to],
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=os.path.join(config.output_dir, config.logging_dir)
            ),
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {config.mixed_precision} --report_to {' '.join(config.report_to)}: {error}"
        ) from error
    if config.base_precision == "fp16" and accelerator.mixed_precision != "fp16":
        raise UserError("--base_precision fp16 needs --mixed_precision fp16, which scales the loss; or use bf16")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=level, force=True)
    for noisy in ("httpx", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    show_library_warnings(accelerator.is_main_process)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    return accelerator
