"""benchmarks/gpu.py: every part has its rows, one that fails stops no other, and what is missing is said first."""

import json
import sys
import zipfile

import pytest
import torch

from benchmarks import drawing, gpu, packages, recipes, runs, unet_step
from benchmarks.gpu_parts import PEERS, RECIPES, parts, step_rows
from benchmarks.gpu_parts import test_rows as rows_of_tests
from dreambooth.errors import UserError

JUNIT = """<testsuites><testsuite>
<testcase name="test_a_run_trains[bf16]" time="2.5"/>
<testcase name="test_no_wait" time="0.1"><skipped message="needs a CUDA device"/></testcase>
{}</testsuite></testsuites>"""
FAILURE = (
    """<testcase name="test_broken" time="1"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>"""
)


@pytest.fixture
def dry_run(monkeypatch, tmp_path, fresh_accelerator):
    """Run gpu.main() in this process; pytest is not run, and each other program once, for all of its parts."""
    run_program, known = gpu.run_program, {}

    def run_once(part, folder, log, seconds, arguments):
        if part.program == "pytest":
            (folder / "tests.xml").write_text(JUNIT.format(""))
        elif part.program in known:
            for name, content in known[part.program].items():
                (folder / name).write_bytes(content)
        else:
            run_program(part, folder, log, seconds, arguments)
            known[part.program] = {path.name: path.read_bytes() for path in folder.iterdir()}

    def run():
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--output_dir", str(tmp_path / "gpu")])
        gpu.main()
        return tmp_path / "gpu"

    monkeypatch.setattr(gpu, "run_program", run_once)
    return run


def test_a_dry_run_has_all_rows(dry_run):
    output = dry_run()
    results = json.loads((output / "gpu.json").read_text())
    assert results["machine"]["packages"]["torch"] == torch.__version__ and results["machine"]["dry_run"]
    whats = {name: [row["what"] for row in part["rows"]] for name, part in results["parts"].items()}
    peers, ways = sorted(["frozen", *PEERS]), ["no adapter", "merged", "beside the weights"]
    titles = ("SD 1.5 512 px", "SDXL 1024 px")
    assert whats["tests"] == ["a run trains[bf16]", "no wait"]
    for title in titles:
        assert sorted(whats[f"step, {title}"]) == sorted(whats[f"compiled step, {title}"]) == peers
        assert whats[f"drawing, {title}"] == ways
    assert len([name for name in whats if name.startswith("recipe ")]) == len(RECIPES)
    assert len(whats) == 1 + 4 + 2 + 1 + len(RECIPES)
    lines = (output / "gpu.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + sum(map(len, whats.values()))
    assert "figures mean nothing" in lines[0]
    assert all(part["measured"] for name, part in results["parts"].items() if name not in ("tests", "random SDXL"))


def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch, capsys):
    def run_program(part, folder, log, seconds, arguments):
        if part.program == "pytest":
            (folder / "tests.xml").write_text(JUNIT.format(FAILURE))
        elif part.program == "drawing":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        elif part.program == "unet_step":
            sys.exit(2)
        else:
            raise runs.RunFailed("python x failed:\nTraceback\ntorch.AcceleratorError: illegal access\nmore words")

    monkeypatch.setattr(gpu, "run_program", run_program)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    results = {name: [row["result"] for row in part["rows"] if row["failed"]] for name, part in found.items()}
    assert len(results) == len(parts(tmp_path, True)) and all(results.values())
    assert results["tests"] == ["failed: assert 1 == 2"]
    assert results["drawing, SDXL 1024 px"] == ["OutOfMemoryError: CUDA out of memory. Tried"]
    assert results["step, SDXL 1024 px"] == ["it ended with exit code 2"]
    assert results["recipe sdxl-8gb.yaml"] == ["torch.AcceleratorError: illegal access"]
    assert "failed: tests; step" in capsys.readouterr().err


def test_parts_that_the_time_is_over_for_are_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_program", lambda *_: pytest.fail("it began"))
    arguments = gpu.argparse.Namespace(output_dir=tmp_path, dry_run=True, wheels=None)
    result = gpu.run_part(parts(tmp_path, True)[0], tmp_path, -1.0, arguments)
    assert "time for all parts was over" in result["rows"][0]["result"] and result["rows"][0]["failed"]


