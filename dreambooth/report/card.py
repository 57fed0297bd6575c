"""The model card, OUTPUT_DIR/README.md, and the upload to the Hub of the result with its card."""

import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from dreambooth.errors import warn_only
from dreambooth.family import Family
from dreambooth.layout import (
    AVERAGE_NAME,
    BEST_NAME,
    CARD_NAME,
    CONFIG_NAME,
    CURVES_NAME,
    SAMPLES_NAME,
    list_sheets,
    result_paths,
)
from dreambooth.markdown import code
from dreambooth.method import Attached, Description, Group
from dreambooth.options.drawing import PriorOptions
from dreambooth.options.output import ReportOptions
from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.options.subjects import SubjectOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.options.yaml_file import shared_yaml
from dreambooth.output.best import LOSS, read_best
from kron_formats.files import write_text
from kron_formats.paths import is_hub_name, last_part, shared_name

logger = logging.getLogger(__name__)


def save_card(path: Path, attached: Attached, family: Family, steps: int, config: TrainingConfig) -> None:
    """Write OUTPUT_DIR/README.md, the model card of the result in `path`. Never raises: a failure is a warning."""
    output = Path(config.output_dir)
    prompt = config.validation_prompt[0] if config.validation_prompt else config.all_subjects[0].instance_prompt
    with warn_only(f"{output / CARD_NAME} was not written"):
        description = attached.describe(path, shared_name(config.pretrained_model_name_or_path), prompt)
        sheets = list_sheets(output)
        sheet = sheets[-1].relative_to(output).as_posix() if sheets else None
        text = _front_matter(description, family, sheet, config) + _body(
            description, attached.groups, sheet, steps, config
        )
        write_text(output / CARD_NAME, text)


# ---- what the card says ----


def _front_matter(description: Description, family: Family, sheet: str | None, config: TrainingConfig) -> str:
    """Return the YAML block that the Hub reads."""
    base = config.pretrained_model_name_or_path
    entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if is_hub_name(base):
        entries |= {"base_model": base, "base_model_relation": description.relation}
        entries |= {"license_link": f"https://huggingface.co/{base}"}
    entries |= {
        "license": "other",
        "license_name": "that-of-the-base-model",
        "instance_prompt": config.instance_prompts,
        "tags": ["dreambooth", *description.tags, family.tag, "diffusers", "text-to-image"],
    }
    if sheet:
        entries["widget"] = [{"text": prompt, "output": {"url": sheet}} for prompt in config.validation_prompt]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---\n\n"


def _body(
    description: Description, groups: Sequence[Group], sheet: str | None, steps: int, config: TrainingConfig
) -> str:
    base = code(shared_name(config.pretrained_model_name_or_path))
    parts = [
        f"# {code(config.instance_prompts)}",
        f"A {description.noun} (DreamBooth) for {base}: {description.summary}. " + _called(config),
    ]
    if sheet:
        rows = "".join(f"{number}. {code(text)}\n" for number, text in enumerate(config.validation_prompt, 1))
        parts += ["## Samples", f"![Samples, one row for each prompt]({sheet})", rows.rstrip()]
    parts += ["## Use", description.usage]
    if config.base_adapter:
        beneath = ", ".join(code(last_part(entry)) for entry in config.base_adapter)
        parts.append(f"It was trained on top of {beneath}: load that too.")
    if config.max_token_length > CHUNK_LENGTH:
        parts.append(_long_prompts(config.max_token_length))
    parts += [f"## The {description.noun}", *description.contents, "## Training", _settings(groups, steps, config)]
    if best := read_best(Path(config.output_dir)):
        parts.append(
            f"`{BEST_NAME}/` has the result of step {best['step']:,}, whose loss on photos that were not trained on is "
            f"{best[LOSS]:.4f}: {best['rule']}."
        )
    if config.ema_decay:
        parts.append(
            f"`{AVERAGE_NAME}/` has the exponential moving average of what was trained, with a decay of "
            f"{config.ema_decay:g}."
        )
    if (Path(config.output_dir) / CURVES_NAME).exists():
        parts.append(f"![Loss, learning rate and gradient norm]({CURVES_NAME})")
    return "\n\n".join(parts) + "\n"


