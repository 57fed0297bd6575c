"""The files under configs/: each begins with the command that runs it, and parses."""

import re
import shlex

import pytest
import yaml

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.options.parsing import parse_options
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS = {"train_dreambooth_kronecker.py": sd, "train_dreambooth_kronecker_sdxl.py": sdxl}


def command(path) -> list[str]:
    """The words of the command in a file's first comment lines."""
    lines = re.match(r"(?:# .*\\\n)*# .*\n", path.read_text())[0]
    return shlex.split(re.sub(r"\\?\n# *", " ", "\n" + lines.replace("\\\n", "\n")))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_s_own_command_parses_without_a_warning(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = command(path)
    assert words[:2] == ["accelerate", "launch"]
    script = next(word for word in words if word in SCRIPTS)
    arguments = words[words.index(script) + 1 :]
    assert arguments[arguments.index("--config") + 1] == f"configs/{path.name}"
    config = parse_options(SCRIPTS[script].Config, "", arguments)
    assert config.pretrained_model_name_or_path and config.instance_prompt
    assert not capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_configuration_says_how_it_is_used(path):
    words = command(path)
    assert words[:2] == ["accelerate", "launch"] and f"configs/accelerate/{path.name}" in words
    assert all((ROOT / word).is_file() for word in words if word.endswith((".yaml", ".py")))
    assert yaml.safe_load(path.read_text())["num_processes"] >= 1


def test_there_is_a_recipe_for_every_common_case():
    names = {path.stem for path in RECIPES}
    assert {"sd15", "sd21", "sdxl-8gb", "sdxl-12gb", "sdxl-24gb", "sdxl-80gb", "paper-sdxl"} <= names
