"""New words: embeddings beside the table of a text encoder, which itself stays as it is.

A text encoder reads rows[ids - first] for the ids of the new tokens, and its own table for all others. So nothing but
the rows trains or decays, and prompts without the word are read exactly as before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.data.captions import read_captions
from dreambooth.data.folder import list_folder
from dreambooth.data.photos import Photo
from dreambooth.drawing.pipelines import Adapter, BaseLayer, Delta
from dreambooth.errors import UserError
from dreambooth.markdown import python_string
from dreambooth.method import Group, Host
from dreambooth.words import Tokenizers, add_word, explain_new, has_word, only_token
from kron_formats.families import TOKENIZERS
from kron_formats.files import printable
from kron_formats.reading import AdapterFile
from kron_formats.words import CLIP_OF, Word, explain_name


class WordEmbedding(nn.Embedding):
    """A text encoder's table of embeddings and, for ids from `first` on, rows that train, (n, width) fp32.

    Where `enabled` is not set, each of the new tokens is read as the one that the rows began as.
    """

    def __init__(self, table: nn.Embedding, first: int, count: int, initial: int):
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight, _freeze=True)
        self.weight = table.weight
        row = table.weight.detach()[initial].float()
        self.rows = nn.Parameter(row.repeat(count, 1))
        self.first, self.initial, self.enabled = first, initial, True

    def forward(self, input: Tensor) -> Tensor:
        new = input >= self.first
        known = super().forward(torch.where(new, self.initial, input))
        if not self.enabled:
            return known
        learned = F.embedding(torch.where(new, input - self.first, 0), self.rows)
        return torch.where(new[..., None], learned.to(known), known)


@dataclass(frozen=True)
class AttachedWord:
    """A word in the text encoders of a base model."""

    text: str
    embeddings: Mapping[str, WordEmbedding]  # text encoder -> its embeddings

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [embedding.rows for embedding in self.embeddings.values()]

    @property
    def word(self) -> Word:
        """The word as it is now."""
        return Word(self.text, {name: embedding.rows.detach() for name, embedding in self.embeddings.items()})

    def group(self, config: Any) -> Group:
        """Return what the optimizer needs to know."""
        return Group("words", self.parameters, config.learning_rate, config.adam_weight_decay)

    @contextmanager
    def without(self) -> Iterator[None]:
        for embedding in self.embeddings.values():
            embedding.enabled = False
        try:
            yield
        finally:
            for embedding in self.embeddings.values():
                embedding.enabled = True

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the vectors: text encoder -> name -> tensor."""
        return {name: {"vectors": embedding.rows.detach()} for name, embedding in self.embeddings.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state` returned, which has been checked."""
        for name, embedding in self.embeddings.items():
            embedding.rows.copy_(state[name]["vectors"])


def attach_word(text: str, count: int, initializer: str, host: Host) -> AttachedWord:
    """Add a word of `count` vectors, each that of `initializer`, to the host's tokenizers and text encoders.

    The text encoders are frozen. `check_word` has been asked before, for tokenizers like these.
    """
    first, embeddings = add_word(text, count, host.tokenizers), {}
    for name, tokenizer in host.tokenizers.items():
        model: Any = host.models[name].requires_grad_(False)
        initial = only_token(initializer, tokenizer)
        assert initial is not None  # check_word
        embeddings[name] = WordEmbedding(model.get_input_embeddings(), first[name], count, initial)
        model.set_input_embeddings(embeddings[name])
        pool_at_end(model, tokenizer)
    return AttachedWord(text, embeddings)


def pool_at_end(text_encoder: nn.Module, tokenizer: Any) -> None:
    """Have a text encoder pool where a prompt ends, also in prompts with new words.

    Models that were saved with the eos_token_id 2, as SDXL's second one, pool at the highest id, which a new word has.
    """
    for module in text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]


def loading_word(variable: str, text: str, encoders: Sequence[str]) -> list[str]:
    """Return the Python lines of a model card that load a word of several text encoders from a dict of tensors.

    They remove its tensors from the dict.
    """
    lines = []
    for encoder in encoders:
        tokenizer = TOKENIZERS[encoder]
        lines += [
            f"pipeline.load_textual_inversion({variable}.pop({python_string(CLIP_OF[encoder])}), "
            f"token={python_string(text)},",
            f"    text_encoder=pipeline.{encoder}, tokenizer=pipeline.{tokenizer})",
        ]
    if "text_encoder_2" in encoders:
        lines.append("# Or it would pool at the new word, whose id is the highest, and not where the prompt ends")
        lines.append("pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id")
    return lines


@dataclass(frozen=True)
class WordReader:
    """The words in files. See dreambooth/drawing/pipelines.py."""

    def takes(self, file: AdapterFile) -> bool:
        return bool(file.words)

    def add(self, pipeline: Any, adapters: Sequence[Adapter]) -> None:
        """Add the words to tokenizers and text encoders, as diffusers does."""
        for word in (word for adapter in adapters for word in adapter.matched.file.words):
            for encoder, vectors in word.vectors.items():
                model, tokenizer = getattr(pipeline, encoder), getattr(pipeline, TOKENIZERS[encoder])
                # diffusers would draw the new rows at random before it fills them, and warn of that
                model.resize_token_embeddings(len(tokenizer) + word.count, mean_resizing=False)
                pipeline.load_textual_inversion(vectors, token=word.text, text_encoder=model, tokenizer=tokenizer)
                pool_at_end(model, tokenizer)

    def set_strengths(self, pipeline: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
        """Do nothing: a word has no strength."""

    def deltas(self, pipeline: DiffusionPipeline) -> Iterator[tuple[BaseLayer, Delta]]:
        """Yield nothing: a word changes no weights."""
        return iter(())

    def remove(self, pipeline: DiffusionPipeline) -> None:
        """Do nothing: words lie in the tables of the text encoders, beside all others."""


# ---- what is refused ----


def check_word(
    flag: str, text: str, count: int, initializer: str, tokenizers: Tokenizers, photos: Sequence[Photo], config: Any
) -> None:
    """Raise UserError if a word cannot be learned, or if a prompt has it or lacks it against its purpose.

    `flag` is the option that names the word. Adds the word to the tokenizers.
    """
    for encoder, tokenizer in tokenizers.items():
        _check_initializer(initializer, encoder, tokenizer)
    if problem := explain_name(text) or explain_new(text, count, tokenizers):
        raise UserError(f"--{flag} {printable(text)}: {problem}; choose another word, for example <dog>")
    add_word(text, count, tokenizers)
    for tokenizer in tokenizers.values():
        if (read := tokenizer.tokenize(text)) != [text]:
            raise UserError(
                f"--{flag} {text}: the tokenizer reads it as {printable(' '.join(read))}; use small letters"
            )
    (subject,) = config.all_subjects
    if not has_word(subject.instance_prompt, text, tokenizers):
        source = subject.source("instance_prompt")
        raise UserError(f"{source} {subject.instance_prompt} has no {text}, the word of --{flag}")
    for photo in photos:
        if not has_word(photo.prompt, text, tokenizers):
            raise UserError(f"the caption of {printable(photo.path.name)} has no {text}, the word of --{flag}")
    for place, prompt in _class_prompts(photos, config):
        if has_word(prompt, text, tokenizers):
            raise UserError(f"{place} has {text}, the word of --{flag}: the class has to do without it")


def _check_initializer(initializer: str, encoder: str, tokenizer: Any) -> None:
    if only_token(initializer, tokenizer) is not None:
        return
    tokens = tokenizer.tokenize(initializer)
    read = f"it is {len(tokens)} tokens: {printable(' '.join(tokens))}" if tokens else "it is empty"
    if len(tokens) == 1:
        read = "it is not a word"
    raise UserError(
        f"--initializer_token {printable(initializer)}: the vectors begin as those of one token, but for the tokenizer "
        f"of the {encoder} {read}"
    )


def _class_prompts(photos: Sequence[Photo], config: Any) -> Iterator[tuple[str, str]]:
    """Yield (what messages call it, prompt) for the prompts of the class."""
    if not config.with_prior_preservation:
        return
    (subject,) = config.all_subjects
    yield f"{subject.source('class_prompt')} {subject.class_prompt}", subject.class_prompt
    if config.uses_base_model_prior:
        for photo in photos:
            yield f"the class prompt of {printable(photo.path.name)}", photo.class_prompt or subject.class_prompt
    elif (path := Path(config.class_data_dir) / subject.class_folder).is_dir():
        folder = list_folder(path, f"--class_data_dir {path}")
        for path, caption in read_captions(folder, config).items():
            yield f"the caption of {printable(path.name)} in {folder.source}", caption.text or subject.class_prompt