def _called(config: SubjectOptions) -> str:
    """Return what the subjects are called."""
    first, *others = (code(subject.instance_prompt) for subject in config.all_subjects)
    if not others:
        return f"The subject is called as in the instance prompt, {first}."
    return f"Its {len(others) + 1} subjects are called as in their instance prompts, {', '.join([first, *others])}."


def _long_prompts(max_token_length: int) -> str:
    """Return how to draw with prompts as long as those of the training."""
    return (
        f"It was trained with prompts of up to {max_token_length} tokens, `--max_token_length {max_token_length}`: "
        f"encoded in chunks of {CHUNK_LENGTH}, as ComfyUI, AUTOMATIC1111 and Forge do by themselves. "
        f"`scripts/generate.py` needs the same option. diffusers' pipelines read the first {CHUNK_LENGTH} tokens of a "
        "prompt and cut the rest."
    )


def _settings(groups: Sequence[Group], steps: int, config: TrainingConfig) -> str:
    """Return the most important settings as a list; config.yaml has all."""
    optimizer = "AdamW with 8-bit state" if config.use_8bit_adam else config.optimizer
    first, *other_groups = groups
    settings = {
        "steps": f"{steps:,}",
        "batch": f"{config.train_batch_size} per device, {config.gradient_accumulation_steps} accumulated",
        "learning rate": f"{first.learning_rate:g}, {config.lr_scheduler}",
        "optimizer": f"{optimizer}, weight decay {config.adam_weight_decay:g}",
        "resolution": f"{config.resolution} px",
        "prior preservation": _prior(config),
        "seed": str(config.seed),
    }
    for group in other_groups:
        settings[f"learning rate of the {group.title}"] = f"{group.learning_rate:g}"
    if config.snr_gamma is not None:
        settings["min-SNR gamma"] = f"{config.snr_gamma:g}"
    if config.pretrained_vae_model_name_or_path:
        settings["VAE"] = code(shared_name(config.pretrained_vae_model_name_or_path))
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    return "\n".join([*lines, "", "`config.yaml` has every option."])


def _prior(config: PriorOptions) -> str:
    if not config.with_prior_preservation:
        return "none"
    source = (
        "the base model's own prediction"
        if config.prior_source == "base_model"
        else f"{config.num_class_images} class images each"
        if len(config.class_prompts) > 1
        else f"{config.num_class_images} class images"
    )
    classes = ", ".join(map(code, config.class_prompts))
    return f"{source} for {classes}, weight {config.prior_loss_weight:g}"


# ---- the upload ----

SHOWN = [CARD_NAME, f"{SAMPLES_NAME}/*.png", CURVES_NAME]


def push_to_hub(result: Path, config: TrainingConfig) -> None:
    """Upload the result, its card, what the card shows and the options, if --push_to_hub is set.

    config.yaml holds folders of this computer, for a later run to read; what is uploaded does not.

    Never raises: the result is saved already, so a failure is a warning with the command that uploads it later.
    """
    if not config.push_to_hub:
        return
    # Full names: the Hub's "*" would match files in checkpoint folders too
    copies = [path for path in result_paths(result.parent, result.name) if path == result or path.exists()]
    uploaded = [*(f"{path.name}/*" if path.is_dir() else path.name for path in copies), *SHOWN]
    name = config.hub_model_id or re.sub(r"[^\w.-]+", "-", Path(config.output_dir).resolve().name, flags=re.ASCII)
    try:
        api = HfApi(token=config.hub_token)
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            allow_patterns=uploaded,
            commit_message="DreamBooth training",
        )
        api.upload_file(
            repo_id=repository,
            path_or_fileobj=shared_yaml(config).encode(),
            path_in_repo=CONFIG_NAME,
            commit_message="DreamBooth training: options",
        )
    except Exception as error:
        included = " ".join(f"--include {shlex.quote(pattern)}" for pattern in uploaded)
        logger.warning(
            "--push_to_hub failed: %s: %s\nThe result is safe in %s. To upload it later:\n"
            "    hf auth login && hf upload %s %s . %s",
            *(type(error).__name__, _without_token(str(error), config), config.output_dir),
            *(shlex.quote(name), shlex.quote(config.output_dir), included),
        )
    else:
        logger.info("Uploaded to https://huggingface.co/%s", repository)


def _without_token(text: str, config: ReportOptions) -> str:
    return text.replace(config.hub_token, "***") if config.hub_token else text
