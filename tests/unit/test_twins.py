"""The two training scripts differ in data, not in behaviour."""

import ast

import pytest

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from tests.conftest import ROOT

SCRIPTS = ("train_dreambooth_kronecker.py", "train_dreambooth_kronecker_sdxl.py")
NAMES = ["Config", "Pipeline", "load_models", "encode_prompts", "unet_condition", "main"]


def definitions(script: str) -> dict[str, ast.stmt]:
    """The module's top-level assignments, classes and functions, in order."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Assign):
            found[node.targets[0].id] = node
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_defines_the_six_names(script):
    assert list(definitions(script)) == NAMES


def test_main_is_the_same_statement_for_statement():
    ours, theirs = (definitions(script)["main"] for script in SCRIPTS)
    assert ast.dump(ours) == ast.dump(theirs)
    assert len(ast.unparse(ours).splitlines()) < 70, "main() has to read as a table of contents"


def test_both_configs_have_the_same_options():
    assert list(sd.Config.__dataclass_fields__) == list(sdxl.Config.__dataclass_fields__)
    assert (sd.Config.resolution, sdxl.Config.resolution) == (512, 1024)
