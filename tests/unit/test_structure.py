"""The house: imports point one way, and the adapter stands alone."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Each module may import these of the project's own; scripts may import all.
ALLOWED = {
    "kron_formats": {"kron_formats"},
    "kron_adapter": {"kron_formats"},
    "dreambooth.adapters": {"dreambooth", "kron_adapter", "kron_formats"},
    "dreambooth.checkpoint": {"dreambooth", "kron_formats"},  # for the one way that files get to the disk
    "dreambooth.errors": {"dreambooth", "kron_formats"},  # for the one error that files end in
    "dreambooth": {"dreambooth"},
    "toyworld": {"toyworld", "dreambooth", "kron_adapter"},  # it trains as the scripts do, and nothing imports it
}
OWN = {"kron_adapter", "kron_formats", "dreambooth", "toyworld", "scripts"}


def modules():
    paths = [ROOT / "kron_adapter.py"]
    paths += [path for folder in ("kron_formats", "dreambooth", "toyworld") for path in (ROOT / folder).glob("*.py")]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts), path) for path in paths]


def imported(path) -> set[str]:
    """The top-level packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module, path", modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(module, path):
    allowed = ALLOWED.get(module, ALLOWED.get(module.split(".")[0]))
    assert imported(path) & OWN <= allowed


def test_the_adapter_needs_torch_and_safetensors_only():
    code = "import sys, kron_adapter; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"diffusers", "transformers", "peft", "accelerate", "PIL"}


def test_no_module_is_a_drawer_for_leftovers():
    names = {part for module, _ in modules() for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
