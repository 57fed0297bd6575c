"""What somebody named as a base model that is not one, and what to name instead."""

import json
import re
from pathlib import Path

from dreambooth.wording import shortlist
from kron_formats.files import printable

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
MAGIC = (b"PK\x03\x04", b"\x80")  # what pickles begin with: torch.save's archives, bare ones
HEADER = b"{"  # what safetensors have after 8 bytes of any value, which may be those of a pickle
SHOWN = 3  # names in a message


def explain_file(name: str) -> str | None:
    """Return what is wrong with the name of a file; None if it may be safetensors, a folder or a name on the Hub.

    A pickle is never opened as one: it can run code.
    """
    path = Path(name)
    if re.match(r"\w+://", name):
        return "is an address; download the file first, or give the model's name on the Hub"
    if path.is_file():
        try:
            with path.open("rb") as file:
                beginning = file.read(9)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if not beginning:
            return "is empty"
        if beginning[8:] != HEADER and (path.suffix in PICKLES or beginning.startswith(MAGIC)):
            return (
                "is a pickle, which can run code when it is read; use the model's .safetensors file, or rewrite it as "
                "safetensors with a tool that you trust"
            )
        return None
    if path.suffix in (".safetensors", *PICKLES) and not path.exists():
        return "does not exist: there is no such file"
    return None


def explain_folder(name: str) -> str | None:
    """Return what a folder without a readable model_index.json holds, and what to name; None if that is not clear."""
    folder = Path(name)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return None
    names = sorted(path.name for path in folder.iterdir())
    if any(entry.startswith("pytorch_") and entry.endswith("_weights.safetensors") for entry in names):
        return "it is the output folder of a training; the adapter in it goes to --adapter" + _trained_on(folder)
    if "adapter_config.json" in names:
        return "it is an adapter that peft wrote, which goes to --adapter"
    inside = [str(folder / entry) for entry in names if (folder / entry / "model_index.json").is_file()]
    if inside:
        return f"name the folder in it that has model_index.json: {shortlist(inside, SHOWN)}"
    if (folder.parent / "model_index.json").is_file():
        return f"it is one component of a base model; name the folder around it, {folder.parent}"
    if kind := _component(folder):
        return f"it is one component, a {kind}; name a folder that has model_index.json"
    if files := [str(folder / entry) for entry in names if entry.endswith(".safetensors")]:
        return f"it has no model_index.json; name the file: {shortlist(files, SHOWN)}"
    if not names:
        return "the folder is empty"
    return f"the folder has no model_index.json; it holds {shortlist(names, SHOWN)}"


def _trained_on(folder: Path) -> str:
    """Return which base model a training's options name, as part of a sentence."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    found = re.search(r"^pretrained_model_name_or_path: (.+)$", text, re.MULTILINE)
    return f", and its base model is {printable(found[1], 200)}" if found else ""


def _component(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return printable(str(config.get("_class_name") or config["architectures"][0]), 80)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
