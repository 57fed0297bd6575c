"""README.md, docs/ and toyworld/README.md: links lead somewhere; the options, programs and files they name exist."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser

from methods.train import METHODS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "toyworld" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")])
    if 'if __name__ == "__main__":' in path.read_text() and path.parent.name != "tests"
]
FOLDERS = {path.parent.name for path in ROOT.glob("[!.]*/*.*") if path.is_file()} - {"outputs", "wandb"}
FLAG = r"(?<![\w-])--[a-z][\w-]*"
COMMAND = r"(?:python3? |accelerate launch |sbatch |scripts/\w+\.sh)"
# pytest's, see tests/conftest.py, sbatch's, Docker's and pip's
FLAGS_OF_OTHERS = {"--kills", "--array", "--dependency", "--build-arg", "--gpus", "--init", "--rm", "--no-deps"}
FILES_OF_OTHERS = {  # a run's, diffusers', and SVDiff's
    "config.yaml",
    "train_dreambooth.py",
    "train_dreambooth_lora.py",
    "train_custom_diffusion.py",
    "textual_inversion.py",
    "train_svdiff.py",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@functools.cache
def flags(program: str, *words: str) -> set[str]:
    """The flags that `program words --help` lists."""
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *words, "--help"]),
        mock.patch.object(sys, "path", [*sys.path]),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    listed = [line for line in output.getvalue().splitlines() if re.match(" +-", line)]
    assert listed, f"{program} --help lists no options"
    return set(re.findall(FLAG, "\n".join(listed)))


@functools.cache
def accelerate_flags() -> set[str]:
    return set(launch_command_parser()._option_string_actions)


@functools.cache
def sweep_flags() -> set[str]:
    """The flags that scripts/sweep.sh says it has."""
    said = subprocess.run([ROOT / "scripts" / "sweep.sh", "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(rf"^{FLAG}", said.stdout, re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The words of every command, in blocks of code and in lines."""
    blocks = re.findall(rf"^ *({COMMAND}(?:.*\\\n)*.*)", text, re.MULTILINE)
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(rf"`({COMMAND}[^`]*)`", text)]
    return [
        shlex.split(command.rstrip("` .,").replace("\\\n", " "), comments=True)
        for command in (*(block for block in blocks if "`" not in block), *inline)
    ]


def program_in(words: list[str]) -> tuple[int, str] | None:
    """The first word that names one of our Python programs: its place, and the program."""
    for place, word in enumerate(words):
        name = word.replace(".", "/") + ".py" if words[place - 1 : place] == ["-m"] else word
        if name in PROGRAMS:
            return place, name
    return None


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_readme_leads_to_every_page():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= set(links)


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_flags_exist(page):
    of_methods = (flags("methods/train.py", method, "sd") for method in METHODS)
    known = set.union(FLAGS_OF_OTHERS, sweep_flags(), accelerate_flags(), *map(flags, PROGRAMS), *of_methods)
    assert set(re.findall(FLAG, page.read_text())) <= known


@every_page
def test_a_command_s_flags_are_those_of_its_program(page):
    for words in commands(page.read_text()):
        if (found := program_in(words)) is None:
            continue
        place, program = found
        first_flag = next((at for at, word in enumerate(words) if at > place and word.startswith("--")), len(words))
        given = {word.partition("=")[0] for word in words[first_flag:] if re.match(FLAG, word)}
        assert given <= flags(program, *words[place + 1 : first_flag]), words
        if words[:2] == ["accelerate", "launch"]:
            given = {word for word in words[2:place] if word.startswith("--")}
            assert given <= accelerate_flags(), words


@every_page
def test_files_exist(page):
    text = page.read_text()
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
    files = {path.name for folder in [".", *FOLDERS] for path in (ROOT / folder).glob("*.*")}
    assert set(re.findall(r"(?<![\w./-])\w+(?:-\w+)*\.(?:py|yaml|sh)\b", text)) <= files | FILES_OF_OTHERS
