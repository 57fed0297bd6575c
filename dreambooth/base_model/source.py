"""What a base model is: where its configurations and its weights are. All that reads one asks here.

    folder, or name on the Hub    configurations, tokenizers and weights, in diffusers' layout
    one file                      the weights alone; configurations and tokenizers are those of --base_config

A VAE of its own is one component in diffusers' layout, or one file, whose configuration is the base model's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth.base_model.adapted import AdaptedWeights
from dreambooth.base_model.configurations import Configurations
from dreambooth.base_model.mistaken import explain_file
from dreambooth.base_model.process import EDM, with_noise
from dreambooth.base_model.weights import FileWeights, FolderWeights, Weights
from dreambooth.errors import UserError
from dreambooth.options.base_model import BaseModelOptions
from kron_formats.errors import KroneckerError
from kron_formats.families import SD2, TOKENIZERS, Family
from kron_formats.single_file import SingleFile, family_of_file, read_header


@dataclass(frozen=True)
class Source:
    """Where a base model, or a VAE of its own, is. Nothing has been read but perhaps the header of its file."""

    configurations: Configurations
    weights: Weights
    file: SingleFile | None = None
    family: Family | None = None  # of a base model in one file

    @property
    def pipeline_class(self) -> str | None:
        """The name of the pipeline's class. For one file, it follows from the file alone."""
        return self.family.pipeline if self.family else self.configurations.index.get("_class_name")


def base_source(config: BaseModelOptions) -> Source:
    """Return where the base model is. Reads at most a file's header.

    Raises UserError if it is a file that is not a base model, or that does not exist.
    """
    name = config.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {name}"
    file = _read_file(name, flag)
    if file is None:
        if config.base_config is not None:
            raise UserError(f"--base_config {config.base_config} is for a base model in one file; {flag} is not one")
        configurations = Configurations(flag, name, {"revision": config.revision, "cache_dir": config.cache_dir})
        return _adapted(Source(configurations, FolderWeights(configurations, config.variant)), config)
    for option in ("variant", "revision"):
        if value := getattr(config, option):
            raise UserError(f"--{option} {value} is for a model in diffusers' layout; {flag} is one file")
    with _flagged(flag):
        family = family_of_file(file)
    configurations = _configurations_of(file, family, config)
    return _adapted(Source(configurations, FileWeights(file, configurations, flag, family), file, family), config)


def _adapted(source: Source, config: BaseModelOptions) -> Source:
    """Return a base model with the adapters that are part of it."""
    if not config.base_adapter:
        return source
    return replace(source, weights=AdaptedWeights(source.weights, source.configurations, tuple(config.base_adapter)))


def vae_source(config: BaseModelOptions) -> Source:
    """Return where the VAE is: in the base model, or what --pretrained_vae_model_name_or_path names."""
    name = config.pretrained_vae_model_name_or_path
    if not name:
        return base_source(config)
    flag = f"--pretrained_vae_model_name_or_path {name}"
    if (file := _read_file(name, flag)) is not None:
        configurations = base_source(config).configurations
        return Source(configurations, FileWeights(file, configurations, flag), file)
    configurations = Configurations(flag, name, {"cache_dir": config.cache_dir}, is_vae=True)
    return Source(configurations, FolderWeights(configurations, variant=None))


def load_tokenizers(config: BaseModelOptions) -> dict[str, Any]:
    """Return text encoder -> its tokenizer, for the text encoders that a base model has. Reads no weights."""
    configurations = base_source(config).configurations
    return {
        encoder: configurations.load(tokenizer)
        for encoder, tokenizer in TOKENIZERS.items()
        if tokenizer in configurations.classes
    }


def load_scheduler(config: BaseModelOptions) -> Any:
    """Return the base model's scheduler, with the noise that the options, the file or its configuration say.

    They count in this order. Raises UserError if none of them says what a Stable Diffusion 2 predicts.
    """
    source = base_source(config)
    prediction_type, zero_snr, file = config.prediction_type, config.rescale_betas_zero_snr, source.file
    if file is not None:
        prediction_type = prediction_type or file.prediction_type
        zero_snr = zero_snr or file.has_zero_terminal_snr
    if source.family is SD2 and prediction_type is None and config.base_config is None:
        raise UserError(
            f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path} does not say what it predicts: "
            "give --prediction_type epsilon for a Stable Diffusion 2 made at 512 px, or v_prediction for one at 768 px"
        )
    scheduler = source.configurations.load("scheduler")
    if file is not None and file.is_edm and type(scheduler).__name__ not in EDM:
        raise UserError(
            f"--pretrained_model_name_or_path {file.path} was trained with EDM's noise, but "
            f"{source.configurations.flag} has a {type(scheduler).__name__}"
        )
    return with_noise(scheduler, prediction_type, zero_snr)


def _configurations_of(file: SingleFile, family: Family, config: BaseModelOptions) -> Configurations:
    """Return where the configurations of a base model in one file are. Asks no server yet."""
    hub = {"cache_dir": config.cache_dir}
    if config.base_config is not None:
        return Configurations(f"--base_config {config.base_config}", config.base_config, hub)
    if file.is_edm:
        raise UserError(
            f"--pretrained_model_name_or_path {file.path} was trained with EDM's noise; name its configuration with "
            "--base_config, for example playgroundai/playground-v2.5-1024px-aesthetic"
        )
    advice = (
        f". It is the default for {file.path}, a file without configurations and tokenizers; name a folder or a model "
        "on the Hub that has them with --base_config"
    )
    return Configurations(f"--base_config {family.repository}", family.repository, hub, advice=advice)


def _read_file(name: str, flag: str) -> SingleFile | None:
    """Return the header of a file; None if `name` is a folder, or may be a name on the Hub."""
    if problem := explain_file(name):
        raise UserError(f"{flag} {problem}")
    if not Path(name).is_file():
        return None
    with _flagged(flag):
        return read_header(Path(name))


@contextmanager
def _flagged(flag: str) -> Iterator[None]:
    """Turn errors about a file, which begin with its name, into UserErrors that begin with its flag."""
    try:
        yield
    except KroneckerError as error:
        raise UserError(f"{flag.partition(' ')[0]} {error}") from error
