"""The result: the file or folder for other tools, with metadata that says how it was trained."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

from dreambooth.base_model.loading import DTYPES
from dreambooth.layout import AVERAGE_NAME, TRAINING_NAME, list_sheets
from dreambooth.loop.optimizers import evaluating
from dreambooth.loop.state import TrainingState
from dreambooth.method import LargeResult, trained_parameters
from dreambooth.options.field import shared_options
from dreambooth.options.training import TrainingConfig
from kron_formats.errors import KroneckerError
from kron_formats.files import open_safetensors, read_json
from kron_formats.layout import METADATA_PREFIX
from kron_formats.paths import last_part, shared_name


def write_result(path: Path, state: TrainingState, step: int, config: TrainingConfig) -> None:
    """Write what `step` optimizer steps have trained, whole or not at all."""
    with evaluating(state.optimizer):
        metadata = {**result_metadata(step, config), **state.base_metadata}
        state.attached.save(path, metadata, DTYPES[config.save_precision])


def write_average(folder: Path, weights_name: str, state: TrainingState, step: int, config: TrainingConfig) -> None:
    """Write the average of what trains, if there is one, as a result in a folder of its own in `folder`."""
    if state.average:
        (folder / AVERAGE_NAME).mkdir(exist_ok=True)
        with state.average.applied():
            write_result(folder / AVERAGE_NAME / weights_name, state, step, config)


def write_result_so_far(
    folder: Path, weights_name: str, state: TrainingState, step: int, config: TrainingConfig
) -> None:
    """Write into a checkpoint's folder what `step` optimizer steps have trained: the result, or a large one's parts."""
    if not isinstance(state.attached, LargeResult):
        write_result(folder / weights_name, state, step, config)
        write_average(folder, weights_name, state, step, config)
        return
    with evaluating(state.optimizer):
        state.attached.save_parts(folder, DTYPES[config.save_precision])


def result_sizes(state: TrainingState, config: TrainingConfig) -> tuple[int, int]:
    """Return about how large the result so far, as a checkpoint holds it, and the result are, bytes."""
    dtype, copies = DTYPES[config.save_precision], 2 if state.average else 1
    if isinstance(state.attached, LargeResult):
        so_far, size = state.attached.result_sizes(dtype)
        return so_far, copies * size
    size = sum(parameter.numel() for parameter in trained_parameters(state.attached)) * dtype.itemsize
    return copies * size, copies * size


def result_step(path: Path) -> int:
    """Return the optimizer steps that a result was trained for; 0 if there is none, or not one of ours."""
    try:
        if path.is_dir():
            return int(read_json(path / TRAINING_NAME).get("step", 0))
        with open_safetensors(path) as file:
            return int((file.metadata() or {}).get(f"{METADATA_PREFIX}step", 0))
    except (KroneckerError, ValueError, TypeError):
        return 0


def result_metadata(step: int, config: TrainingConfig) -> dict[str, str]:
    """Return the metadata of the result: base model, prompts, options, and a thumbnail if samples were drawn.

    They hold no folders of this computer, since the file is shared. With --no_metadata there are none.
    """
    if config.no_metadata:
        return {}
    return {
        "base_model": shared_name(config.pretrained_model_name_or_path),
        **({"base_adapter": " ".join(map(last_part, config.base_adapter))} if config.base_adapter else {}),
        "instance_prompt": config.instance_prompts,
        "class_prompt": "; ".join(config.class_prompts),
        "step": str(step),
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "config": json.dumps(shared_options(config)),
        **_thumbnail(Path(config.output_dir)),
    }


def _thumbnail(output: Path) -> dict[str, str]:
    """Return the newest sheet of samples, at most 256 px a side, under the key from which model browsers show it."""
    sheets = list_sheets(output)
    if not sheets:
        return {}
    image, buffer = Image.open(sheets[-1]).convert("RGB"), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(buffer, "JPEG")
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
