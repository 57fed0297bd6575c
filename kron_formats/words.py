"""New words in files: what the text encoders read for each, as Textual Inversion learns it.

SD      <word>            (n, width), the word itself is the name
SDXL    clip_l, clip_g    (n, 768) and (n, 1280); the word is in our metadata, else it is the file's name

ComfyUI, A1111 and Forge call an embedding by its file's name; `pipe.load_textual_inversion` takes the SD file as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A word that a tokenizer does not have, and its embeddings."""

    text: str  # "<dog>"
    vectors: Mapping[str, Tensor]  # text encoder -> (n, width), fp32

    @property
    def count(self) -> int:
        """How many vectors a text encoder has for it."""
        return len(next(iter(self.vectors.values())))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Its n tokens: "<dog>", "<dog>_1", ..., as diffusers names them."""
        return tuple(f"{self.text}_{number}" if number else self.text for number in range(self.count))
