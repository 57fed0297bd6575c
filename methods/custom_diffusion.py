"""Custom Diffusion: K and V of cross-attention, and a new word (Kumari et al., arXiv 2212.04488).

The weights train themselves, W' in place of W, in fp32; everything else of the base model is frozen.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.markdown import code, loading_lines, python_string, size_in_words
from dreambooth.method import Description, Group, Host, check_state
from kron_formats.errors import KroneckerError
from kron_formats.names import family as family_of
from kron_formats.words import word_metadata, word_tensors
from kron_formats.writing import file_metadata, is_bare, write_tensors
from methods.options import CustomDiffusionOptions
from methods.refusals import refuse_base_precision, refuse_compile, refuse_fsdp, refuse_several
from methods.words import AttachedWord, attach_word, check_word, loading_word

TRAINED = {  # --freeze_model -> what the paths of the weights that train contain
    "crossattn_kv": (".attn2.to_k.", ".attn2.to_v."),
    "crossattn": (".attn2.",),
}


@dataclass(frozen=True)
class AttachedCustomDiffusion:
    """Weights of a UNet that train, and perhaps a word. See dreambooth/method.py."""

    host: Host
    weights: Mapping[str, nn.Parameter]  # by their paths in the denoiser
    base: Mapping[str, Tensor]  # what they were
    learned: AttachedWord | None
    groups: Sequence[Group]

    @contextmanager
    def without(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.learned:
                stack.enter_context(self.learned.without())
            trained = {path: weight.data for path, weight in self.weights.items()}
            try:
                self._point_to(self.base)
                yield
            finally:
                self._point_to(trained)

    def _point_to(self, tensors: Mapping[str, Tensor]) -> None:
        for path, weight in self.weights.items():
            weight.data = tensors[path]

    def state(self) -> dict[str, Any]:
        weights = {path: weight.detach() for path, weight in self.weights.items()}
        return {self.host.family.denoiser: weights, **(self.learned.state() if self.learned else {})}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        for path, weight in self.weights.items():
            weight.copy_(state[self.host.family.denoiser][path])
        if self.learned:
            self.learned.load_state(state)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write the weights under the UNet's own names, for `load_state_dict`, and the word beside them."""
        tensors = {name: weight.detach().cpu().to(dtype).contiguous() for name, weight in self.weights.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise KroneckerError(f"the weight {name} is not finite in {dtype}; nothing was written")
        if not is_bare(metadata):
            metadata = {"modelspec.description": "Custom Diffusion", **metadata}
        if self.learned:
            word = self.learned.word
            tensors |= word_tensors(word, dtype)
            metadata = {**metadata, **word_metadata(word)}
        write_tensors(path, tensors, file_metadata(metadata, family_of(self.host.models), {}, "custom-diffusion"))

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        kinds = Counter((name.partition(".attn2.")[2], tuple(weight.shape)) for name, weight in self.weights.items())
        titles = self.host.family.component_titles
        rows = "".join(
            f"| {titles[self.host.family.denoiser]} | `attn2.{name}` | "
            f"{' x '.join(f'{side:,}' for side in shape)} | {count} |\n"
            for (name, shape), count in sorted(kinds.items())
        )
        word = self.learned.word if self.learned else None
        if word:
            for name, vectors in word.vectors.items():
                rows += f"| {titles[name]} | {code(word.text)} | {vectors.shape[1]:,} | 1 |\n"
        parameters = sum(parameter.numel() for group in self.groups for parameter in group.parameters)
        loading = loading_lines(base_model, self.host.family.pipeline_class.__name__)
        called = f", and the word {code(word.text)}" if word else ""
        return Description(
            noun="Custom Diffusion",
            summary=f"weights of cross-attention{called} ([Custom Diffusion](https://arxiv.org/abs/2212.04488))",
            usage=_usage(path.name, word.text if word else None, list(word.vectors) if word else [], loading, prompt),
            contents=(
                size_in_words(path, len(self.weights), parameters),
                f"| in | weight | shape | number |\n| --- | --- | --- | ---: |\n{rows.rstrip()}",
            ),
            tags=("custom-diffusion",),
        )


def _usage(file: str, text: str | None, encoders: Sequence[str], loading: tuple[str, str], prompt: str) -> str:
    lines = [f"weights = load_file({python_string(file)})"]
    if text is not None and encoders == ["text_encoder"]:
        name = python_string(text)
        lines.append(f"pipeline.load_textual_inversion({{{name}: weights.pop({name})}})")
    elif text is not None:
        lines += loading_word("weights", text, encoders)
    return f"""```python
import torch
{loading[0]}
from safetensors.torch import load_file

{loading[1]}
{chr(10).join(lines)}
pipeline.unet.load_state_dict(weights, strict=False)
image = pipeline({python_string(prompt)}).images[0]
```

Other tools: `scripts/convert.py` of the training suite writes a base model with the weights in it (`--to fused`), and
the nearest LoRA (`--to lora`)."""


@dataclass(frozen=True)
class CustomDiffusion:
    """W' in place of W in cross-attention, and a word before the noun. See dreambooth/method.py."""

    name: str = "custom_diffusion"
    options: type = CustomDiffusionOptions
    weights_name: str = "pytorch_custom_diffusion_weights.safetensors"
    whole_precision: bool = True

    def trains_text(self, config: CustomDiffusionOptions) -> bool:
        return bool(config.modifier_token)

    def check(self, host: Host, photos: Sequence[Photo], config: Any) -> None:
        """Raise UserError if the weights cannot train, or the word cannot be learned from these prompts."""
        refuse_fsdp("Custom Diffusion", "the weights train where they are")
        refuse_compile("Custom Diffusion", "it is not tested", config)
        why = "the weights themselves train, in fp32, since 16 bits round small steps away"
        refuse_base_precision("Custom Diffusion", why, config)
        if not _trained(host.denoiser, config):
            raise UserError(
                f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}: its UNet has no "
                "cross-attention (attn2), which Custom Diffusion trains"
            )
        if not config.modifier_token:
            return
        refuse_several("modifier_token", config)
        check_word(
            "modifier_token", config.modifier_token, 1, config.initializer_token, host.tokenizers, photos, config
        )

    def attach(
        self, host: Host, config: CustomDiffusionOptions, states: PromptStates | None = None
    ) -> AttachedCustomDiffusion:
        for model in host.models.values():
            model.requires_grad_(False)
        weights = _trained(host.denoiser, config)
        base = {path: weight.detach().clone() for path, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        title = host.family.component_titles[host.family.denoiser]
        groups = [Group(title, [*weights.values()], config.learning_rate, config.adam_weight_decay)]
        learned = None
        if config.modifier_token:
            learned = attach_word(config.modifier_token, 1, config.initializer_token, host)
            groups.append(learned.group(config))
        return AttachedCustomDiffusion(host, weights, base, learned, groups)


def _trained(denoiser: nn.Module, config: CustomDiffusionOptions) -> dict[str, nn.Parameter]:
    """Return path -> weight of what trains in the denoiser."""
    parts = TRAINED[config.freeze_model]
    return {path: weight for path, weight in denoiser.named_parameters() if any(part in path for part in parts)}


CUSTOM_DIFFUSION = CustomDiffusion()
