"""Datasets with images: on the Hub, in a folder or in a table file."""

from pathlib import Path
from typing import Any

from dreambooth.errors import UserError

# Suffixes of table files and the builders of `datasets` that read them
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_table(name: str, configuration: str | None, source: str) -> Any:
    """Return the training split of a dataset on the Hub, in a folder or in a table file."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from error
    builder = TABLES.get(Path(name).suffix.lower())
    try:
        if Path(name).is_file() and builder:
            return datasets.load_dataset(builder, data_files=name, split="train")
        return datasets.load_dataset(name, configuration, split="train")
    except Exception as error:  # it can fail in many ways: no network, an unknown name, a damaged file
        raise UserError(f"{source} cannot be loaded: {error or type(error).__name__}") from error


def undecoded(dataset: Any, column: str, source: str) -> Any:
    """Return a dataset with its images as encoded files, for `decode_image`, which treats all images alike."""
    from datasets import Image as ImageColumn

    try:
        return dataset.cast_column(column, ImageColumn(decode=False))
    except Exception as error:  # pyarrow and datasets raise many kinds if the column cannot be cast
        raise UserError(f"--image_column {column}: that column of {source} does not contain images") from error
