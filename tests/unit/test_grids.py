"""Grids: from YAML to the cells of a sweep and their commands."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dreambooth.errors import UserError
from dreambooth.options.parsing import parse_options
from scripts import evaluate
from studies.cells import (
    evaluate_command,
    evaluate_commands,
    is_done,
    parts_of,
    read_summary,
    run_options,
    train_command,
)
from studies.checkpoints import adapters_at, check_kept, scores_path
from studies.grid import parse_grid, read_grid
from studies.plan import check_cells, count_cells
from studies.rounds import read_rounds
from studies.sweep import main, show
from tests.conftest import ROOT
from tests.unit.test_recipes import options_of

PLAIN = {"script": "train_dreambooth_kronecker.py", "axes": {"seed": [0, 1]}}
SCORED = {"class_noun": "dog"}


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
        ({"evaluate_checkpoints": True}, "evaluate_checkpoints needs evaluate"),
        ({"evaluate": SCORED, "evaluate_checkpoints": "often"}, "evaluate_checkpoints often"),
        ({"evaluate": SCORED, "evaluate_checkpoints": [100, "last"]}, "evaluate_checkpoints .*last"),
        ({"evaluate": SCORED, "evaluate_checkpoints": []}, "evaluate_checkpoints"),
        ({"evaluate": SCORED, "evaluate_checkpoints": True, "axes": {"step": [1]}}, "axes: step"),
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


def test_the_order_of_flags_makes_no_other_command():
    then = parts_of(["python", "train.py", "lora", "--rank=1", "--kron_targets", "to_q", "to_k", "--seed=0"])
    assert then == parts_of(
        ["/usr/bin/python3", "train.py", "lora", "--seed=0", "--kron_targets", "to_q", "to_k", "--rank=1"]
    )
    for other in (
        ["python", "train.py", "lora", "--rank=1", "--kron_targets", "to_k", "to_q", "--seed=0"],
        ["python", "train.py", "--rank=1", "--kron_targets", "to_q", "to_k", "--seed=0"],
        ["python", "train.py", "lora", "--rank=1", "--kron_targets", "to_q", "--seed=0", "to_k"],
    ):
        assert parts_of(other) != then


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
        f"--adapter {tmp_path}/seed=0/result.safetensors",
        "--prompt '{} here' '{} there'",
        f"--base_images_cache={tmp_path}/shared",
        f"--output_dir {tmp_path}/seed=0/evaluation",
    ):
        assert flags in text
    assert "--seed" not in text


# ---- checkpoints ----


@pytest.mark.parametrize(
    "value, read", [(True, True), (False, False), (None, False), ([200, 100], (100, 200)), (["{seed}"], (0,))]
)
def test_a_grid_says_which_checkpoints_are_evaluated(value, read, cells_of):
    assert cells_of(evaluate=SCORED, evaluate_checkpoints=value)[0].checkpoints == read


def test_an_entry_may_say_it_for_its_cells(cells_of):
    cells = cells_of(evaluate=SCORED, axes={"seed": {"0": {}, "1": {"seed": 1, "evaluate_checkpoints": True}}})
    assert [cell.checkpoints for cell in cells] == [False, True] and "evaluate_checkpoints" not in cells[1].options


@pytest.mark.parametrize(
    "checkpoints, options, named",
    [
        (True, {"checkpoints_total_limit": 2}, "checkpoints_total_limit 2"),
        (True, {"checkpointing_steps": 100, "max_train_steps": 100}, "checkpointing_steps 100"),
        (True, {"max_train_steps": 500}, "checkpointing_steps 500"),  # the default
        ([50], {"checkpointing_steps": 100}, "evaluate_checkpoints 50"),
        ([0], {"checkpointing_steps": 100}, "evaluate_checkpoints 0"),
        ([100, 400], {"checkpointing_steps": 100, "max_train_steps": 300}, "evaluate_checkpoints 400"),
    ],
)
def test_checkpoints_that_would_not_be_there_are_refused_before_any_training(checkpoints, options, named, cells_of):
    (cell, _) = cells_of(evaluate=SCORED, evaluate_checkpoints=checkpoints, options=options)
    with pytest.raises(UserError, match=named):
        check_kept(cell, run_options(cell))


@pytest.mark.parametrize(
    "checkpoints, options",
    [
        (False, {"checkpoints_total_limit": 2}),
        (True, {"checkpoints_total_limit": None, "checkpointing_steps": 100, "max_train_steps": 101}),
        ([100, 300], {"checkpointing_steps": 100, "max_train_steps": 300}),  # the last one is the result
        (True, {"num_train_epochs": 3}),  # how many steps that is, the training says
        (True, {"checkpointing_steps": "often"}),
    ],
)
def test_what_keeps_its_checkpoints_is_not_refused(checkpoints, options, cells_of):
    (cell, _) = cells_of(evaluate=SCORED, evaluate_checkpoints=checkpoints, options=options)
    check_kept(cell, run_options(cell))


@pytest.fixture
def trained(tmp_path):
    """The folder of a cell that has trained 350 steps, with a checkpoint every 100."""
    folder = tmp_path / "seed=0"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"checkpointing_steps": 100}))
    (folder / "summary.json").write_text('{"result": "x.safetensors", "steps": 350}')
    return folder


def score(folder, *steps):
    """Write the scores of checkpoints, and of the result for None."""
    for step in steps:
        path = folder / scores_path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def scored_by(commands, folder):
    """What commands score, and where their scores go, both in the folder of a run."""
    return [
        (Path(command[command.index("--adapter") + 1]).relative_to(folder).as_posix(), command[-1].partition("=0/")[2])
        for command in commands
    ]


def test_every_checkpoint_is_scored_once_and_the_result_last(trained, cells_of, tmp_path):
    (cell, _) = cells_of(evaluate=SCORED, evaluate_checkpoints=True)
    for step in (100, 137, 200, 300):  # one is of an interruption
        (trained / f"checkpoint-{step}").mkdir()
        (trained / f"checkpoint-{step}" / "x.safetensors").touch()
    (trained / "x.safetensors").touch()
    summary = read_summary(trained)
    assert scored_by(evaluate_commands(cell, tmp_path, summary), trained) == [
        ("checkpoint-100/x.safetensors", "evaluation/checkpoint-100"),
        ("checkpoint-200/x.safetensors", "evaluation/checkpoint-200"),
        ("checkpoint-300/x.safetensors", "evaluation/checkpoint-300"),
        ("x.safetensors", "evaluation"),
    ]
    score(trained, 100, 300, None)
    assert not is_done(cell, tmp_path) and is_done(replace(cell, checkpoints=(100, 300)), tmp_path)
    ((path, _),) = scored_by(evaluate_commands(cell, tmp_path, summary), trained)
    assert path == "checkpoint-200/x.safetensors"
    score(trained, 200)
    assert is_done(cell, tmp_path) and not evaluate_commands(cell, tmp_path, summary)


def test_a_cell_that_is_not_trained_is_not_done(cells_of, tmp_path):
    (cell, _) = cells_of(evaluate=SCORED, evaluate_checkpoints=True)
    assert not is_done(cell, tmp_path)


@pytest.mark.parametrize("checkpoints, named", [(True, "checkpointing_steps 400"), ([800], "evaluate_checkpoints 800")])
def test_a_run_that_was_shorter_than_its_checkpoints_is_a_failure(checkpoints, named, trained, cells_of, tmp_path):
    (trained / "config.yaml").write_text("checkpointing_steps: 400\n")
    (cell, _) = cells_of(evaluate=SCORED, evaluate_checkpoints=checkpoints, options={"num_train_epochs": 9})
    with pytest.raises(UserError, match=named):
        evaluate_commands(cell, tmp_path, read_summary(trained))


def test_a_checkpoint_of_a_whole_model_is_drawn_with_the_components_that_trained(tmp_path):
    for component in ("text_encoder", "unet"):
        (tmp_path / "checkpoint-5" / component).mkdir(parents=True)
        (tmp_path / "checkpoint-5" / component / "config.json").touch()
    (tmp_path / "pipeline").mkdir()
    assert adapters_at(tmp_path, None, "pipeline") == [str(tmp_path / "pipeline")]
    parts = [str(tmp_path / "checkpoint-5" / component) for component in ("text_encoder", "unet")]
    assert adapters_at(tmp_path, 5, "pipeline") == parts


# ---- what is refused before anything runs, and what will train ----

TOY = {
    "pretrained_model_name_or_path": "toyworld/models/sd",
    "instance_data_dir": "nowhere/dog",
    "instance_prompt": "a photo of sks dog",
    "kron_a1": 2,
    "kron_a2": 32,
}
SDXL_ON_THE_HUB = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def at_root(monkeypatch):
    """Where commands run, without a network."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "entries, named",
    [
        ({"axes": {"seed": [0, 1], "kron_a3": [2]}}, "seed=0,kron_a3=2 and 1 other cell: --kron_a3"),
        ({"axes": {"seed": [0, "x"]}}, "^seed=x: --seed.*'x'"),
        ({"axes": {"learning_rate": [0.1, -1]}}, "^learning_rate=-1: --learning_rate"),
        ({"axes": {"score_checkpoints": ["true"]}}, "^score_checkpoints=true: --score_checkpoints .*--holdout"),
        ({"script": "methods/train.py lara sd"}, "^seed=0 and 1 other cell: METHOD is lara"),
        ({"script": "methods/train.py lora sd"}, "--kron_a1"),
        ({"script": "train_dreamboth_kronecker.py"}, "train_dreamboth_kronecker.py does not exist"),
        ({"evaluate": {"class_noun": "dog", "prompt": ["{}"], "num_imagse": 4}}, "evaluate: --num_imagse"),
        ({"evaluate": {"class_noun": "dog"}}, "evaluate: .*--prompt"),
        ({"evaluate": {"class_noun": "dog", "prompt": ["{}"], "num_images": -1}}, "evaluate: --num_images"),
        ({"evaluate": {"class_noun": "dog", "prompts": "configs/prompts/dgo.txt"}}, "evaluate: --prompts .*dgo.txt"),
        ({"evaluate": {"class_noun": "dog", "prompt": ["a dog"]}}, "evaluate: .*a dog"),
    ],
)
def test_what_a_script_would_refuse_is_refused_with_the_names_of_its_cells(cells_of, tmp_path, at_root, entries, named):
    with pytest.raises(UserError, match=named):
        check_cells(cells_of(**{"options": TOY, **entries}), tmp_path)


