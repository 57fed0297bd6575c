"""Datasets with images: on the Hub, in a folder or in a table file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

# Suffixes of table files and the builders of `datasets` that read them
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes


def load_table(name: str, configuration: str | None, source: str) -> Any:
    """Return a dataset on the Hub, in a folder, saved by `save_to_disk`, or in a table file: its training split.

    If it has a single split, that one. Raises UserError, with the splits, if there are several and none is `train`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from error
    builder = TABLES.get(Path(name).suffix.lower())
    try:
        if Path(name).is_file() and builder:
            return datasets.load_dataset(builder, data_files=name, split="train")
        if any((Path(name) / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(name)
            if not isinstance(loaded, dict):
                return loaded
            return loaded[_choose_split([*map(str, loaded)], source)]
        split = _choose_split(datasets.get_dataset_split_names(name, configuration), source)
        return datasets.load_dataset(name, configuration, split=split)
    except UserError:
        raise
    except Exception as error:  # it can fail in many ways: no network, an unknown name, a damaged file
        raise UserError(f"{source} cannot be loaded: {error or type(error).__name__}") from error


def _choose_split(names: Sequence[str], source: str) -> str:
    if "train" not in names and len(names) != 1:
        raise UserError(f"{source} has the splits {', '.join(names)}, but no train; save the one to use by itself")
    return "train" if "train" in names else names[0]


def file_of(path: str, name: str) -> Path:
    """Return where the image is to which a row of the dataset `name` points: a table's paths are relative to it."""
    return Path(name).parent / path if Path(name).is_file() else Path(path)


def undecoded(dataset: Any, column: str, source: str) -> Any:
    """Return a dataset with its images as encoded files, for `decode_image`, which treats all images alike."""
    from datasets import Image as ImageColumn

    try:
        return dataset.cast_column(column, ImageColumn(decode=False))
    except Exception as error:  # pyarrow and datasets raise many kinds if the column cannot be cast
        raise UserError(f"--image_column {column}: that column of {source} does not contain images") from error
