"""The study: its tables, and a tiny run of it."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.errors import UserError
from dreambooth.scoring.embeddings import load_evaluators
from dreambooth.train import train
from toyworld.study import COLUMNS, DRAWING, run_all, subjects_table, table


def test_the_table_gives_means_over_all_runs_and_the_spread_of_the_seeds():
    runs = [
        {"method": "LoRA r=1", "learning_rate": rate, "subject": subject, "seed": seed, "parameters": 1234}
        | dict.fromkeys(COLUMNS, score)
        for rate, subject, seed, score in (
            (0.01, "dog", 0, 0.9),
            (0.002, "dog", 0, 0.1),
            (0.002, "cat", 0, 0.3),
            (0.002, "dog", 1, 0.5),
            (0.002, "cat", 1, 0.7),
        )
    ]
    row, higher_rate = table(runs).splitlines()[2:]
    assert row.startswith("| LoRA r=1 | 1,234 | 0.002 | 0.400 ± 0.283 |")  # seeds' means are 0.2 and 0.6
    assert row.count("0.400 ± 0.283") == len(COLUMNS)
    assert higher_rate.startswith("| LoRA r=1 | 1,234 | 0.01 | 0.900 |")
    assert subjects_table(runs).splitlines() == [
        "| DINO | parameters | learning rate | dog | cat |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| LoRA r=1 | 1,234 | 0.002 | 0.300 ± 0.283 | 0.500 ± 0.283 |",
        "| LoRA r=1 | 1,234 | 0.01 | 0.900 |  |",
    ]


@pytest.fixture
def study(tiny_sd, tiny_clip, tiny_dino, tmp_path, fresh_accelerator, monkeypatch):
    """Run a tiny study of one method on one subject; return its records by the method's name."""
    monkeypatch.setitem(DRAWING, "num_inference_steps", 1)
    monkeypatch.setattr("toyworld.study.prompts", lambda subject: [f"a photo of sks {subject}"])
    evaluators = load_evaluators(str(tiny_clip), str(tiny_dino), torch.device("cpu"))

    def run(**options):
        defaults = {"family": "sd", "base": str(tiny_sd), "output_dir": tmp_path, "subjects": ["robot"], "seeds": [0]}
        defaults |= {"methods": ["LoRA r=1"], "learning_rates": [0.1], "max_train_steps": 2, "train_batch_size": 1}
        records = run_all(argparse.Namespace(**defaults | options), evaluators, tmp_path / "runs.jsonl")
        return {record["method"]: record for record in records}

    return run


def scores(record):
    return {name: record[name] for name in COLUMNS}


def test_a_run_trains_and_is_not_repeated(study, tmp_path, monkeypatch):
    records = study()
    assert scores(records["LoRA r=1"]) != scores(records["base model"])
    assert records["LoRA r=1"]["parameters"] == 3 * 1024 + 1920  # d_in + d_out of every layer
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "runs.jsonl"}
    monkeypatch.setattr("toyworld.study.train", None)
    monkeypatch.setattr("toyworld.study.draw_all", None)
    assert study() == records


def test_what_is_scored_is_the_saved_file(study, monkeypatch):
    def train_and_empty(family, method, config):
        train(family, method, config)
        path = Path(config.output_dir) / method.weights_name
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)

    monkeypatch.setattr("toyworld.study.train", train_and_empty)
    records = study()
    assert scores(records["LoRA r=1"]) == scores(records["base model"])


def test_runs_with_other_settings_are_refused(study, tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"family": "sd", "max_train_steps": 300}\n')
    with pytest.raises(UserError, match="--base .* --output_dir"):
        study()
