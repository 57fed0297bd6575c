"""The model card, OUTPUT_DIR/README.md, and its way to the Hub together with the adapter."""

import json
import logging
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from safetensors import safe_open

from dreambooth.config import TrainingConfig
from dreambooth.report import CURVES_NAME, warn_only

logger = logging.getLogger(__name__)

FAMILIES = {"StableDiffusionPipeline": "stable-diffusion", "StableDiffusionXLPipeline": "stable-diffusion-xl"}
PARTS = {"lora_unet": "UNet", "lora_te": "text encoder", "lora_te1": "text encoder 1", "lora_te2": "text encoder 2"}


def save_card(adapter: Path, pipeline_class: type, steps: int, config: TrainingConfig) -> None:
    """Write OUTPUT_DIR/README.md, which says what the file `adapter` is. Never raises: a failure is a warning."""
    output = Path(config.output_dir)
    with warn_only(f"{output / 'README.md'} was not written"):
        family = FAMILIES[pipeline_class.__name__]
        sheets = sorted((output / "samples").glob("step-*.png"))
        sheet = sheets[-1].relative_to(output).as_posix() if sheets else None
        text = _front_matter(family, sheet, config) + _body(adapter, sheet, steps, config)
        (output / "README.md").write_text(text, encoding="utf-8")


# ---- what the card says ----


def _front_matter(family: str, sheet: str | None, config: TrainingConfig) -> str:
    """Return the lines that the Hub reads."""
    base = config.pretrained_model_name_or_path
    entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if _is_on_hub(base):
        entries |= {"base_model": base, "base_model_relation": "adapter"}
        entries |= {"license_link": f"https://huggingface.co/{base}"}
    entries |= {
        "license": "other",
        "license_name": "that-of-the-base-model",
        "instance_prompt": config.instance_prompt,
        "tags": ["dreambooth", "kronecker", "lokr", family, "diffusers", "text-to-image"],
    }
    if sheet:
        entries["widget"] = [{"text": prompt, "output": {"url": sheet}} for prompt in config.validation_prompt]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---\n\n"


def _is_on_hub(name: str) -> bool:
    """Whether a base model is a name on the Hub, as far as can be seen from here: not a folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None and not os.path.exists(name)


def _body(adapter: Path, sheet: str | None, steps: int, config: TrainingConfig) -> str:
    base = config.pretrained_model_name_or_path
    prompt = config.validation_prompt[0] if config.validation_prompt else config.instance_prompt
    parts = [
        f"# {_code(config.instance_prompt)}",
        f"A Kronecker adapter (DreamBooth) for {_code(base)}: `W + A ⊗ B` on the attention projections "
        "([DiffuseKronA](https://arxiv.org/abs/2402.17412)). The words that call the subject are those of the "
        f"instance prompt, {_code(config.instance_prompt)}.",
    ]
    if sheet:
        rows = "".join(f"{number}. {_code(text)}\n" for number, text in enumerate(config.validation_prompt, 1))
        parts += ["## Samples", f"![Samples, one row for each prompt]({sheet})", rows.rstrip()]
    parts += ["## Use", _usage(adapter.name, base, prompt)]
    parts += ["## The adapter", *_factors(adapter), "## Training", _settings(steps, config)]
    if (Path(config.output_dir) / CURVES_NAME).exists():
        parts.append(f"![Loss, learning rate and gradient norm]({CURVES_NAME})")
    return "\n\n".join(parts) + "\n"


def _usage(file: str, base: str, prompt: str) -> str:
    return f"""```python
from diffusers import DiffusionPipeline
from kron_adapter import load_kronecker  # kron_adapter.py comes with the training script

pipeline = DiffusionPipeline.from_pretrained({_python(base)}).to("cuda")
load_kronecker(pipeline, {_python(file)}, scale=1.0)  # 0 is the base model, 1 as trained
image = pipeline({_python(prompt)}).images[0]
```

