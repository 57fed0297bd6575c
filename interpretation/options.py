"""What scripts/interpret.py reads: files alone, or also a base model, photos and prompts to see what parts do."""

from dataclasses import dataclass, fields

from dreambooth.errors import UserError
from dreambooth.options.base_model import BaseModelOptions
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.options.field import option, option_names

OUTPUT_HELP = "Folder for interpretation.html, interpretation.json, plots and images."


@dataclass(frozen=True, kw_only=True)
class FileOptions(BaseModelOptions):
    """Adapters to interpret from their files."""

    pretrained_model_name_or_path: str | None = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        "Base model, to relate changes to its weights. Default: none; layers are then looked up in the published "
        "models.",
        None,
        hub=True,
    )
    adapter: list[str] = option("The files, as arguments.", [], path=True)
    allow_pickle: bool = option("Also read adapter files that are pickles (.bin): only their tensors.", False)
    adapter_scale: float = option("Multiplies the strength of every adapter.", 1.0)
    output_dir: str = option(OUTPUT_HELP, path=True)

    def check(self) -> None:
        if not self.adapter:
            raise UserError("name at least one ADAPTER: a file, FILE:SCALE, or the folder of a run")

    @property
    def base(self) -> BaseModelOptions | None:
        """The base model, if one is given."""
        return self if self.pretrained_model_name_or_path else None


@dataclass(frozen=True, kw_only=True)
class InterpretationOptions(EvaluationOptions):
    """What parts of an adapter do, by what it draws without them."""

    output_dir: str = option(OUTPUT_HELP, path=True)
    keep: float | None = option(
        "Also write the smallest adapter that holds this share of the likeness that the whole one adds, for example "
        "0.9. Default: none.",
        None,
        above=0,
        at_most=1,
    )
    pairs_of_a: int = option("Singular pairs of A, the largest first, to leave out in turn.", 2, at_least=0)

    def check(self) -> None:
        if not self.adapter:
            raise UserError("name at least one ADAPTER: a file, FILE:SCALE, or the folder of a run")
        if self.keep is not None and len(self.adapter) > 1:
            raise UserError("--keep makes one adapter smaller: name one ADAPTER")
        if self.num_class_images == 0:
            raise UserError("--num_class_images 0: class images tell what a part costs the class; draw at least 1")
        for name in ("lpips", "other_prompts", "subjects"):
            if getattr(self, name):
                raise UserError(f"--{name} has no meaning for the parts of an adapter: scripts/evaluate.py measures it")
        if self.denoising_pairs == 0:
            raise UserError("--denoising_pairs 0: photos are denoised to see when the adapter helps; give at least 1")

    @property
    def files(self) -> FileOptions:
        """The same options, as far as files need them."""
        return FileOptions(**{entry.name: getattr(self, entry.name) for entry in fields(FileOptions)})


SCORING = frozenset(option_names(InterpretationOptions)) - frozenset(option_names(FileOptions))


def split_arguments(argv: list[str]) -> tuple[list[str], bool]:
    """Return the arguments with the files, which come first, as --adapter, and whether they ask for scores."""
    first = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    files, rest = argv[:first], argv[first:]
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in rest}
    return [*(["--adapter", *files] if files else []), *rest], bool(given & (SCORING | {"config", "help"}))
