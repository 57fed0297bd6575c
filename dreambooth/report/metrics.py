"""metrics.jsonl, one line for each optimizer step, and its picture, training.png."""

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dreambooth.errors import warn_only
from dreambooth.layout import CURVES_NAME, METRICS_NAME
from dreambooth.options.output import OutputOptions
from dreambooth.report.curves import draw_curves
from kron_formats.files import whole_file, write_text

logger = logging.getLogger(__name__)


class MetricsFile:
    """The metrics file of a run that begins after `first_step`. Lines of later steps, of an earlier run, are dropped.

    If the disk is full, this logs one warning, and lines stay in memory until there is space.
    """

    def __init__(self, path: Path, first_step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        with whole_file(path) as unfinished:
            write_text(unfinished, "".join(map(_json_line, kept)))
        self.file, self.disk_failed = path.open("a", encoding="utf-8", newline="\n"), False

    def append(self, values: Mapping[str, Any]) -> None:
        """Write a line. Never raises on a full disk."""
        try:
            self.file.write(_json_line(values))
            self.file.flush()
        except OSError as error:
            if not self.disk_failed:
                logger.warning("%s was not written, training continues: %s", METRICS_NAME, error)
            self.disk_failed = True

    def close(self) -> None:
        with suppress(OSError):  # a full disk, of which `append` has warned
            self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a line that a crash left half-written; [] if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def save_curves(config: OutputOptions) -> None:
    """Draw OUTPUT_DIR/metrics.jsonl as OUTPUT_DIR/training.png. Never raises: a failure is a warning."""
    output = Path(config.output_dir)
    with warn_only(f"{output / CURVES_NAME} was not drawn"):
        draw_curves(read_metrics(output / METRICS_NAME)).save(output / CURVES_NAME)


def _json_line(values: Mapping[str, Any]) -> str:
    """Return a line of JSON, with null for NaN and infinity, which JSON lacks."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"
