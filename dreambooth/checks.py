"""Re-export of what moved to `dreambooth.options`."""

from dreambooth.options.checking import check_options as check_config

__all__ = ["check_config"]
