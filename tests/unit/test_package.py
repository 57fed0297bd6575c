"""The package: what it holds, what it needs, and that it works without the checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"training": "requirements.txt", "dev": "tests/requirements.txt"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
# Saves and loads an adapter with the installed package, whose folder is the argument.
ROUND_TRIP = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
import kron_adapter, kron_formats

model = torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})})
x, plain = torch.randn(3, 8), torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})})
plain.load_state_dict(model.state_dict())
kron_adapter.inject_kronecker(model, 2, 4, targets=["to_q"])
for parameter in kron_adapter.kronecker_parameters(model):
    torch.nn.init.normal_(parameter)
kron_adapter.save_kronecker({"unet": model}, "adapter.safetensors")
kron_adapter.load_kronecker({"unet": plain}, "adapter.safetensors")
torch.testing.assert_close(plain["attn1"]["to_q"](x), model["attn1"]["to_q"](x))
print(kron_adapter.__file__, kron_formats.__file__, sep="\\n")
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


# What `uv run PROGRAM` and its like install, as PEP 723 has it: a block of comments that holds TOML
INLINE = re.compile(r"^# /// script\n((?:^#(?: .*)?\n)+)^# ///$", re.MULTILINE)
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "methods", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
    and path.name != "demo.py"  # Gradio's metadata exclude the Pillow that is pinned, so uv finds no environment
]


def requirements(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy of the sources: a build leaves folders beside them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(
        ".*", "__pycache__", "*.safetensors", "*.png", "*.jpg", "outputs", "wandb", "build"
    )
    shutil.copytree(ROOT, source, ignore=unneeded, dirs_exist_ok=True)
    command = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*PIP, *command], cwd=folder, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_adapter_its_formats_and_the_licence(wheel):
    info = f"kron_adapter-{PROJECT['version']}.dist-info"
    names = set(wheel.namelist())
    formats = {path for path in (ROOT / "kron_formats").rglob("*") if path.suffix in {".py", ".json"}}
    expected = {path.relative_to(ROOT).as_posix() for path in {ROOT / "kron_adapter.py", *formats}}
    assert {name for name in names if not name.startswith(info)} == expected
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_what_it_needs_is_torch_and_safetensors_and_the_pins_satisfy_it(metadata):
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    bare = {need.name: need for need in needs if need.marker is None}
    assert set(bare) == {"torch", "safetensors"}
    assert bare["safetensors"].extras == {"torch"}  # numpy, without which safetensors saves nothing
    pins = {pin.name: next(iter(pin.specifier)).version for pin in requirements("requirements.txt")}
    for name, need in bare.items():
        assert need.specifier.contains(pins[name])
        assert not {"==", "~=", "<", "<="} & {bound.operator for bound in need.specifier}


@pytest.mark.parametrize(("extra", "file"), EXTRAS.items())
def test_an_extra_is_its_requirements_file(metadata, extra, file):
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    of_extra = {
        f"{need.name}{need.specifier}" for need in needs if need.marker and need.marker.evaluate({"extra": extra})
    }
    assert of_extra == {f"{pin.name}{pin.specifier}" for pin in requirements(file)}
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in requirements(file))
    assert extra in metadata.get_all("Provides-Extra")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_run_by_itself_asks_for_the_pins(script):
    (block,) = INLINE.findall((ROOT / script).read_text())
    asked = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert asked["requires-python"] == PROJECT["requires-python"]
    assert [Requirement(line) for line in asked["dependencies"]] == requirements("requirements.txt")


def test_the_installed_package_works_without_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel.filename], check=True)
    command = [sys.executable, "-I", "-c", ROUND_TRIP, str(site)]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    adapter, formats, modules = result.stdout.splitlines()[-3:]
    assert Path(adapter) == site / "kron_adapter.py" and Path(formats) == site / "kron_formats" / "__init__.py"
    assert not set(modules.split()) & {"diffusers", "transformers", "peft", "accelerate", "dreambooth", "toyworld"}


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings and headings[0][0] == PROJECT["version"]


def test_what_says_which_pythons_there_are_agrees():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    assert [f"3.{line.removeprefix(prefix)}" for line in PROJECT["classifiers"] if line.startswith(prefix)] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:2])))
    types = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    assert types["pythonVersion"] == versions[0]
    assert f"sys.version_info < ({versions[0].replace('.', ', ')})" in (ROOT / "scripts" / "venv.sh").read_text()


def test_files_under_another_licence_are_attributed():
    attributions = (ROOT / "ATTRIBUTIONS.md").read_text()
    data = [path for folder in ("configs", "toyworld") for path in (ROOT / folder).rglob("*")]
    others = [path for path in data if path.suffix in {".txt", ".yaml", ".json"} and "CC BY" in path.read_text()]
    assert others
    for path in others:
        assert f"`{path.relative_to(ROOT).as_posix()}`" in attributions
