"""The files under configs/: each begins with the command that runs it, and parses."""

import re
import shlex

import pytest
import yaml

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.options.parsing import parse_options, read_options
from dreambooth.options.training import config_class
from kron_formats.architectures import load_architecture
from methods.train import FAMILIES, METHODS
from studies.counting import count_trained
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES_OF_METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
SCRIPTS = {"train_dreambooth_kronecker.py": sd, "train_dreambooth_kronecker_sdxl.py": sdxl}


def command(path) -> list[str]:
    """The words of the command in a file's first comment lines."""
    lines = re.match(r"(?:# .*\\\n)*# .*\n", path.read_text())[0]
    return shlex.split(re.sub(r"\\?\n# *", " ", "\n" + lines.replace("\\\n", "\n")))


def options_of(script: str, arguments: list[str]) -> tuple[type, list[str]]:
    """The class of options of a command, and the flags."""
    if script in SCRIPTS:
        return SCRIPTS[script].Config, arguments
    method, family, *flags = arguments
    return config_class(METHODS[method].options, FAMILIES[family].options), flags


@pytest.mark.parametrize("path", [*RECIPES, *RECIPES_OF_METHODS], ids=lambda path: path.stem)
def test_a_recipe_s_own_command_parses_without_a_warning(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = command(path)
    assert words[:2] == ["accelerate", "launch"]
    script = next(word for word in words if word in (*SCRIPTS, "methods/train.py"))
    options, arguments = options_of(script, words[words.index(script) + 1 :])
    assert arguments[arguments.index("--config") + 1] == path.relative_to(ROOT).as_posix()
    config = parse_options(options, "", arguments)
    assert config.pretrained_model_name_or_path and config.instance_prompts
    assert not capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES_OF_METHODS, ids=lambda path: path.stem)
def test_a_method_s_recipe_is_named_after_what_it_trains(path):
    words = command(path)
    method, family = words[words.index("methods/train.py") + 1 :][:2]
    assert f"{path.stem}-".startswith(f"{method}-{family}-")


def test_every_method_has_a_recipe_for_every_family():
    stems = {path.stem for path in RECIPES_OF_METHODS}
    assert {f"{method}-{family}" for method in METHODS for family in FAMILIES} <= stems


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_configuration_says_how_it_is_used(path):
    words = command(path)
    assert words[:2] == ["accelerate", "launch"] and f"configs/accelerate/{path.name}" in words
    assert all((ROOT / word).is_file() for word in words if word.endswith((".yaml", ".py")))
    assert yaml.safe_load(path.read_text())["num_processes"] >= 1


def test_there_is_a_recipe_for_every_common_case():
    names = {path.stem for path in RECIPES}
    assert {
        "sd15",
        "sd15-small",
        "sd21",
        "sdxl-small",
        "sdxl-8gb",
        "sdxl-12gb",
        "sdxl-24gb",
        "sdxl-80gb",
        "paper-sdxl",
    } <= names


@pytest.mark.parametrize(
    "recipe, parameters",
    [
        ("sd15", 364_512),
        ("sd21", 372_704),
        ("sdxl-24gb", 2_960_640),
        ("sd15-small", 49_536),
        ("sdxl-small", 453_120),
        ("paper-sdxl", 2_152_320),
    ],
)
def test_a_recipe_trains_as_many_numbers_as_it_says(recipe, parameters, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"{recipe}.yaml"
    words = command(path)
    script = next(word for word in words if word in SCRIPTS)
    config = parse_options(SCRIPTS[script].Config, "", words[words.index(script) + 1 :])
    family = SDXL if "sdxl" in script else SD
    models = load_architecture(re.match(r"sd15|sd21|sdxl", recipe.removeprefix("paper-"))[0])
    assert count_trained(KRONECKER, family, models, {}, config) == (parameters, parameters)
    if said := re.search(r"\(([\d,]+) parameters\)", path.read_text()):
        assert int(said[1].replace(",", "")) == parameters


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "subjects").glob("*.yaml")), ids=lambda path: path.stem)
def test_subjects_do_for_training_and_for_evaluation(path):
    prompts = ["--prompt", "a photo of {}", "--pretrained_model_name_or_path", "base"]
    described = ["--instance_data_dir", "photos", "--subjects", str(path)]
    config = read_options(sd.Config, "", ["--config", str(ROOT / "configs" / "subjects.yaml"), *described])
    assert list(read_options(EvaluationOptions, "", [*prompts, *described]).of_each_subject()) == [
        subject.folder for subject in config.all_subjects
    ]
