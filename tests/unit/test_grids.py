"""Grids: from YAML to the cells of a sweep and their commands."""

import shlex
import sys

import pytest
import yaml

from dreambooth.errors import UserError
from dreambooth.options.parsing import parse_options
from scripts import evaluate
from studies.cells import evaluate_command, train_command
from studies.grid import read_grid
from tests.conftest import ROOT
from tests.unit.test_recipes import options_of

PLAIN = {"script": "train_dreambooth_kronecker.py", "axes": {"seed": [0, 1]}}


@pytest.fixture
def cells_of(tmp_path):
    def read(**entries):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**PLAIN, **entries}, sort_keys=False))
        return read_grid(str(path))

    return read


def test_a_cell_is_a_combination_of_entries_the_last_axis_fastest(cells_of):
    cells = cells_of(
        options={"max_train_steps": 300},
        axes={"shape": [{"kron_a1": 2, "kron_a2": 32}, {"kron_a1": 8, "kron_a2": 8}], "learning_rate": ["5e-3", 0.01]},
    )
    assert [cell.name for cell in cells] == [
        "shape=2-32,learning_rate=5e-3",
        "shape=2-32,learning_rate=0.01",
        "shape=8-8,learning_rate=5e-3",
        "shape=8-8,learning_rate=0.01",
    ]
    assert cells[1].options == {"max_train_steps": "300", "kron_a1": "2", "kron_a2": "32", "learning_rate": "0.01"}
    assert cells[1].labels == {"shape": "2-32", "learning_rate": "0.01"}


def test_entries_may_have_names_scripts_and_evaluations_and_the_later_axis_counts(cells_of):
    method, subject = (
        {"LoRA r=1": {"script": "methods/train.py lora sd", "rank": 1}},
        {"instance_data_dir": "photos/cat"},
    )
    (cell,) = cells_of(
        config="a.yaml",
        evaluate={"class_noun": "dog", "num_images": 4},
        options={"rank": 2, "instance_data_dir": "photos/dog"},
        axes={"method": method, "subject": {"cat": {**subject, "evaluate": {"class_noun": "cat"}}}},
    )
    assert cell.name == "method=LoRA-r-1,subject=cat"
    assert cell.script == ("methods/train.py", "lora", "sd")
    assert cell.options == {"config": "a.yaml", "rank": "1", "instance_data_dir": "photos/cat"}
    assert cell.evaluate == {"class_noun": "cat", "num_images": "4"}


def test_values_may_name_the_entries_of_other_axes(cells_of):
    cells = cells_of(
        options={"instance_prompt": "a photo of sks {subject}", "kron_targets": ["{seed}", "to_q"]},
        evaluate={"prompts": "{subject}.txt", "prompt": ["{} here"]},
        axes={"subject": {"dog": {}, "cat": {}}, "seed": [3]},
    )
    assert [cell.options["instance_prompt"] for cell in cells] == ["a photo of sks dog", "a photo of sks cat"]
    assert cells[0].options["kron_targets"] == ["3", "to_q"]
    assert cells[1].evaluate == {"prompts": "cat.txt", "prompt": ["{} here"]}


@pytest.mark.parametrize(
    "entries, named",
    [
        ({"axis": {}}, "axis"),
        ({"axes": None}, "axes"),
        ({"axes": {"seed": 3}}, "seed"),
        ({"axes": {"seed": []}}, "seed"),
        ({"axes": {"subject": {"dog": "photos"}}}, "subject: dog"),
        ({"axes": {"seed": [1, "1"]}}, "seed=1"),
        ({"script": None}, "script"),
        ({"options": {"output_dir": "x"}}, "output_dir"),
        ({"options": {"resume_from_checkpoint": "latest"}}, "resume_from_checkpoint"),
        ({"options": {"kron_targets": ["--rank"]}}, "--rank"),
        ({"axes": {"note": {"n" * 300: {}}}}, "too long"),
    ],
)
def test_what_is_not_a_grid_is_refused_by_name(cells_of, entries, named):
    with pytest.raises(UserError, match=named):
        cells_of(**entries)


def test_a_name_stays_one_folder(cells_of):
    (cell,) = cells_of(axes={"instance_data_dir": ["../../photos/a dog"]})
    assert "/" not in cell.name and " " not in cell.name and cell.options["instance_data_dir"] == "../../photos/a dog"


