"""The study: its table, and that every method can be without its adapter for a while."""

import pytest
import torch

from toyworld.study import COLUMNS, METHODS, subjects_table, table
from toyworld.tiny_pipeline import build_pipeline


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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_the_same_layers_and_can_be_switched_off(method):
    unet = build_pipeline("sd").unet
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 77, 64)
    base = unet(*inputs).sample
    adapter = METHODS[method](unet)
    assert len(adapter.parameters) == 2 * 32
    for parameter in adapter.parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.equal(unet(*inputs).sample, base)
    with adapter.without():
        assert torch.equal(unet(*inputs).sample, base)
    assert not torch.equal(unet(*inputs).sample, base)
