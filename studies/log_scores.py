"""Send the scores of a finished cell to the runs that its training logged to, whatever --report_to named.

    python studies/log_scores.py CELL_FOLDER

TensorBoard gets them as scalars, scores/dino for one, beside the training's: its HPARAMS tab shows a row for each cell
with its options and scores. In wandb they are in the summary of the run, in trackio its last point. The sweep's worker
does this for every cell that it scores; done again, it replaces what was sent. A tracker that fails is a warning.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors, warn_only
from dreambooth.layout import TRACKERS_NAME
from dreambooth.options.paths import path_argument
from dreambooth.report.tracked import IDENTITY, PROJECT, tensorboard_run, wandb_project
from studies.results import Record, read_cell

SUFFIX = ".scores"  # of the file in TensorBoard's folder that holds nothing else


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cell", type=path_argument, metavar="CELL_FOLDER", help="folder of a finished cell")
    folder = parser.parse_args().cell.absolute()
    record = read_cell(folder)
    if not record.scores:
        raise UserError(f"{folder} has no scores: {record.reason}")
    scores = {f"scores/{name}": score for name, score in record.scores.items()}
    for name in record.options.get("report_to", ()):
        if name in SENDERS:
            with warn_only(f"the scores of {folder.name} were not sent to {name}"):
                SENDERS[name](folder, record, scores)


def send_to_tensorboard(folder: Path, record: Record, scores: Mapping[str, float]) -> None:
    # pyright cannot see the names that are made from protocol buffers
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    run = tensorboard_run(record.options.get("tracker_project_name"), record.options.get("tracker_run_name"))
    logs = _logs(folder, record) / run
    for earlier in logs.glob(f"*{SUFFIX}"):
        earlier.unlink()
    writer = EventFileWriter(str(logs), filename_suffix=SUFFIX)
    values = [Summary.Value(tag=name, simple_value=score) for name, score in scores.items()]
    writer.add_event(Event(wall_time=time.time(), step=record.summary["steps"], summary=Summary(value=values)))
    writer.close()


def send_to_wandb(folder: Path, record: Record, scores: Mapping[str, float]) -> None:
    wandb: Any = importlib.import_module("wandb")
    place = {} if "WANDB_DIR" in os.environ else {"dir": str(_logs(folder, record))}
    run = wandb.init(
        project=wandb_project(record.options.get("tracker_project_name")),
        name=record.options.get("tracker_run_name"),
        group=record.options.get("tracker_group"),
        resume="allow",
        # The run is the training's: neither this program nor the machine's load belongs to it
        settings=wandb.Settings(x_disable_meta=True, x_disable_stats=True, console="off", silent=True),
        **place,
        **_identity(folder, "wandb"),
    )
    run.summary.update(dict(scores))
    run.finish()


def send_to_trackio(folder: Path, record: Record, scores: Mapping[str, float]) -> None:
    trackio: Any = importlib.import_module("trackio")
    run = trackio.init(
        project=record.options.get("tracker_project_name") or PROJECT, resume="must", **_identity(folder, "trackio")
    )
    run.log(dict(scores), step=record.summary["steps"])
    run.finish()


def _logs(folder: Path, record: Record) -> Path:
    return folder / record.options["logging_dir"]


def _identity(folder: Path, tracker: str) -> dict[str, str]:
    """Return the keyword with which a tracker finds the run of a training. Raises UserError if it is not known."""
    path, keyword = folder / TRACKERS_NAME, IDENTITY[tracker]
    try:
        return {keyword: json.loads(path.read_text(encoding="utf-8"))[tracker]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not say which run it was") from error


SENDERS: Mapping[str, Callable[[Path, Record, Mapping[str, float]], None]] = {
    "tensorboard": send_to_tensorboard,
    "wandb": send_to_wandb,
    "trackio": send_to_trackio,
}


if __name__ == "__main__":
    with readable_errors():
        main()
