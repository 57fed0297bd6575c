"""A base model in one file, in the layout of Stability's code: what its header says, before any weights are read.

Users of SD 1.5, SDXL and their descendants have such files. Only safetensors are opened, never a pickle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kron_formats.custom_diffusion import is_custom_diffusion
from kron_formats.errors import KroneckerError
from kron_formats.families import FAMILIES, SDXL, Family
from kron_formats.files import excerpt, open_safetensors

UNET = "model.diffusion_model."
VAE = "first_stage_model."
FIRST, LAST = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"  # the convolutions at the UNet's ends
REFINER = "conditioner.embedders.0.model."  # the refiner's only text encoder, which SDXL has as its second
EDM, CONTINUOUS = "edm_mean", "edm_vpred.sigma_max"  # tensors that say what the noise is: Playground's, CosXL's

# What the UNet of another task gets besides the latents, by its number of input channels
OTHER_TASKS = {
    5: "a depth map",
    7: "a small image, to enlarge it",
    8: "another image, as instruct-pix2pix and video models do",
    9: "a masked image, for inpainting",
}
# What a file with a denoiser of another kind is, by the beginning of a name in it
NOT_UNETS = {
    f"{UNET}joint_blocks.": "of the Stable Diffusion 3 family, which is not supported",
    f"{UNET}double_blocks.": "of the Flux family, which is not supported",
    "control_model.": "a ControlNet, not a base model",
}
# What a file without a UNet is, by part of a name in it
OTHER_FILES = (
    (("lora_", ".lora.", ".lokr_", ".hada_", ".kron_a"), "an adapter, not a base model: it goes to --adapter"),
    ((".delta",), "an SVDiff file, not a base model: it goes to --adapter"),
    (("joint_blocks.",), "of the Stable Diffusion 3 family, which is not supported"),
    (("double_blocks.", "single_transformer_blocks."), "of the Flux family, which is not supported"),
    (("control_model.", "controlnet_"), "a ControlNet, not a base model"),
    (
        ("down_blocks.", "time_embedding."),
        "one component of a model in diffusers' layout; name the folder that has model_index.json instead",
    ),
    (("input_blocks.",), "a UNet alone; a base model in one file also holds a VAE and text encoders"),
    (
        ("first_stage_model.", "encoder.conv_in.", "decoder.conv_in."),
        "a VAE, not a base model: it goes to --pretrained_vae_model_name_or_path",
    ),
    (("text_model.", "transformer.resblocks.", "token_embedding."), "a text encoder, not a base model"),
    (
        ("emb_params", "string_to_param", "clip_l", "clip_g", "<"),
        "an embedding of words, not a base model: it goes to --adapter",
    ),
)


@dataclass(frozen=True)
class SingleFile:
    """The header of a file with the tensors of a base model, or of its VAE."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @property
    def prediction_type(self) -> str | None:
        """What the UNet predicts, in diffusers' words; None if the file does not say.

        A tensor named v_pred says it in ComfyUI's files, metadata in those of others.
        """
        if "v_pred" in self.shapes or self.metadata.get("ss_v_parameterization") == "True":
            return "v_prediction"
        said = self.metadata.get("modelspec.prediction_type") or self.metadata.get("modelspec.predict_key")
        return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said or "")

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the file says that the last timestep is pure noise: by a tensor named ztsnr, or kohya's metadata."""
        return "ztsnr" in self.shapes or self.metadata.get("ss_zero_terminal_snr") == "True"

    @property
    def is_edm(self) -> bool:
        """Whether the model's noise is EDM's."""
        return EDM in self.shapes

    def has(self, prefix: str) -> bool:
        """Whether the name of a tensor begins with `prefix`."""
        return any(key.startswith(prefix) for key in self.shapes)


def read_header(path: Path) -> SingleFile:
    """Return what a safetensors file says it holds. Raises KroneckerError if it is something else, or empty."""
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        metadata = file.metadata() or {}
    if not shapes:
        raise KroneckerError(f"{path} holds no tensors")
    return SingleFile(path, shapes, metadata)


def family_of_file(file: SingleFile) -> Family:
    """Return the family of a base model in one file. Raises KroneckerError, saying what it is, if it is of none."""
    if not file.has(UNET):
        raise KroneckerError(f"{file.path} is {_other_kind(file)}")
    if (beginning := next((key for key in NOT_UNETS if file.has(key)), None)) is not None:
        raise KroneckerError(f"{file.path} is {NOT_UNETS[beginning]}")
    if CONTINUOUS in file.shapes:
        raise KroneckerError(f"{file.path} was trained on continuous noise levels ({CONTINUOUS}), as CosXL was")
    _check_task(file)
    for family in FAMILIES:
        if file.has(family.text_encoders[-1].checkpoint):
            _check_conditions(file, family)
            return family
    if file.has(REFINER):
        raise KroneckerError(f"{file.path} is SDXL's refiner, not its base model")
    raise KroneckerError(f"{file.path} has a UNet, but no text encoder of {_titles()}")


def _check_task(file: SingleFile) -> None:
    """Raise KroneckerError if the UNet gets more than noisy latents. A file may lack what this is seen from."""
    if FIRST not in file.shapes or LAST not in file.shapes:
        return
    channels, latents = file.shapes[FIRST][1], file.shapes[LAST][0]
    if channels != latents:
        gets = OTHER_TASKS.get(channels, "something else")
        raise KroneckerError(
            f"{file.path} is a model of another task: its UNet takes {channels} channels, returns {latents}, and "
            f"besides the noisy latents gets {gets}"
        )


def _check_conditions(file: SingleFile, family: Family) -> None:
    """Raise KroneckerError if the UNet has label embeddings, as SDXL's sizes are, in a family that has none."""
    if file.has(f"{UNET}label_emb.") != (family is SDXL) and FIRST in file.shapes:
        has = "has" if file.has(f"{UNET}label_emb.") else "lacks"
        raise KroneckerError(
            f"{file.path} has the text encoders of {family.title}, but its UNet {has} label_emb: it is a model of "
            "another task, such as unCLIP"
        )


def _other_kind(file: SingleFile) -> str:
    if is_custom_diffusion(file.shapes):
        return "a Custom Diffusion file, not a base model: it goes to --adapter"
    for parts, words in OTHER_FILES:
        if any(part in key for key in file.shapes for part in parts):
            return words
    first = excerpt(min(file.shapes))
    return f"not a base model in one file: none of its {len(file.shapes)} tensors, such as {first}, begins with {UNET}"


def _titles() -> str:
    return ", ".join(family.title for family in FAMILIES)
