"""Configurations, schedulers and tokenizers in diffusers' layout, in a folder or on the Hub."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline

from dreambooth.base_model.mistaken import explain_folder
from dreambooth.errors import UserError

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
FileState = tuple[str, int, int]  # path, size in bytes, modification time in ns


@dataclass(frozen=True)
class Configurations:
    """What a base model, or a VAE of its own, is made of. Nothing is read before it is asked for."""

    flag: str  # what messages call it
    name: str
    hub: Mapping[str, Any]  # arguments of from_pretrained and load_config: revision, cache folder
    is_vae: bool = False  # whether it is a VAE alone, and not a pipeline
    advice: str = ""  # what to do if it cannot be read

    def folder_of(self, part: str) -> Path | None:
        """Return the folder of a component; None if it is on the Hub."""
        folder = Path(self.name)
        return (folder if self.is_vae else folder / part) if folder.is_dir() else None

    def place_of(self, part: str) -> dict[str, Any]:
        """Return the arguments of from_pretrained and load_config that say where a component is."""
        return {**({} if self.is_vae else {"subfolder": part}), **self.hub}

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json: component -> (library, class), and the pipeline's class."""
        with self._readable():
            return _load_config(DiffusionPipeline, self.name, self.hub)

    @cached_property
    def classes(self) -> dict[str, Any]:
        """The classes of the components that the model has; None for those of unknown libraries."""
        if self.is_vae:
            return {"vae": AutoencoderKL}
        entries = {part: entry for part, entry in self.index.items() if isinstance(entry, (list, tuple)) and entry[0]}
        return {part: getattr(LIBRARIES.get(library), name, None) for part, (library, name) in entries.items()}

    def class_of(self, part: str) -> Any:
        """Return a component's class. Raises UserError if the model lacks the component, or its class is unknown."""
        if part not in self.classes:
            raise UserError(f"{self.flag} is not a base model: it has no {part}{self.advice}")
        if self.classes[part] is None:
            raise UserError(f"{self.flag} has a {part} of a class that is not known: {'.'.join(self.index[part])}")
        return self.classes[part]

    def empty(self, part: str) -> Any:
        """Return a component without weights, on the meta device."""
        model_class = self.class_of(part)
        with self._readable(), init_empty_weights():
            if issubclass(model_class, transformers.PreTrainedModel):
                return model_class(transformers.AutoConfig.from_pretrained(self.name, **self.place_of(part)))
            return model_class.from_config(_load_config(model_class, self.name, self.place_of(part)))

    def check_unquantised(self, part: str) -> None:
        """Raise UserError if a diffusers model was saved quantised."""
        with self._readable():
            config = _load_config(self.class_of(part), self.name, self.place_of(part))
        if "quantization_config" in config:
            raise UserError(
                f"{self.flag} was saved quantised; use the base model that it was made from, with --base_precision nf4 "
                "or int8"
            )

    def load(self, part: str) -> Any:
        """Return a scheduler or a tokenizer."""
        with self._readable(part):
            return self.class_of(part).from_pretrained(self.name, **self.place_of(part))

    def state(self, parts: Iterable[str]) -> str | list[FileState]:
        """Return a value that changes whenever a file of these components changes. Reads none.

        For a model on the Hub, it is the commit. `parts` may also name files beside the components.
        """
        folders = [self.folder_of(part) for part in parts]
        if None in folders:
            with self._readable():
                loader: Any = AutoencoderKL if self.is_vae else DiffusionPipeline
                _, commit = loader.load_config(self.name, **self.hub, return_commit_hash=True)
                return f"{self.name}@{commit}"
        return file_states(path for folder in folders if folder for path in [folder, *folder.rglob("*")])

    @contextmanager
    def _readable(self, part: str | None = None) -> Iterator[None]:
        """Turn errors of reading into UserErrors, which name the component if one is given."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            what = "a VAE" if self.is_vae else "a base model"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            problem = f"its {part} cannot be read: {reason}" if part else explain_folder(self.name) or reason
            raise UserError(f"{self.flag} is not {what}: {problem}{self.advice}") from error


def file_states(paths: Iterable[Path]) -> list[FileState]:
    """Return the state of each file among `paths`."""
    files = [(str(path.resolve()), path.stat()) for path in sorted(paths) if path.is_file()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files]


def _load_config(owner: Any, name: str, place: Mapping[str, Any]) -> dict[str, Any]:
    """Return owner.load_config(...), which diffusers annotates with what it returns for other arguments."""
    return owner.load_config(name, **place)
