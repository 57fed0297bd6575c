"""Check that options are in range, compatible with each other, and have an effect."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.options.field import Declaration, declarations, defaults

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_options(config: "DataclassInstance") -> None:
    """Raise UserError, naming the flags, if an option is out of range or options conflict.

    Rules between a group's own options are in its method `check`; a rule across groups is in the first class that
    inherits from both. Each class's own `check` is called once, bases first.
    """
    check_values(config)
    for group in reversed(type(config).__mro__):
        if "check" in vars(group):
            vars(group)["check"](config)


def check_values(config: "DataclassInstance") -> None:
    """Raise UserError if a number is not finite or out of bounds, or a value is not one of its choices."""
    values = asdict(config)
    for name, declared in declarations(type(config)).items():
        value = values[name]
        for single in value if isinstance(value, list) else [value]:
            _check_value(name, single, declared)


def _check_value(name: str, value: Any, declared: Declaration) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"--{name} is {value}; it must be a finite number")
        if not declared.bounds.hold_for(value):
            raise UserError(f"--{name} is {value}; it must be {declared.bounds}")
    if isinstance(value, str) and declared.choices is not None and value not in declared.choices:
        raise UserError(f"--{name} {value}: choose from {', '.join(declared.choices)}")


def idle_options(config: "DataclassInstance") -> dict[str, str]:
    """Return the options that differ from their defaults but have no effect, and why: because of which other option."""
    values, declared, default = asdict(config), declarations(type(config)), defaults(type(config))
    return {
        name: lack
        for name in values
        if values[name] != default[name]
        for other, wanted in declared[name].needs.items()
        if (lack := _lack(other, values[other], wanted))
    }


def _lack(name: str, value: Any, wanted: Sequence[Any]) -> str:
    """Return how an option's value falls short of those wanted, "without --validation_prompt"; "" if it does not."""
    given = value if isinstance(value, list) else [value]
    if any(entry in wanted for entry in given) if wanted else any(given):
        return ""
    if not any(given):
        return f"without --{name}"
    choices = ", ".join(str(entry) for entry in wanted if entry is not None)
    return f"with --{name} {' '.join(map(str, given))}" + (f", only with {choices}" if choices else "")
