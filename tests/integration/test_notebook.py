"""The notebook runs as its reader runs it, on the toy world; and is committed as it was before it ran."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

from tests.conftest import ROOT, WEIGHTS
from tests.unit.test_docs import commands, flags, program_in

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def set_variables(notebook, **values) -> None:
    """Replace the values of variables in the first cell of code."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in values.items():
        cell.source, replaced = re.subn(rf"^{name} = \S+", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert replaced == 1, name


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_it_trains_and_draws(notebook, tmp_path, monkeypatch):
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    set_variables(notebook, STEPS=2, DRAWING_STEPS=1, OUTPUT=str(tmp_path / "out"))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}})
    client.execute()  # raises CellExecutionError
    with safe_open(tmp_path / "out" / "dog" / WEIGHTS, "pt") as file:
        assert file.metadata()["kronecker.step"] == "2"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]  # a picture that is missing is just that
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 6 + 2  # photos, samples, the grid
    assert (tmp_path / "out" / "dog" / "images" / "grid.png").is_file()
    assert not (tmp_path / "out" / "own").exists()  # no photos were given


def test_its_commands_have_flags_that_exist(notebook):
    found = [words for source in code(notebook) for words in commands(source)]
    assert len(found) == 4
    for words in found:
        place, program = program_in(words)
        given = {word for word in words[place:] if word.startswith("--")}
        assert given <= flags(program), words


def test_what_needs_a_gpu_and_the_hub_is_skipped_without_photos(notebook):
    for source in code(notebook)[2:]:
        assert ("stable-diffusion" in source or "configs/sd15" in source) == ("$PHOTOS" in source)
        assert "$PHOTOS" not in source or source.splitlines()[1] == '[ -n "$PHOTOS" ] || exit 0'