def test_a_cell_s_command_shares_what_can_be_shared(cells_of, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("class_data_dir: class/dog\nreport_to: [wandb]\n")
    (cell, _) = cells_of(options={"config": str(config), "kron_targets": ["to_q", "to_k"]})
    command = train_command(cell, tmp_path / "rates")
    assert command[:2] == [sys.executable, "train_dreambooth_kronecker.py"]
    assert command[-4:] == ["--output_dir", str(tmp_path / "rates" / "seed=0"), "--resume_from_checkpoint", "latest"]
    text = shlex.join(command)
    for flags in (
        f"--cache_latents_to_disk={tmp_path}/rates/shared",
        "--prior_seed=0",
        "--tracker_run_name=seed=0",
        "--tracker_group=rates",
        "--kron_targets to_q to_k",
        "--seed=0",
        "--class_data_dir=class/dog",
    ):
        assert flags in text


def test_null_in_a_grid_undoes_what_its_config_says(cells_of, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("validation_prompt: [a dog]\nresolution: 64\n")
    (cell, _) = cells_of(config=str(config), options={"validation_prompt": None})
    text = shlex.join(train_command(cell, tmp_path))
    assert "--resolution=64" in text and "validation_prompt" not in text


def test_a_number_below_0_keeps_its_sign(cells_of):
    (cell,) = cells_of(axes={"lr_power": [-0.5]})
    assert cell.name == "lr_power=-0.5"


def test_what_a_cell_says_itself_is_not_replaced(cells_of, tmp_path):
    (cell, _) = cells_of(options={"cache_latents": "off", "report_to": "none", "class_data_dir": "c", "prior_seed": 5})
    text = shlex.join(train_command(cell, tmp_path))
    assert "cache_latents_to_disk" not in text and "tracker" not in text and text.count("prior_seed") == 1


def test_a_cell_on_several_gpus_is_launched_by_accelerate(cells_of, tmp_path):
    command = train_command(cells_of()[0], tmp_path, processes=2)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--num_processes") + 1] == "2"


def test_an_evaluation_has_the_base_model_and_the_photos_of_its_training(cells_of, tmp_path):
    (cell, _) = cells_of(evaluate={"class_noun": "dog", "prompt": ["{} here", "{} there"]})
    (tmp_path / "seed=0").mkdir()
    trained = {"pretrained_model_name_or_path": "base", "variant": "fp16", "instance_data_dir": "photos", "seed": 0}
    (tmp_path / "seed=0" / "config.yaml").write_text(yaml.safe_dump(trained))
    text = shlex.join(evaluate_command(cell, tmp_path, "result.safetensors"))
    for flags in (
        "--pretrained_model_name_or_path=base --variant=fp16 --instance_data_dir=photos",
        f"--adapter={tmp_path}/seed=0/result.safetensors",
        "--prompt '{} here' '{} there'",
        f"--base_images_cache={tmp_path}/shared",
        f"--output_dir {tmp_path}/seed=0/evaluation",
    ):
        assert flags in text
    assert "--seed" not in text


# ---- the grids that are here ----

SHARED = ("toyworld.yaml", "sdxl.yaml")  # what their runs have in common
GRIDS = [path for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml")) if path.name not in SHARED]
FULL = {"instance_data_dir": "photos", "pretrained_model_name_or_path": "base"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_begins_with_its_command_and_says_how_many_runs_it_has(path):
    text, cells = path.read_text(), read_grid(str(path))
    name = path.relative_to(ROOT).as_posix()
    assert text.startswith(f"# scripts/sweep.sh {name} --output_dir outputs/sweeps/{path.stem}\n")
    assert f"\n# {len(cells)} runs" in text


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_scripts_know_the_options_of_a_grid_s_cells(path, tmp_path):
    seen = set()
    for cell in read_grid(str(path)):
        command = train_command(cell, tmp_path)
        script, *arguments = command[1:]
        kind = (script, *(word.partition("=")[0] for word in arguments if word.startswith("--")))
        if kind in seen:
            continue
        seen.add(kind)
        config_class, flags = options_of(script, arguments)
        config = parse_options(config_class, None, flags)
        assert config.output_dir == str(tmp_path / cell.name)
        folder = tmp_path / cell.name
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(FULL))
        parse_options(evaluate.Config, None, evaluate_command(cell, tmp_path, "result")[2:])


def test_there_is_a_grid_for_each_question_twice():
    questions = {"factors", "steps", "learning_rate", "modules", "photos", "methods", "one_shot"}
    assert {path.stem for path in GRIDS} == questions | {f"{question}-sdxl" for question in questions}
