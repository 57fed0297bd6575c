"""Datasets with images: on the Hub, in a folder or in a table file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.errors import UserError
from dreambooth.wording import shortlist

# Suffixes of table files and the builders of `datasets` that read them
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}

SAVED = ("state.json", "dataset_dict.json")  # by which a folder of save_to_disk is told, one dataset or several splits


def load_table(name: str, configuration: str | None, source: str) -> Any:
    """Return a dataset on the Hub, in a folder or in a table file: its only split, or of several the split `train`.

    A folder may also be one that datasets' save_to_disk wrote.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from error
    path = Path(name)
    builder = TABLES.get(path.suffix.lower())
    try:
        if path.is_file() and builder:
            loaded = datasets.load_dataset(builder, data_files=name)
        elif any((path / marker).is_file() for marker in SAVED):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration)
    except Exception as error:  # it can fail in many ways: no network, an unknown name, a damaged file
        raise UserError(f"{source} cannot be loaded: {error or type(error).__name__}") from error
    return _training_split(loaded, source) if isinstance(loaded, dict) else loaded


def _training_split(splits: Mapping[Any, Any], source: str) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(
        f"{source} has the splits {shortlist([*map(str, splits)])}, and none of them is called train; save the one to "
        "train on with its save_to_disk, and give that folder"
    )


def beside_table(name: str, path: Path) -> Path:
    """Return where an image is whose path a row gives: relative to the table file, or to the folder with the table."""
    table = Path(name)
    return (table if table.is_dir() else table.parent) / path if table.exists() else path


def undecoded(dataset: Any, column: str, source: str) -> Any:
    """Return a dataset with its images as encoded files, for `decode_image`, which treats all images alike."""
    from datasets import Image as ImageColumn

    try:
        return dataset.cast_column(column, ImageColumn(decode=False))
    except Exception as error:  # pyarrow and datasets raise many kinds if the column cannot be cast
        raise UserError(f"--image_column {column}: that column of {source} does not contain images") from error
