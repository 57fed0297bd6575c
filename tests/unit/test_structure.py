"""The house: imports point one way, from the rooms above to those below, and the adapter stands alone."""

import ast
import subprocess
import sys

from tests.conftest import ROOT

# Each room may import itself and the rooms above it in this list.
ROOMS = (
    "kron_formats",
    "kron_adapter",
    "dreambooth.console",
    "dreambooth.errors",
    "dreambooth.wording",
    "dreambooth.markdown",
    "dreambooth.layout",
    "dreambooth.seeds",
    "dreambooth.options",
    "dreambooth.tokens",
    "dreambooth.words",
    "dreambooth.family",
    "dreambooth.families",
    "dreambooth.data",
    "dreambooth.runtime",
    "dreambooth.base_model",
    "dreambooth.conversion",
    "dreambooth.drawing",
    "dreambooth.demo",
    "dreambooth.method",
    "dreambooth.contrast",
    "dreambooth.start",
    "dreambooth.kronecker",
    "dreambooth.loop",
    "dreambooth.scoring",
    "dreambooth.output",
    "dreambooth.report",
    "dreambooth.train",
    "methods",
    "train_dreambooth_kronecker",
    "train_dreambooth_kronecker_sdxl",
    "studies",
    "interpretation",
    "scripts",
    "toyworld",
    "benchmarks",
)


def sources():
    """Yield (dotted name, path) of every module of the project, tests apart."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests" and not parts[0].startswith((".", "outputs", "build")):
            yield ".".join(part for part in parts if part != "__init__"), path


def room_of(module: str) -> str | None:
    """Return the room that a module is in, None for other people's."""
    found = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(found, key=len, default=None)


def imported(path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_one_way():
    wrong, homeless = [], []
    for module, path in sources():
        room = room_of(module)
        if room is None:
            homeless += [module] if module != "dreambooth" else []
            continue
        rooms = {room_of(name) for name in imported(path)} - {None}
        wrong += [f"{module} imports {other}" for other in rooms if ROOMS.index(other) > ROOMS.index(room)]
    assert not homeless, "a new room has a place in ROOMS"
    assert not wrong


def test_modules_of_a_room_import_each_other_without_circles():
    below = {}
    modules = dict(sources())
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        below[module] = {name for name in names if name in modules and room_of(name) == room_of(module)} - {module}
    while leaves := [module for module, names in below.items() if not names]:
        for leaf in leaves:
            del below[leaf]
        for names in below.values():
            names.difference_update(leaves)
    assert not below, "each of these is in a circle, or above one"


def test_the_adapter_needs_torch_and_safetensors_only():
    code = "import sys, kron_adapter; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"diffusers", "transformers", "peft", "accelerate", "PIL"}


def test_options_are_parsed_without_torch():
    code = "import sys, dreambooth.options.parsing, dreambooth.options.training, methods.options; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in result.stdout.split()


def test_no_module_is_a_drawer_for_leftovers():
    names = {part for module, _ in sources() for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def test_a_script_is_its_man_page_its_options_and_the_call():
    for name in ("train_dreambooth_kronecker", "train_dreambooth_kronecker_sdxl", "scripts/evaluate"):
        body = ast.parse((ROOT / f"{name}.py").read_text()).body
        defined = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
        assert defined == ["Config", "main"]
