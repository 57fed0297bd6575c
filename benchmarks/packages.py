"""Which packages this environment lacks, and installing them from a folder of wheels. Imports none of them."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from dreambooth.errors import UserError

GIVEN = "torch"  # comes with the machine, and so does what it needs


def pins(file: Path) -> dict[str, str]:
    """Return package -> version of a requirements file of exact versions."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return package -> version of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing(names: Iterable[str]) -> list[str]:
    """Return those among packages, and what they need in turn, that are not installed."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:  # it belongs to them, and without it only they can be looked for
        return sorted({"packaging", *names} - versions(names).keys())
    waiting, seen, absent = [*names], set(), []
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        if not versions([name]):
            absent.append(name)
        elif name != GIVEN:
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return sorted(absent)


def install(names: Iterable[str], wheels: Path, target: Path) -> None:
    """Install what is missing among packages, and what they need in turn, into a folder, and import from there.

    Raises UserError if the folder of wheels lacks one.
    """
    if str(target) not in sys.path:
        sys.path.insert(0, str(target))
    tried: set[str] = set()
    while lacking := set(missing(names)) - tried:  # what a package needs is known once it is installed
        tried |= lacking
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--find-links", str(wheels), "--target", str(target), *sorted(lacking)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"--wheels {wheels}: {result.stderr.strip()}")
        importlib.invalidate_caches()


def differences(pinned: Mapping[str, str]) -> dict[str, str]:
    """Return package -> version of those that are installed in another version than the pinned one."""
    return {name: version for name, version in versions(pinned).items() if version.partition("+")[0] != pinned[name]}
