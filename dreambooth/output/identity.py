"""What identifies a run: the options and the photos that decide its result. A resumed run must have the same."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dreambooth.data.folder import same_name
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.layout import RUN_NAME
from dreambooth.method import Method
from dreambooth.options.checking import idle_options
from dreambooth.options.field import defaults, result_options
from dreambooth.options.output import OutputOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.ranks import on_main
from kron_formats.files import printable

logger = logging.getLogger(__name__)

CONSTANT = ("constant", "constant_with_warmup")  # schedules that do not depend on the number of steps


def deciding_options(method: Method, config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Return the method's name and the options that decide the result, the batch size as one number for all devices."""
    default = defaults(type(config))
    options = {"method": method.name, **result_options(config)}
    options |= {name: default[name] for name in idle_options(config) if name in options}  # they decide nothing
    options["mixed_precision"] = accelerator.mixed_precision  # accelerate's if the option is not set
    batch, accumulation = options.pop("train_batch_size"), options.pop("gradient_accumulation_steps")
    options["global batch (devices x accumulation x train_batch_size)"] = (
        accelerator.num_processes * accumulation * batch
    )
    if config.aspect_ratio_buckets:  # it decides how samples are grouped by shape
        options["train_batch_size"] = batch
    if config.lr_scheduler in CONSTANT:
        del options["max_train_steps"], options["num_train_epochs"]
    return json.loads(json.dumps(options))  # as it is read back from a file


def identify_run(
    method: Method,
    start: Path | None,
    photos: Sequence[Photo],
    class_photos: Sequence[Photo],
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return what decides the result of a run: the options, and each photo's prompts and a digest of its pixels.

    The pixels are those that are trained on. Raises UserError if the checkpoint `start` is of a run on other photos,
    naming each; with --allow_config_change this is a warning. Also raises it if this process sees other photos than the
    main one. All processes must call this.
    """
    named = {f"instance photo {printable(same_name(photo.name))}": _describe(photo) for photo in photos}
    named |= {f"class image {printable(same_name(photo.name))}": _describe(photo) for photo in class_photos}
    if (theirs := on_main(accelerator, lambda: named)) != named:
        differing = [name for name in dict.fromkeys([*theirs, *named]) if theirs.get(name) != named.get(name)]
        raise UserError(
            f"process {accelerator.process_index} sees other photos than the main process, for example {differing[0]}: "
            "the folders of photos and class images, and --output_dir, must be the same for all processes and machines"
        )
    if start is not None:
        _refuse(start, "photos", _flat(_read_run(start)["photos"]), _flat(named), config)
    return {"options": deciding_options(method, config, accelerator), "photos": named}


def _describe(photo: Photo) -> dict[str, str | None]:
    digest = hashlib.sha256(f"{photo.original_size} {photo.size} {photo.stored.digest}".encode())
    if photo.mask is not None:
        digest.update(photo.mask.tobytes())
    return {"image": digest.hexdigest()[:16], "prompt": photo.prompt, "class prompt": photo.class_prompt}


# ---- comparing then and now ----


def refuse_other_options(start: Path, method: Method, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Raise UserError, with a table of the differences, if the checkpoint's run had options that change the result.

    Options that there were not when it was written had their defaults. With --allow_config_change this is a warning.
    """
    now, default = deciding_options(method, config, accelerator), defaults(type(config))
    then = {name: default[name] for name in now if name in default} | _read_run(start)["options"]
    _refuse(start, "options", then, now, config)


def _flat(photos: Mapping[str, Mapping[str, str | None]]) -> dict[str, str | None]:
    return {f"{name}, {aspect}": value for name, aspects in photos.items() for aspect, value in aspects.items()}


def _read_run(start: Path) -> dict[str, Any]:
    return json.loads((start / RUN_NAME).read_text(encoding="utf-8"))


def _refuse(start: Path, what: str, then: Mapping[str, Any], now: Mapping[str, Any], config: OutputOptions) -> None:
    rows = [
        (name, _shown(then, name), _shown(now, name))
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    if not rows:
        return
    text = (
        f"--resume_from_checkpoint {start} was trained with other {what}, which would change the result:\n"
        f"{_table([('', 'then', 'now'), *rows])}"
    )
    if not config.allow_config_change:
        raise UserError(f"{text}\nRestore the former {what}, or continue with --allow_config_change")
    logger.warning("%s", text)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "-"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"    {name:<{widths[0]}}  {then:<{widths[1]}}  {now}".rstrip() for name, then, now in rows)
