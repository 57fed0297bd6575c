"""The subject, or several that one adapter learns: what prompts call each of them, and its class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from dreambooth.errors import UserError
from dreambooth.options.field import option
from kron_formats.files import excerpt, printable

EXAMPLE = "dog: {instance_prompt: a photo of sks dog, class_prompt: a photo of dog}"
LONGEST_FOLDER = 100  # characters of a class prompt that name a folder


@dataclass(frozen=True)
class Subject:
    """What one subject is called. Without --subjects there is one, whose folders are those of the options: ""."""

    folder: str  # of its photos, below instance_data_dir; it also names the subject
    instance_prompt: str
    class_prompt: str | None

    @property
    def class_folder(self) -> str:
        """The folder of its class images, below class_data_dir: the same for subjects with the same class prompt."""
        return re.sub(r"\W+", "-", self.class_prompt or "").strip("-")[:LONGEST_FOLDER] if self.folder else ""

    def token_and_noun(self) -> tuple[str, str]:
        """Return what its instance prompt adds to its class prompt, and the words there that follow: ("sks", "dog").

        Raises UserError if the instance prompt is not the class prompt with words before its last ones.
        """
        own, of_class = self.instance_prompt.split(), (self.class_prompt or "").split()
        start = next((i for i, (a, b) in enumerate(zip(own, of_class)) if a != b), min(len(own), len(of_class)))
        noun, added = of_class[start:], len(own) - len(of_class)
        if added < 1 or not noun or own[start + added :] != noun:
            raise UserError(
                f"--subjects {printable(self.folder)}: what stands for {{}} in prompts cannot be told from its "
                f"instance_prompt '{self.instance_prompt}' and its class_prompt '{self.class_prompt or ''}': the first "
                "has to be the second with a rare word before the noun, as 'a photo of sks dog' for 'a photo of dog'"
            )
        return " ".join(own[start : start + added]), " ".join(noun)

    def source(self, name: str) -> str:
        """Return where one of its prompts is from, as messages say it."""
        return f"--subjects, {name} of {printable(self.folder)}" if self.folder else f"--{name}"


@dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """The subject, or several."""

    instance_prompt: str | None = option(
        'Prompt for photos without a caption: a rare token and the class, for example "a photo of sks dog". Required, '
        "unless there are subjects.",
        None,
    )
    class_prompt: str | None = option('Prompt for the class, for example "a photo of dog".', None)
    subjects: dict[str, dict[str, str | None]] | None = option(
        "YAML file with several subjects, a line for each, FOLDER: {instance_prompt: TEXT, class_prompt: TEXT}; its "
        "photos are in instance_data_dir/FOLDER. A config file has the same lines below subjects:. Default: "
        "one subject.",
        None,
        nested=True,
    )

    @property
    def all_subjects(self) -> tuple[Subject, ...]:
        """The subjects, in the order of their folders' names. Raises UserError if they are not described in full."""
        if self.subjects is None:
            return (Subject("", self.instance_prompt or "", self.class_prompt),)
        return subjects_in(self.subjects)

    @property
    def one_of_each_class(self) -> tuple[Subject, ...]:
        """The first subject of each class, in their order."""
        firsts: dict[str, Subject] = {}
        for subject in self.all_subjects:
            firsts.setdefault(subject.class_folder, subject)
        return tuple(firsts.values())

    @property
    def instance_prompts(self) -> str:
        """What the subjects are called, for files and cards."""
        return "; ".join(subject.instance_prompt for subject in self.all_subjects)

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """The prompts of all classes, each once."""
        prompts = [subject.class_prompt for subject in self.all_subjects]
        return tuple(dict.fromkeys(prompt for prompt in prompts if prompt is not None))

    @property
    def needs_class_prompt(self) -> str | None:
        """The option in use that needs class prompts, as messages call it; None if none does.

        A group with such an option asks the next one by super() if its own is not in use.
        """
        return None

    def check(self) -> None:
        if self.subjects is not None:
            self._check_several(self.subjects)
        elif self.needs_class_prompt and not self.class_prompt:
            raise UserError(f"{self.needs_class_prompt} needs --class_prompt, for example 'a photo of dog'")
        elif self.class_prompt and not self.needs_class_prompt:
            raise UserError("--class_prompt needs --with_prior_preservation")

    def _check_several(self, described: dict[str, Any]) -> None:
        """Raise UserError if subjects are not told apart, or what they are called is said twice or not at all."""
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} does not work with --subjects, which has the {name} of each; leave it out")
        for subject in subjects_in(described):
            if self.needs_class_prompt and not subject.class_prompt:
                raise UserError(
                    f"--subjects {printable(subject.folder)} has no class_prompt, which {self.needs_class_prompt} "
                    "needs, for example 'a photo of dog'"
                )


def subjects_in(described: dict[str, Any]) -> tuple[Subject, ...]:
    """Return the subjects of --subjects, in the order of their folders' names.

    Raises UserError if there are none, if one is not described in full, or if two are not told apart.
    """
    if not described:
        raise UserError(f"--subjects names no subject; write a line for each, for example {EXAMPLE}")
    subjects = sorted((_described(*entry) for entry in described.items()), key=lambda subject: subject.folder)
    _refuse_equal(subjects, [subject.folder for subject in subjects], "are the same folder")
    plain = [" ".join(subject.instance_prompt.casefold().split()) for subject in subjects]
    _refuse_equal(subjects, plain, "have the same instance_prompt; give each a rare word of its own")
    return tuple(subjects)


def _refuse_equal(subjects: Sequence[Subject], marks: Sequence[str], what: str) -> None:
    """Raise UserError, naming the first two subjects with the same mark, if there are any."""
    first: dict[str, Subject] = {}
    for mark, subject in zip(marks, subjects):
        if mark in first:
            raise UserError(f"--subjects: {printable(first[mark].folder)} and {printable(subject.folder)} {what}")
        first[mark] = subject


def _described(folder: str, entries: Any) -> Subject:
    """Return a subject from its entries. Raises UserError, naming it, if they are not its prompts."""
    where, path = f"--subjects {printable(folder)}", PureWindowsPath(folder)  # which knows both kinds of slashes
    if path.anchor or ".." in path.parts or not path.parts:
        raise UserError(f"{where}: the name of a folder below --instance_data_dir is expected, for example dog")
    if not isinstance(entries, dict):
        raise UserError(f"{where}: expected its prompts, as in {EXAMPLE}, not {excerpt(str(entries))}")
    if unknown := [str(name) for name in entries if name not in ("instance_prompt", "class_prompt")]:
        raise UserError(f"{where}: unknown key {printable(unknown[0])}; expected instance_prompt and class_prompt")
    for name, prompt in entries.items():
        if not isinstance(prompt, str | None):
            raise UserError(f"{where}: its {name} is not text, but {excerpt(str(prompt))}")
    if not (instance_prompt := (entries.get("instance_prompt") or "").strip()):
        raise UserError(f"{where} has no instance_prompt, for example 'a photo of sks dog'")
    return Subject(path.as_posix(), instance_prompt, (entries.get("class_prompt") or "").strip() or None)
