"""The Dockerfiles, as far as they can be known without building them."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.conftest import ROOT
from tests.unit.test_package import PROJECT, requirements
from tests.unit.test_structure import ROOMS

every_dockerfile = pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
PIP_OPTIONS_WITH_VALUES = {"--requirement", "--extra-index-url"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows them."""
    text = re.sub("^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(words[0], words[1].strip()) for line in text.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def values(name: str, instruction: str) -> list[str]:
    return [value for kind, value in instructions(name) if kind == instruction]


def in_context(path: str) -> bool:
    """Whether Docker sends a file of this project to a build: the last pattern that matches it or a parent decides."""
    parts, sent = PurePosixPath(path).parts, True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = PurePosixPath(line.removeprefix("!")).parts
        starts = range(len(parts)) if pattern[0] == "**" else [0]
        pattern = [part for part in pattern if part != "**"]
        if any(_matches(parts[start:], pattern) for start in starts):
            sent = line.startswith("!")
    return sent


def _matches(parts, pattern) -> bool:
    return len(parts) >= len(pattern) and all(map(fnmatch, parts, pattern))


@every_dockerfile
def test_packages_come_from_the_requirements_alone_and_in_a_layer_before_the_code(name):
    kinds = [kind for kind, _ in instructions(name)]
    (install,) = [run for run in values(name, "RUN") if "pip" in shlex.split(run)]
    words = shlex.split(install)
    words = words[words.index("install") + 1 :]
    assert {*words[::2]} <= PIP_OPTIONS_WITH_VALUES and words[-2:] == ["--requirement", "requirements.txt"]
    pins = {pin.name.lower(): next(iter(pin.specifier)).version for pin in requirements("requirements.txt")}
    assert not [version for version in pins.values() if version in (ROOT / name).read_text()]
    assert values(name, "COPY") == ["requirements.txt .", ". ."]
    places = [place for place, kind in enumerate(kinds) if kind == "COPY"]
    assert places[0] < instructions(name).index(("RUN", install)) < places[1]
    assert in_context("requirements.txt")


def test_only_the_image_for_cpus_takes_the_builds_for_cpus():
    defaults = dict(arg.split("=", 1) for arg in values("Dockerfile.cpu", "ARG"))
    assert defaults["TORCH_INDEX"].endswith("/whl/cpu")
    assert "--extra-index-url $TORCH_INDEX" in " ".join(shlex.split(" ".join(values("Dockerfile.cpu", "RUN"))))
    assert "index" not in (ROOT / "Dockerfile").read_text()


@every_dockerfile
def test_programs_run_as_a_user_who_keeps_what_is_downloaded(name):
    (user,), (volume,) = values(name, "USER"), values(name, "VOLUME")
    setup = next(run for run in values(name, "RUN") if "useradd" in run)
    assert user in setup.split() and f"--owner {user} outputs {volume}" in setup
    assert f"HF_HOME={volume}" in values(name, "ENV")
    assert [kind for kind, _ in instructions(name)].index("USER") > max(
        place for place, (kind, _) in enumerate(instructions(name)) if kind in ("RUN", "COPY")
    )


@every_dockerfile
def test_the_first_line_builds_and_runs_it(name):
    usage = (ROOT / name).read_text().splitlines()[0].removeprefix("# ")
    build, run = (shlex.split(command) for command in usage.split(" && "))
    image = build[build.index("-t") + 1]
    assert build[:2] == ["docker", "build"] and build[-1] == "."
    assert (build[build.index("-f") + 1] if "-f" in build else "Dockerfile") == name
    assert (
        run[:2] == ["docker", "run"] and in_context(program := run[run.index(image) + 2]) and (ROOT / program).exists()
    )
    assert ("--gpus" in run) == (name == "Dockerfile")


@every_dockerfile
def test_its_python_is_one_that_is_tested(name):
    (base,) = values(name, "FROM")
    version = base.removeprefix("python:").removesuffix("-slim")
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_code_goes_into_an_image_and_nothing_of_the_host():
    rooms = {room.split(".")[0] for room in ROOMS} - {"benchmarks"}
    needed = [room if (ROOT / room).is_dir() else f"{room}.py" for room in rooms]
    assert all((ROOT / name).exists() and in_context(name) for name in [*needed, "configs", "toyworld/models/sd"])
    for private in (
        ".git/config",
        ".venv/bin/python",
        ".env",
        "outputs/dog/config.yaml",
        "photos/dog/1.jpg",
        "wandb/run",
    ):
        assert not in_context(private), private
    assert not in_context("dreambooth/data/__pycache__/x.pyc") and not in_context("tests/conftest.py")
