"""Running out of memory ends in one message with the options that would need less."""

from types import SimpleNamespace

import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.memory import explain_out_of_memory
from tests.faults import child
from tests.faults.checkpoints import make_config


def accelerator(device: str, mixed_precision: str = "no"):
    return SimpleNamespace(device=torch.device(device), mixed_precision=mixed_precision)


def test_a_run_that_needs_more_than_there_is_says_what_needs_less(start_run):
    run = start_run(max_train_steps=2, checkpointing_steps=1)
    code, said = run.run()
    assert code == 0
    greedy = start_run("greedy", resolution=2048, train_batch_size=2)
    code, said = greedy.run(child.limit_memory, 2**30)
    assert code == 2 and "Traceback" not in said
    assert "error: out of memory on cpu: " in said and "allocate" in said
    remedies = [line.strip() for line in said.partition("try in this order:")[2].splitlines() if line]
    assert remedies[:3] == [
        "--gradient_checkpointing", "--train_batch_size 1 --gradient_accumulation_steps 2", "--mixed_precision bf16",
    ]  # fmt: skip
    assert "a --resolution below 2048" in remedies and "--base_precision nf4" not in remedies


def test_only_options_that_are_not_set_already_are_named(tmp_path):
    config = make_config(
        tmp_path, gradient_checkpointing=True, base_precision="nf4", use_8bit_adam=True, cache_latents="on",
        train_text_encoder=True,
    )  # fmt: skip
    with pytest.raises(UserError) as caught, explain_out_of_memory(config, accelerator("cuda", "bf16")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")
    assert str(caught.value).splitlines() == [
        "out of memory on cuda: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "To use less memory, try in this order:",
        "    without --train_text_encoder",
        "    a --resolution below 512",
    ]


def test_a_method_without_options_for_text_encoders_is_told_too():
    config = TrainingConfig(pretrained_model_name_or_path="base", instance_prompt="sks", train_batch_size=2)
    with pytest.raises(UserError, match="out of memory on cpu") as caught:
        with explain_out_of_memory(config, accelerator("cpu")):
            raise MemoryError
    assert "--train_batch_size 1" in str(caught.value) and "--train_text_encoder" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory(make_config(tmp_path), accelerator("cpu")):
        raise error
