"""How much of a prompt is read."""

from dataclasses import dataclass

from dreambooth.errors import UserError
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


@dataclass(frozen=True, kw_only=True)
class ClassPromptOptions:
    """The class of the subject."""

    class_prompt: str | None = option('Prompt for the class, for example "a photo of dog".', None)

    @property
    def needs_class_prompt(self) -> str | None:
        """The option in use that needs class_prompt, as messages call it; None if none does.

        A group with such an option asks the next one by super() if its own is not in use.
        """
        return None

    def check(self) -> None:
        if self.needs_class_prompt and not self.class_prompt:
            raise UserError(f"{self.needs_class_prompt} needs --class_prompt, for example 'a photo of dog'")
        if self.class_prompt and not self.needs_class_prompt:
            raise UserError("--class_prompt needs --with_prior_preservation")
