"""Textual Inversion: the embedding of one new word, and nothing else (Gal et al., arXiv 2208.01618).

v* = argmin_v E ‖ε - ε_θ(z_t, t, c_θ(y))‖²,  y with the word that text encoders read as v
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.markdown import code, loading_lines, python_string
from dreambooth.method import Description, Group, Host, check_state
from dreambooth.wording import size
from kron_formats.files import size_on_disk
from kron_formats.names import family as family_of
from kron_formats.words import word_metadata, word_tensors
from kron_formats.writing import file_metadata, is_bare, write_tensors
from methods.options import TextualInversionOptions
from methods.refusals import refuse_compile, refuse_fsdp, refuse_several
from methods.words import AttachedWord, attach_word, check_word, loading_word


@dataclass(frozen=True)
class AttachedTextualInversion:
    """A word in the text encoders. See dreambooth/method.py."""

    host: Host
    learned: AttachedWord
    groups: Sequence[Group]

    def without(self) -> AbstractContextManager[None]:
        return self.learned.without()

    def state(self) -> dict[str, Any]:
        return self.learned.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        self.learned.load_state(state)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write a file that `pipeline.load_textual_inversion` (SDXL: in two calls), ComfyUI, A1111 and Forge read."""
        word = self.learned.word
        if not is_bare(metadata):
            metadata = {"modelspec.description": "Textual Inversion", **metadata}
        own = file_metadata({**metadata, **word_metadata(word)}, family_of(self.host.models), {}, "textual-inversion")
        write_tensors(path, word_tensors(word, dtype), own)

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        word = self.learned.word
        parameters = sum(rows.numel() for rows in word.vectors.values())
        rows = "".join(
            f"| {self.host.family.component_titles[name]} | {len(vectors)} | {vectors.shape[1]:,} |\n"
            for name, vectors in word.vectors.items()
        )
        sentence = f"{code(path.name)}: {parameters:,} parameters, {size(size_on_disk(path))}."
        loading = loading_lines(base_model, self.host.family.pipeline_class.__name__)
        return Description(
            noun="Textual Inversion",
            summary=f"the embedding of {code(word.text)}, which stands for the subject "
            "([Textual Inversion](https://arxiv.org/abs/2208.01618))",
            usage=_usage(path.name, word.text, list(word.vectors), loading, prompt),
            contents=(sentence, f"| in | vectors | width |\n| --- | ---: | ---: |\n{rows.rstrip()}"),
            tags=("textual-inversion",),
        )


def _usage(file: str, text: str, encoders: Sequence[str], loading: tuple[str, str], prompt: str) -> str:
    alone = encoders == ["text_encoder"]
    imports = "" if alone else "\nfrom safetensors.torch import load_file"
    lines = [f'pipeline.load_textual_inversion(".", weight_name={python_string(file)})']
    if not alone:
        lines = [f"vectors = load_file({python_string(file)})", *loading_word("vectors", text, encoders)]
    stem = Path(file).stem
    return f"""```python
import torch
{loading[0]}{imports}

{loading[1]}
{chr(10).join(lines)}
image = pipeline({python_string(prompt)}).images[0]
```

ComfyUI, AUTOMATIC1111 and Forge load the file too: put it into their embeddings folder. There the word is the file's
name, {code(stem)}; in ComfyUI {code(f"embedding:{stem}")}."""


@dataclass(frozen=True)
class TextualInversion:
    """The embedding of a new word, which begins as that of another. See dreambooth/method.py."""

    name: str = "textual_inversion"
    options: type = TextualInversionOptions
    weights_name: str = "learned_embeds.safetensors"
    whole_precision: bool = False

    def trains_text(self, config: TextualInversionOptions) -> bool:
        return True

    def check(self, host: Host, photos: Sequence[Photo], config: Any) -> None:
        """Raise UserError if the word cannot be learned from these prompts, or if there is a prior."""
        refuse_fsdp("Textual Inversion", "a few thousand numbers train, beside models that are whole")
        refuse_compile("Textual Inversion", "it is not tested", config)
        refuse_several("placeholder_token", config)
        if config.with_prior_preservation:
            raise UserError(
                "--with_prior_preservation has no effect on Textual Inversion: no weight of the base model changes, so "
                f"what it predicts for --class_prompt {config.class_prompts[0]} is the base model's at every step, and "
                "the prior's gradient is zero"
            )
        check_word(
            "placeholder_token",
            config.placeholder_token,
            config.num_vectors,
            config.initializer_token,
            host.tokenizers,
            photos,
            config,
        )

    def attach(
        self, host: Host, config: TextualInversionOptions, states: PromptStates | None = None
    ) -> AttachedTextualInversion:
        for model in host.models.values():
            model.requires_grad_(False)
        learned = attach_word(config.placeholder_token, config.num_vectors, config.initializer_token, host)
        return AttachedTextualInversion(host, learned, [learned.group(config)])


TEXTUAL_INVERSION = TextualInversion()