def test_cells_that_only_the_second_round_may_have_are_checked_before_the_first(tmp_path, monkeypatch, at_root):
    grid = {
        "script": "train_dreambooth_kronecker.py",
        "options": TOY,
        "evaluate": {"class_noun": "dog", "prompt": ["a photo of {}"]},
        "axes": {"learning_rate": [0.01], "seed": [0]},
        "best": {"axis": "learning_rate", "score": "dino", "axes": {"seed": {"1": {"seed": 1, "kron_a1": -1}}}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(path), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    with pytest.raises(UserError, match="^learning_rate=0.01,seed=1: --kron_a1"):
        main()


@pytest.mark.parametrize(
    "script", ["tests/faults/sweep_stand_in.py", "-m toyworld.subjects", str(ROOT / "kron_adapter.py")]
)
def test_other_scripts_are_left_to_themselves(cells_of, tmp_path, at_root, script):
    cells = cells_of(script=script, options={"anything": 1}, evaluate={"anything": 1})
    assert check_cells(cells, tmp_path) == [None, None]
    assert all("script" in why for why in count_cells(cells, tmp_path).values())


def test_the_same_script_under_another_path_is_checked_too(cells_of, tmp_path, at_root):
    for script in ("./train_dreambooth_kronecker.py", str(ROOT / "methods" / ".." / "train_dreambooth_kronecker.py")):
        with pytest.raises(UserError, match="--kron_a3"):
            check_cells(cells_of(script=script, options={**TOY, "kron_a3": 1}), tmp_path)


def test_a_plan_says_what_each_cell_trains(cells_of, tmp_path, at_root, capsys):
    lora = {"script": "methods/train.py lora sd", "kron_a1": None, "kron_a2": None, "rank": 1}
    xl = {"pretrained_model_name_or_path": SDXL_ON_THE_HUB, "kron_a1": 4, "kron_a2": 64}
    methods = {
        "kronecker": {},
        "targets": {"kron_targets": ["to_q"]},
        "text": {"train_text_encoder": "true"},
        "lora": lora,
        "sdxl": {"script": "train_dreambooth_kronecker_sdxl.py", **xl},
        "unknown": {"pretrained_model_name_or_path": "someone/else"},
        "later": {"pretrained_model_name_or_path": "outputs/not/made/yet"},
    }
    cells = cells_of(options=TOY, axes={"method": methods, "learning_rate": [0.1, 0.2]})
    counts = count_cells(cells, tmp_path)
    assert [*counts.values()][:10:2] == [13_696, 3_328, 16_256, 11_648, 3_874_560]
    assert all(
        counts[f"method={name},learning_rate=0.1"] == counts[f"method={name},learning_rate=0.2"] for name in methods
    )
    assert "someone/else" in counts["method=unknown,learning_rate=0.1"]
    assert "outputs/not/made/yet" in counts["method=later,learning_rate=0.1"]
    show(cells[:1] + cells[-1:], tmp_path)
    told = capsys.readouterr().out
    assert "method=kronecker,learning_rate=0.1  13,696 parameters\n" in told
    assert "method=later,learning_rate=0.2  ? parameters (" in told and told.endswith("2 cells, 0 done\n")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"kron_a2": 48}, "^seed=0 and 1 other cell: .*48"),
        ({"kron_targets": ["to_w"]}, "to_w"),
        ({"pretrained_model_name_or_path": SDXL_ON_THE_HUB}, f"--pretrained_model_name_or_path {SDXL_ON_THE_HUB}"),
        ({"pretrained_model_name_or_path": "toyworld/photos"}, "--pretrained_model_name_or_path toyworld/photos"),
        ({"pretrained_model_name_or_path": "toyworld/models/sdxl"}, "--pretrained_model_name_or_path toyworld/models"),
    ],
)
def test_what_does_not_fit_its_base_model_is_refused(cells_of, tmp_path, at_root, options, named):
    with pytest.raises(UserError, match=named):
        count_cells(cells_of(options={**TOY, **options}), tmp_path)


