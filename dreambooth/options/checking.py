"""Check that options are in range, compatible with each other, and have an effect."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from dreambooth.errors import UserError
from dreambooth.options.field import Declaration, declarations

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


def idle_options(config: "DataclassInstance") -> list[str]:
    """Return a warning for each option that differs from its default but, because of another option, has no effect."""
    values, declared = asdict(config), declarations(type(config))
    defaults = {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(config)
    }
    return [
        f"--{name}{'' if declared[name].secret else f' {value}'} has no effect {lack}"
        for name, value in values.items()
        if value != defaults[name]
        for other, wanted in declared[name].needs.items()
        if (lack := _lack(other, values[other], wanted))
    ]


def _lack(name: str, value: Any, wanted: Sequence[Any]) -> str:
    """Return how an option's value falls short of those wanted, "without --validation_prompt"; "" if it does not."""
    given = value if isinstance(value, list) else [value]
    if any(entry in wanted for entry in given) if wanted else any(given):
        return ""
    if not any(given):
        return f"without --{name}"
    choices = ", ".join(str(entry) for entry in wanted if entry is not None)
    return f"with --{name} {' '.join(map(str, given))}" + (f", only with {choices}" if choices else "")