def test_the_real_parts_are_commands_that_their_programs_take(tmp_path, monkeypatch):
    """They cannot run here."""
    taken = {"unet_step": unet_step, "drawing": drawing, "recipes": recipes}
    real = [part for part in parts(tmp_path, False) if part.program in taken]
    for part in real:
        monkeypatch.setattr(sys, "argv", [part.program, *part.words, "--output_dir", str(tmp_path)])
        arguments = taken[part.program].parse()
        assert getattr(arguments, "compile", False) is part.name.startswith("compiled")
        assert "SDXL" not in part.name or arguments.architecture == "sdxl"
    assert len(real) == 4 + len(RECIPES) + 2


def test_parts_are_chosen_by_words_of_their_names(tmp_path):
    known = parts(tmp_path, True)
    assert [part.name for part in gpu.chosen(known, ["tests", "80gb"])] == ["tests", "recipe sdxl-80gb.yaml"]
    assert gpu.chosen(known, [""]) == known
    with pytest.raises(UserError, match="--parts 90gb: .*recipe sdxl-80gb.yaml"):
        gpu.chosen(known, ["90gb"])


def test_all_parts_together_have_less_than_ten_minutes():
    assert gpu.TIME < 600


def test_a_program_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with pytest.raises(runs.RunFailed, match="ended after 1 s"):
        runs.run_within(1, [sys.executable, "-c", code], tmp_path / "log")
    with pytest.raises(runs.RunFailed) as error:
        runs.run_within(60, [sys.executable, "-c", "print('before'); raise ValueError('no')"], tmp_path / "log")
    assert runs.last_error(str(error.value)) == "ValueError: no"
    runs.run_within(60, [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "log", accepted=(0, 1))


def test_rows_of_tests_say_how_each_ended(tmp_path):
    (tmp_path / "tests.xml").write_text(JUNIT.format(FAILURE))
    rows = rows_of_tests(tmp_path)
    assert [row.result for row in rows] == ["passed", "skipped: needs a CUDA device", "failed: assert 1 == 2"]
    assert [row.failed for row in rows] == [False, False, True] and rows[0].figure == "2.5 s"


def test_a_step_s_memory_is_what_it_would_need_alone(tmp_path):
    measured = {
        "milliseconds": {"frozen": [10.0, 20.0], "b": [20.0, 30.0]}, "weights_bytes": 100,
        "held_bytes": {"frozen": 1, "b": 2}, "peak_bytes": {"frozen": 10, "b": 20},
        "failed": {"Kronecker (4, 64)": "GraphBreak: x", "PEFT LoKr": "Unsupported: y"},
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps({"measurements": measured}))
    frozen, own, failed, not_ours = step_rows(tmp_path)
    assert (frozen.allocated, own.allocated) == (111, 122) and own.ratio.startswith("1.750")
    assert failed.failed and failed.result == "GraphBreak: x"
    assert not not_ours.failed and not_ours.result == "does not run: Unsupported: y"


# ---- what there is ----


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(gpu, "run_part", lambda *_: pytest.fail("a part began"))
    with pytest.raises(UserError, match="no CUDA device.*--dry_run"):
        gpu.main()


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "pins", lambda file: {"no-such-package": "1.0", "torch": "2.13.0"})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="lacks no-such-package: .*--wheels"):
        gpu.main()


def wheel(folder, name, needs=()):
    """A wheel without a module's worth of content."""
    stem, files = f"{name}-1.0", {f"{name}.py": f"name = {name!r}\n"}
    requirements = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files[f"{stem}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requirements}"
    files[f"{stem}.dist-info/WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{stem}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in files)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)


def test_missing_packages_and_what_they_need_are_installed_from_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    wheel(
        tmp_path, "kron_upper", ["kron-lower", "torch", 'kron-windows; sys_platform == "win32"', "extra; extra == 'x'"]
    )
    wheel(tmp_path, "kron_lower")
    assert packages.missing(["kron-upper"]) == ["kron-upper"]
    packages.install(["kron-upper"], tmp_path, tmp_path / "packages")
    assert packages.missing(["kron-upper"]) == []
    assert packages.versions(["kron-lower"]) == {"kron-lower": "1.0"}
    with pytest.raises(UserError, match="--wheels .*kron-nothing"):
        packages.install(["kron-nothing"], tmp_path, tmp_path / "packages")


def test_other_versions_than_the_pinned_are_named():
    pinned = {"torch": torch.__version__.partition("+")[0], "pytest": "0.1", "no-such-package": "1"}
    assert packages.differences(pinned) == {"pytest": pytest.__version__}
