"""How much of a prompt is read."""

from dataclasses import dataclass

from dreambooth.options.field import option

CHUNK_LENGTH = 75  # tokens; CLIP's text encoders read so many at once, between their marks of start and end


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts."""

    max_token_length: int = option(
        "Tokens of a prompt that are read, a multiple of 75; the rest is cut. Above 75, prompts are read in chunks of "
        "75, as ComfyUI, A1111 and Forge do.",
        CHUNK_LENGTH,
        at_least=CHUNK_LENGTH,
        multiple_of=CHUNK_LENGTH,
    )
