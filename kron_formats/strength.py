"""The strength by which peft multiplies an adapter: alpha / r, which is not in its tensors but beside them.

peft keeps it in adapter_config.json, diffusers in the metadata of the file, for each component under its name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kron_formats.errors import KroneckerError
from kron_formats.files import excerpt, parse_json, read_json

PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the metadata key under which diffusers saves peft's configuration


def peft_configs(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return prefix of layers' names -> peft's configuration of those layers, from its file or diffusers' metadata.

    Raises KroneckerError if the tensors are peft's and there is no configuration beside them.
    """
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        try:
            return {"": read_json(path.parent / PEFT_CONFIG)}
        except KroneckerError as error:
            raise KroneckerError(
                f"{path} was saved by peft, but its strength is unknown: {PEFT_CONFIG} beside it: {error}"
            ) from error
    config = parse_json(metadata.get(DIFFUSERS_CONFIG, "{}"), f"{path}: the metadata {DIFFUSERS_CONFIG}")
    if "r" in config:
        return {"": config}
    parts = defaultdict(dict)
    for key, value in config.items():
        component, _, option = key.partition(".")
        parts[f"{component}."][option] = value
    return parts


def peft_strength(configs: Mapping[str, dict[str, Any]], name: str, path: Path) -> float:
    """Return alpha / r of a layer, by which peft multiplies full factors too; 1 if the file is not peft's."""
    prefix = next((prefix for prefix in configs if name.startswith(prefix)), None)
    if prefix is None:
        return 1.0
    config, layer = configs[prefix], name.removeprefix(prefix)
    try:
        alpha = _value(config, "alpha_pattern", "alpha" if "alpha" in config else "lora_alpha", layer)
        r = _value(config, "rank_pattern", "r", layer)
        if r <= 0:
            raise ValueError(f"the rank {r}")
    except ValueError as error:
        raise KroneckerError(f"{path}: the strength of {name} is unknown: peft's configuration has {error}") from error
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _value(config: Mapping[str, Any], patterns_name: str, name: str, layer: str) -> float:
    """Return an option of the configuration, or a layer's own value of it. Raises ValueError if it is not a number.

    peft takes patterns for regular expressions; an untrusted one could run for years. Those that peft and diffusers
    write are names: ends of paths, or whole paths after "^".
    """
    words = layer.split(".")
    names = {".".join(words[start:]) for start in range(len(words))} | {f"^{layer}"}
    value, patterns = config.get(name), config.get(patterns_name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{patterns_name} {excerpt(repr(patterns))}, which is not a table")
    for pattern, own in patterns.items():
        if not re.fullmatch(r"\^?[\w.\\-]+", pattern):
            raise ValueError(f"{patterns_name} {excerpt(pattern)}, which is not a name")
        if pattern.replace("\\.", ".") in names:
            value = own
            break
    if value is None:
        raise ValueError(f"no '{name}'")
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ValueError(f"'{name}' {excerpt(repr(value))}, which is not a usable number")
    return float(value)
