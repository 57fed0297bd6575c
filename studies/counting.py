"""How many parameters a training trains: its method is really attached, to models without weights.

Nothing is downloaded. Models are built from the base model's own configurations if it is on this machine, or else from
kron_formats/architectures if it is the published model of a family.
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from dreambooth.base_model.checks import check_family, check_pipeline, empty_models
from dreambooth.base_model.configurations import Configurations
from dreambooth.base_model.source import base_source, load_tokenizers
from dreambooth.errors import UserError
from dreambooth.family import Family
from dreambooth.method import Host, Method, trained_parameters
from dreambooth.options.base_model import BaseModelOptions
from dreambooth.options.field import option_names, result_options
from kron_formats.architectures import load_architecture
from kron_formats.families import FAMILIES
from studies.training import Training

WORD = "a"  # that new words begin as, where the base model's own tokenizers are not at hand
PUBLISHED = {family.repository: family for family in FAMILIES}


def count_trained(
    method: Method, family: Family, components: Mapping[str, Any], tokenizers: Mapping[str, Any], config: Any
) -> tuple[int, int]:
    """Return how many parameters train in the denoiser, and in all models, by attaching the method as training does.

    `components` are models without weights. They and the tokenizers, text encoder -> tokenizer, change. Raises what
    `Method.attach` raises.
    """
    models = family.trained_models(components, method.trains_text(config))
    present = {name: tokenizer for name, tokenizer in tokenizers.items() if name in models}
    parameters = trained_parameters(method.attach(Host(family, models, present), config))
    own = {id(parameter) for parameter in models[family.denoiser].parameters()}
    return sum(p.numel() for p in parameters if id(p) in own), sum(p.numel() for p in parameters)


def stand_in() -> CLIPTokenizer:
    """Return a tokenizer that knows one word, WORD."""
    return CLIPTokenizer(vocab={f"{WORD}</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[])


# ---- what a cell trains ----


class Counter:
    """Counts what trainings train; of those that differ in nothing that matters, one."""

    def __init__(self):
        self.known: dict[Hashable, int | str] = {}

    def count(self, training: Training) -> int | str:
        """Return how many parameters train, or why it is not known here.

        Raises UserError or KroneckerError if training will refuse its base model, or the method these models.
        """
        key = _decisive(training)
        if key not in self.known:
            self.known[key] = _count(training)
        return self.known[key]


def _decisive(training: Training) -> Hashable:
    """Return what may decide the count, and what is refused. Numbers with a point are rates and strengths."""
    config = training.config
    base = {name: getattr(config, name) for name in option_names(BaseModelOptions)}
    options = {**result_options(config), **base, "seed": None}
    kept = {name: value for name, value in options.items() if not isinstance(value, float)}
    return training.method.value, training.family.value, repr(kept)


def _count(training: Training) -> int | str:
    method, family, config = training.method.load(), training.family.load(), training.config
    source = base_source(config)
    name = source.configurations.name
    here, published = Path(name).exists(), PUBLISHED.get(name)
    if published is None or here or _is_cached(source.configurations):
        try:
            components, tokenizers = _parts(family, config)
        except UserError as error:
            if here:
                raise
            return str(error)  # the Hub may have what is not on this machine
        check_family(family, config)
        models = family.trained_models(components, method.trains_text(config))
        method.check(Host(family, models, tokenizers), [], config)
        return count_trained(method, family, *_parts(family, config), config)[1]
    check_pipeline(family, (source.family or published).pipeline, config)
    if "initializer_token" in option_names(type(config)):  # any word does to count with
        config = replace(config, initializer_token=WORD)
    tokenizers = {encoder: stand_in() for encoder in family.text_encoders}
    return count_trained(method, family, load_architecture(published.architecture), tokenizers, config)[1]


def _is_cached(configurations: Configurations) -> bool:
    """Whether the configurations of a base model on the Hub are on this machine."""
    where = {name: value for name, value in configurations.hub.items() if value is not None}
    return isinstance(try_to_load_from_cache(configurations.name, "model_index.json", **where), str)


def _parts(family: Family, config: BaseModelOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    return empty_models(config, (family.denoiser, *family.text_encoders)), load_tokenizers(config)
