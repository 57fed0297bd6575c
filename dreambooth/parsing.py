"""Re-exports of what moved to `dreambooth.options`."""

from dreambooth.options.parsing import parse_options
from dreambooth.options.parsing import parse_options as parse_config
from dreambooth.options.yaml_file import flags_from_yaml

__all__ = ["flags_from_yaml", "parse_config", "parse_options"]