The file is a LoKr with full factors under kohya's names, which ComfyUI, AUTOMATIC1111 and Forge load like any LoRA: put
it into their folder of LoRAs."""


def _factors(adapter: Path) -> list[str]:
    """Return the size in words, and a table of the factors of each kind of layer, as the file itself has them."""
    with safe_open(adapter, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        targets = json.loads((file.metadata() or {}).get("kronecker.targets", "[]"))
    kinds: Counter[tuple[str, str, int, int, int, int]] = Counter()
    for name in (key.removesuffix(".lokr_w1") for key in shapes if key.endswith(".lokr_w1")):
        part = re.match("[a-z]+_[a-z0-9]+", name)
        ends = [target for target in targets if name.endswith("_" + target.replace(".", "_"))]
        kinds[PARTS[part[0]], max(ends, key=len), *shapes[f"{name}.lokr_w1"], *shapes[f"{name}.lokr_w2"]] += 1
    rows = "".join(
        f"| {part} | `{end}` | {a2 * b2:,} → {a1 * b1:,} | ({a1}, {a2}) | ({b1}, {b2}) | {count} |\n"
        for (part, end, a1, a2, b1, b2), count in sorted(kinds.items())
    )
    table = f"| in | layers | features | A | B | number |\n| --- | --- | --- | --- | --- | ---: |\n{rows.rstrip()}"
    parameters = sum(count * (a1 * a2 + b1 * b2) for (_, _, a1, a2, b1, b2), count in kinds.items())
    number = f"{sum(kinds.values())} layers, {parameters:,} parameters"
    return [f"{_code(adapter.name)}: {number}, {adapter.stat().st_size / 2**20:.2f} MiB.", table]


def _settings(steps: int, config: TrainingConfig) -> str:
    """Return the settings one would ask for first, as a list; config.yaml holds all."""
    optimizer = "AdamW with 8-bit state" if config.use_8bit_adam else config.optimizer
    settings = {
        "steps": f"{steps:,}",
        "batch": f"{config.train_batch_size} per device, {config.gradient_accumulation_steps} accumulated",
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}",
        "optimizer": f"{optimizer}, weight decay {config.adam_weight_decay:g}",
        "resolution": f"{config.resolution} px",
        "prior preservation": _prior(config),
        "seed": str(config.seed),
    }
    if config.train_text_encoder:
        rate = config.learning_rate if config.text_encoder_lr is None else config.text_encoder_lr
        settings["text encoders' learning rate"] = f"{rate:g}"
    if config.snr_gamma is not None:
        settings["min-SNR gamma"] = f"{config.snr_gamma:g}"
    if config.pretrained_vae_model_name_or_path:
        settings["VAE"] = _code(config.pretrained_vae_model_name_or_path)
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    return "\n".join([*lines, "", "`config.yaml` holds every option."])


def _prior(config: TrainingConfig) -> str:
    if not config.with_prior_preservation:
        return "none"
    source = (
        "the base model's own prediction"
        if config.prior_source == "base_model"
        else f"{config.num_class_images} class images"
    )
    return f"{source} for {_code(config.class_prompt or '')}, weight {config.prior_loss_weight:g}"


def _code(text: str) -> str:
    """Return a text as inline code of Markdown, in which nothing of it is Markdown."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text else f"`{text}`"


def _python(text: str) -> str:
    """Return a text as a string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


# ---- to the Hub ----

SHOWN = ["README.md", "samples/*.png", "config.yaml", CURVES_NAME]


def push_to_hub(adapter: Path, config: TrainingConfig) -> None:
    """Upload the adapter, its card and what the card shows, where --push_to_hub asks for it.

    Never raises: training is done and saved, so a failure is a warning with the command that uploads it later.
    """
    if not config.push_to_hub:
        return
    uploaded = [adapter.name, *SHOWN]  # by full names: the Hub's "*" goes into checkpoint folders too
    name = config.hub_model_id or re.sub(r"[^\w.-]+", "-", Path(config.output_dir).resolve().name, flags=re.ASCII)
    try:
        api = HfApi(token=config.hub_token)
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            allow_patterns=uploaded,
            commit_message="Kronecker adapter, DreamBooth",
        )
    except Exception as error:
        included = " ".join(f"--include {shlex.quote(pattern)}" for pattern in uploaded)
        logger.warning(
            "--push_to_hub failed: %s: %s\nThe adapter is safe in %s. To upload it later:\n"
            "    hf auth login && hf upload %s %s . %s",
            *(type(error).__name__, _without_token(str(error), config), config.output_dir),
            *(shlex.quote(name), shlex.quote(config.output_dir), included),
        )
    else:
        logger.info("Uploaded to https://huggingface.co/%s", repository)


def _without_token(text: str, config: TrainingConfig) -> str:
    return text.replace(config.hub_token, "***") if config.hub_token else text
