"""SVDiff: shifts of the singular values of all weights (Han et al., arXiv 2303.11305).

As the paper defines it: matrices and kernels get spectral shifts, norms elementwise ones with a learning rate of their
own, biases and embeddings none; the text encoders may train too. The shifts themselves are in methods/spectral.py.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.photos import Photo
from dreambooth.family import Family
from dreambooth.markdown import size_in_words
from dreambooth.method import Description, Group, Host, check_state, trained_parameters
from kron_formats.decomposition import cache_folder
from kron_formats.errors import KroneckerError
from kron_formats.names import family as family_of
from kron_formats.names import find_parameters
from kron_formats.shifts import SUFFIX, origin_metadata
from kron_formats.writing import file_metadata, is_bare, write_tensors
from methods.options import SvdiffOptions
from methods.refusals import refuse_base_precision, refuse_compile, refuse_fsdp
from methods.spectral import SpectralShift, TrainedShift, add_shifts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttachedSvdiff:
    """Shifts in a base model. See dreambooth/method.py."""

    host: Host
    shifts: Mapping[str, Mapping[str, TrainedShift]]  # component -> layer's name in the file -> shift
    groups: Sequence[Group]

    @contextmanager
    def without(self) -> Iterator[None]:
        shifts = [shift for of_component in self.shifts.values() for shift in of_component.values()]
        for shift in shifts:
            shift.enabled = False
        try:
            yield
        finally:
            for shift in shifts:
                shift.enabled = True

    def state(self) -> dict[str, Any]:
        return {
            component: {name: shift.delta.detach() for name, shift in shifts.items()}
            for component, shifts in self.shifts.items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        with torch.no_grad():
            for component, shifts in self.shifts.items():
                for name, shift in shifts.items():
                    shift.delta.copy_(state[component][name])

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write <path>.delta for every layer of the UNet, text_encoder.<path>.delta for those of text encoders."""
        tensors, origins = {}, {}
        for shifts in self.shifts.values():
            for name, shift in shifts.items():
                values = shift.delta.detach().to(dtype)
                if not values.isfinite().all():
                    raise KroneckerError(f"the shifts of {name} are not all finite in {dtype}; nothing was written")
                tensors[f"{name}{SUFFIX}"], origins[name] = values.cpu(), shift.origin(values)
        family, own = family_of(self.host.models), {**metadata, **origin_metadata(origins)}
        if family and not is_bare(metadata):
            own = {"modelspec.description": "SVDiff", "modelspec.architecture": f"{family.model_spec}/svdiff", **own}
        write_tensors(path, tensors, file_metadata(own, family, {}))

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        parameters = sum(parameter.numel() for parameter in trained_parameters(self))
        titles, rows = self.host.family.component_titles, ""
        for component, shifts in self.shifts.items():
            for kind, title in ((True, "singular values of matrices and kernels"), (False, "weights of norms")):
                found = [shift.delta.numel() for shift in shifts.values() if isinstance(shift, SpectralShift) is kind]
                rows += f"| {titles[component]} | {title} | {len(found)} | {sum(found):,} |\n"
        return Description(
            noun="SVDiff file",
            summary="shifts of the singular values of all weights ([SVDiff](https://arxiv.org/abs/2303.11305))",
            usage=_usage(path.name, base_model, prompt),
            contents=(
                size_in_words(path, sum(len(shifts) for shifts in self.shifts.values()), parameters),
                f"| in | shifts of | layers | parameters |\n| --- | --- | ---: | ---: |\n{rows.rstrip()}",
            ),
            tags=("svdiff",),
        )


def _usage(file: str, base_model: str, prompt: str) -> str:
    base, file, prompt = (shlex.quote(word) for word in (base_model, file, prompt))
    return f"""No other tool loads such a file. With the scripts of the project that trained it:

```bash
python scripts/generate.py --pretrained_model_name_or_path {base} --adapter {file} --prompt {prompt}
python scripts/convert.py {file} --to fused --pretrained_model_name_or_path {base} --output fused
python scripts/convert.py {file} --to lora --rank 64 --pretrained_model_name_or_path {base} --output lora.safetensors
```

The second writes the base model with the shifts in its weights, for every tool. The third writes the nearest LoRA of a
rank, and how far from the shifts it is, since their change has full rank. The shifts belong to the singular vectors of
this base model's weights; with another model, revision or variant they are refused."""


@dataclass(frozen=True)
class Svdiff:
    """W = U diag(σ) V becomes U diag(relu(σ + δ)) V, with δ = 0 at the start. See dreambooth/method.py."""

    name: str = "svdiff"
    options: type = SvdiffOptions
    weights_name: str = "spectral_shifts.safetensors"
    whole_precision: bool = True

    def trains_text(self, config: SvdiffOptions) -> bool:
        return config.train_text_encoder

    def check(self, host: Host, photos: Sequence[Photo], config: Any) -> None:
        """Raise UserError where weights cannot be composed: if they are not fp32, are split, or are compiled."""
        why = "it shifts the singular values of the base model's own weights, which stay in fp32"
        refuse_base_precision("SVDiff", why, config)
        refuse_fsdp("SVDiff", "every process composes whole weights")
        why = "weights are composed once for many passes, which torch.compile cannot trace"
        refuse_compile("SVDiff", why, config)

    def attach(self, host: Host, config: SvdiffOptions, states: PromptStates | None = None) -> AttachedSvdiff:
        logger.info(
            "finding the singular vectors of all weights, which takes minutes; they are kept for later runs in %s",
            cache_folder(),
        )
        names = {  # what finds the layers' names does not know shifted ones
            (layer.component, layer.path): layer.name if layer.component == host.family.denoiser else layer.dotted
            for layer in find_parameters(host.models)
            if layer.parameter == "weight"
        }
        shifts = {
            component: {names[component, path]: shift for path, shift in add_shifts(model).items()}
            for component, model in host.models.items()
        }
        return AttachedSvdiff(host, shifts, _groups(host.family, shifts, config))


def _groups(family: Family, shifts: Mapping[str, Mapping[str, TrainedShift]], config: SvdiffOptions) -> list[Group]:
    """Return the denoiser's singular values and norms, then the text encoders', each with its learning rate."""
    text = [shift for component in shifts if component != family.denoiser for shift in shifts[component].values()]
    groups = []
    for title, rate, found in (
        (family.component_titles[family.denoiser], config.learning_rate, shifts[family.denoiser].values()),
        ("text encoders", config.text_encoder_learning_rate, text),
    ):
        for kind, suffix, learning_rate in ((True, "", rate), (False, ", norms", config.learning_rate_1d)):
            parameters = [shift.delta for shift in found if isinstance(shift, SpectralShift) is kind]
            if parameters:
                groups.append(Group(title + suffix, parameters, learning_rate, config.adam_weight_decay))
    return groups


SVDIFF = Svdiff()
