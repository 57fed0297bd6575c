"""`option` declares a flag on a dataclass field; the functions below look up what has been declared.

    x: int = option("Side of the images, px.", 512, at_least=8, multiple_of=8)

A group of options is a frozen, keyword-only dataclass; a script's options inherit from all groups that it needs.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from kron_formats.paths import last_part, shared_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

GIVEN = ()  # what an option `needs` of another that may have any value, as long as it has one


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number. A bound that is None does not apply."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    multiple_of: int | None = None

    def hold_for(self, value: float) -> bool:
        """Whether `value` is in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """In words: "at least 8 and a multiple of 8"."""
        given = {name.replace("_", " "): value for name, value in asdict(self).items() if value is not None}
        return " and ".join(f"{'a ' * (words == 'multiple of')}{words} {value}" for words, value in given.items())


@dataclass(frozen=True)
class Declaration:
    """What `option` says about a field, apart from its name, type and default."""

    help: str
    bounds: Bounds
    choices: tuple[str, ...] | None
    decides_result: bool
    secret: bool
    needs: Mapping[str, Sequence[Any]]
    path: bool
    hub: bool
    nested: bool


def option(
    help: str,
    default: Any = MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    multiple_of: int | None = None,
    choices: Sequence[str] | None = None,
    decides_result: bool = True,
    secret: bool = False,
    needs: Mapping[str, Sequence[Any]] | None = None,
    path: bool = False,
    hub: bool = False,
    nested: bool = False,
) -> Any:  # type checkers then accept it as the value of a field of any type
    """Return a dataclass field that becomes a flag. `help` says what it does, with its unit.

    The bounds apply to a number, or to each number of a list; None is always in range. `decides_result=False` marks an
    option that may change when a run resumes. A secret is never written anywhere. `needs` maps other options to the
    values, or GIVEN, without which this one has no effect; setting it then is a warning. In a `path`, ~ is the home
    folder; `hub` says that it may also be a name on the Hub. The value of a `nested` one is a dict: config files have
    it written out, and the flag names a YAML file with it.
    """
    bounds = Bounds(at_least=at_least, above=above, below=below, at_most=at_most, multiple_of=multiple_of)
    offered = None if choices is None else tuple(choices)
    declaration = Declaration(help, bounds, offered, decides_result, secret, needs or {}, path or hub, hub, nested)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"option": declaration})
    return field(default=default, metadata={"option": declaration})


def groups_of(config_class: type["DataclassInstance"]) -> dict[type, dict[str, Declaration]]:
    """Return the groups of a class of options, in the order of its bases, and the options of each.

    An option belongs to the class that declares it first. A subclass may redeclare it, or change only its default with
    `name: type = default`. A class without options of its own, which only combines groups, is not a group. Raises
    TypeError if a field is not declared by `option`.
    """
    declared: dict[str, Declaration] = {}
    names_of: dict[type, list[str]] = {}
    for group in reversed(config_class.__mro__):
        if not is_dataclass(group):
            continue
        own_fields = {entry.name: entry for entry in fields(group)}
        own_names = [name for name in inspect.get_annotations(group) if name in own_fields]
        names_of[group] = [name for name in own_names if name not in declared]
        for name in own_names:
            declaration = own_fields[name].metadata.get("option") or declared.get(name)
            if declaration is None:
                raise TypeError(f"{group.__name__}.{name} is not declared by option()")
            declared[name] = declaration
    declaring = [group for group in config_class.__mro__ if names_of.get(group)]
    ordered = dict.fromkeys(base for group in declaring for base in _bases_first(group) if base in declaring)
    return {group: {name: declared[name] for name in names_of[group]} for group in ordered}


def _bases_first(group: type) -> list[type]:
    """Return a class and all its bases, each base before the class that inherits from it."""
    return [*(base for direct in group.__bases__ for base in _bases_first(direct)), group]


def declarations(config_class: type["DataclassInstance"]) -> dict[str, Declaration]:
    """Return the declaration of every option, in the order of the groups."""
    return {name: declaration for group in groups_of(config_class).values() for name, declaration in group.items()}


def option_names(config_class: type["DataclassInstance"]) -> list[str]:
    """Return the names of all options, in the order of the groups."""
    return list(declarations(config_class))


def defaults(config_class: type["DataclassInstance"]) -> dict[str, Any]:
    """Return the default of every option, MISSING for those that have none."""
    return {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(config_class)
    }


def public_options(config: "DataclassInstance") -> dict[str, Any]:
    """Return all options but secrets, which are never written, in the order of the groups."""
    values = asdict(config)
    return {name: values[name] for name, declared in declarations(type(config)).items() if not declared.secret}


def shared_options(config: "DataclassInstance") -> dict[str, Any]:
    """Return the public options as files that are shared hold them: of paths on this computer, only the last part."""
    declared = declarations(type(config))
    return {name: _shared(value, declared[name]) for name, value in public_options(config).items()}


def _shared(value: Any, declared: Declaration) -> Any:
    if isinstance(value, list):
        return [_shared(entry, declared) for entry in value]
    if not declared.path or not isinstance(value, str):
        return value
    return shared_name(value) if declared.hub else last_part(value)


def result_options(config: "DataclassInstance") -> dict[str, Any]:
    """Return the public options that decide the result of a run."""
    declared = declarations(type(config))
    return {name: value for name, value in public_options(config).items() if declared[name].decides_result}


def describe_group(group: type) -> str:
    """Return a group's title in --help: the first line of its docstring."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