def test_what_a_method_refuses_is_refused(cells_of, tmp_path, at_root):
    options = {**TOY, "kron_a1": None, "kron_a2": None, "base_precision": "bf16"}
    with pytest.raises(UserError, match="^seed=0 and 1 other cell: --base_precision bf16"):
        count_cells(cells_of(script="methods/train.py dreambooth sd", options=options), tmp_path)


def test_trainings_are_checked_without_torch(tmp_path):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**PLAIN, "options": TOY}))
    code = (
        "import sys; from pathlib import Path; from studies import sweep, plan, grid;"
        f"plan.check_cells(grid.read_grid({str(tmp_path / 'grid.yaml')!r}), Path('x')); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "studies.training" in result.stdout.split() and "torch" not in result.stdout.split()


# ---- the grids that are here ----

NOT_GRIDS = ("toyworld.yaml", "sdxl.yaml", "wandb.yaml", "search.yaml")  # what runs share, and searches
GRIDS = [path for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml")) if path.name not in NOT_GRIDS]
FULL = {"instance_data_dir": "photos", "pretrained_model_name_or_path": "base"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_begins_with_its_command_and_says_how_many_runs_it_has(path):
    text, (cells, more) = path.read_text(), cells_of_both_rounds(path)
    name = path.relative_to(ROOT).as_posix()
    assert text.startswith(f"# scripts/sweep.sh {name} --output_dir outputs/sweeps/{path.stem}\n")
    assert f"\n# {len(cells)} runs{f', then {more} more' if more else ''}" in text
    if path.stem.endswith("-sdxl"):
        hours = re.search(r"([\d.]+) hours", text)[1]
        studies = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
        assert re.search(rf"^\| `{name}` \|.*\| {len(cells) + more} \| {hours} \|$", studies, re.M)


def cells_of_both_rounds(path):
    """The cells of a grid's first round, and how many the second adds, whatever is chosen."""
    grid = parse_grid(str(path))
    if (found := read_rounds(grid)) is None:
        return grid.cells(), 0
    rounds, _ = found
    added = [{len({*names} - rounds.first) for names in setting.then.values()} for setting in rounds.settings]
    assert all(len(each) == 1 for each in added)
    return grid.cells(), sum(each.pop() for each in added)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_scripts_know_the_options_of_a_grid_s_cells(path, tmp_path):
    seen = set()
    grid = parse_grid(str(path))
    rounds = read_rounds(grid)
    for cell in rounds[1].values() if rounds else grid.cells():
        command = train_command(cell, tmp_path)
        script, *arguments = command[1:]
        kind = (script, *(word.partition("=")[0] for word in arguments if word.startswith("--")))
        if kind in seen:
            continue
        seen.add(kind)
        check_kept(cell, run_options(cell))
        config_class, flags = options_of(script, arguments)
        config = parse_options(config_class, None, flags)
        assert config.output_dir == str(tmp_path / cell.name)
        folder = tmp_path / cell.name
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(FULL))
        parse_options(evaluate.Config, None, evaluate_command(cell, tmp_path, "result")[2:])


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_cells_of_a_grid_are_accepted(path, tmp_path, at_root):
    check_cells(read_grid(str(path)), tmp_path)


@pytest.mark.parametrize("name", ["methods", "methods-sdxl"])
def test_every_method_of_a_grid_can_be_counted(name, tmp_path, at_root):
    counts = count_cells(read_grid(str(ROOT / "configs" / "sweeps" / f"{name}.yaml")), tmp_path)
    assert all(isinstance(count, int) for count in counts.values()) and len({*counts.values()}) >= 4


def test_there_is_a_grid_for_each_question_twice():
    questions = {"factors", "steps", "learning_rate", "modules", "photos", "one_shot", "adapters"}
    questions |= {"methods", "methods_original"}
    assert {path.stem for path in GRIDS} == questions | {f"{question}-sdxl" for question in questions}
