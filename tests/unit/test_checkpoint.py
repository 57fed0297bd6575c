"""Checkpoints on disk: nested state in safetensors and JSON, their order, which are kept, what follows a failure."""

import os
from types import SimpleNamespace

import pytest
import torch

from dreambooth.errors import SaveError, UserError
from dreambooth.layout import list_checkpoints
from dreambooth.loop.optimizers import build_optimizer
from dreambooth.method import Group
from dreambooth.output.checkpoint import _split, check_room, read_state, write_state
from tests.faults.checkpoints import Training, content, make_config


def test_an_optimizer_s_state_goes_through_json_and_tensors_unchanged(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    write_state(tmp_path, {"optimizer": optimizer.state_dict(), "step": 3, "none": None})
    state = read_state(tmp_path)
    other = torch.optim.AdamW([torch.nn.Parameter(parameter.detach().clone())], lr=7)
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1 and (state["step"], state["none"]) == (3, None)
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(other.state[other.param_groups[0]["params"][0]][name], value)


def test_checkpoints_are_ordered_by_step_and_others_do_not_count(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-9", "checkpoint-200", "checkpoint-3000.tmp", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-200", "checkpoint-1000"]


def test_the_limit_counts_back_from_the_one_that_was_just_saved(tmp_path):
    """After resuming from an earlier one, the later ones are neither counted nor touched."""
    training = Training(tmp_path, checkpoints_total_limit=2)
    for name in ("checkpoint-8", "checkpoint-9", "checkpoint-3.tmp"):
        (tmp_path / name).mkdir()
    for step in (1, 2, 3, 4):
        training.save(step)
    assert [path.name for path in list_checkpoints(tmp_path)][:2] == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (3, 4, 8, 9)]


def test_nothing_is_removed_before_the_new_one_is_flushed_and_has_its_name(tmp_path, monkeypatch):
    training = Training(tmp_path, checkpoints_total_limit=1)
    training.save(1)
    seen = []
    monkeypatch.setattr(
        "dreambooth.output.checkpoint.flush", lambda path: seen.append((os.path.basename(path), _there()))
    )

    def _there():
        return sorted(path.name for path in list_checkpoints(tmp_path))

    training.save(2)
    names = [name for name, _ in seen]
    files = sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir() if path.name != "manifest.json")
    assert names == [*files, "manifest.json", "checkpoint-2.tmp", tmp_path.name]
    assert [there for _, there in seen] == [["checkpoint-1"]] * (len(seen) - 1) + [["checkpoint-1", "checkpoint-2"]]
    assert _there() == ["checkpoint-2"]


@pytest.mark.parametrize(
    "options, checkpoints",
    [
        ({}, 4 + 8 + 4),
        ({"use_8bit_adam": True}, 4 + 2 + 4),
        ({"save_precision": "fp16"}, 4 + 8 + 2),
        ({"optimizer": "Adafactor"}, 4 + 0 + 4),
        ({"checkpoints_total_limit": 1}, 2 * (4 + 8 + 4)),
        ({"checkpoints_total_limit": 5}, 3 * (4 + 8 + 4)),  # no more are written
    ],
)
def test_the_room_that_is_needed_is_that_of_the_checkpoints_that_are_there_at_once(
    options, checkpoints, tmp_path, monkeypatch
):
    """In bytes for each trained number: weights, moments and the result so far; besides, the result."""
    training = Training(tmp_path, **options, checkpointing_steps=2)
    numbers = sum(factor.numel() for factor in training.factors)
    needed = numbers * (checkpoints + (2 if "save_precision" in options else 4))

    def have(free):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))

    have(needed)
    check_room(training.training, 6, training.config)
    have(needed - 1)
    with pytest.raises(SaveError, match="--output_dir .* free"):
        check_room(training.training, 6, training.config)


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("policy, stopping", [("stop", False), ("continue", True), ("continue", False)])
def test_a_save_that_fails_leaves_all_as_it_was(policy, stopping, tmp_path, monkeypatch, caplog):
    training = Training(tmp_path, on_save_error=policy)
    before = content(training.save(1))
    monkeypatch.setattr("dreambooth.output.checkpoint.save_config", fail)
    words = (
        r"checkpoint-2 could not be saved: \[Errno 28\] No space left on device; .* MiB are free in .*; checkpoint-1"
    )
    if policy == "stop" or stopping:  # a run that ends here must not say that it saved
        with pytest.raises(SaveError, match=words):
            training.save(2, stopping)
    else:
        training.save(2, stopping)
        assert "No space left on device" in caplog.text and "--on_save_error continue" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert content(tmp_path / "checkpoint-1") == before


def test_a_checkpoint_can_be_written_again(tmp_path):
    training = Training(tmp_path)
    before = content(training.save(1))
    assert content(training.save(1)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_options_of_now_win_over_those_of_the_checkpoint(tmp_path):
    """`--allow_config_change` has to have an effect on what optimizer and schedule remember."""
    before = Training(tmp_path / "a", lr_scheduler="cosine", learning_rate=1.0, adam_beta1=0.5)
    for _ in range(3):
        before.step()
    after = Training(tmp_path / "b", lr_scheduler="cosine", learning_rate=3.0, adam_beta1=0.7)
    assert after.load(before.save(3)) == 3
    (then,), (now,) = before.optimizer.param_groups, after.optimizer.param_groups
    assert now["lr"] == pytest.approx(3 * then["lr"]) and now["betas"][0] == 0.7
    before.lr_scheduler.step()
    after.lr_scheduler.step()
    assert now["lr"] == pytest.approx(3 * then["lr"])


def test_a_checkpoint_of_other_factors_is_refused_where_they_do_not_fit(tmp_path):
    path = Training(tmp_path / "a").save(1)
    with pytest.raises(UserError, match="checkpoint-1 cannot be resumed here: "):
        Training(tmp_path / "b", kron_factors=["to_q=1,1"]).load(path)


def test_the_state_of_an_8_bit_optimizer_whose_tables_are_shared_is_kept(tmp_path):
    """From 4,096 numbers on bitsandbytes quantises, and all parameters' states hold the same two tables."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    group = Group("UNet", parameters, learning_rate=1e-2, weight_decay=0.0)
    optimizer = build_optimizer([group], make_config(tmp_path, use_8bit_adam=True), 1)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    tensors, _ = _split(optimizer.state_dict())
    assert len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors)
    write_state(tmp_path, optimizer.state_dict())
    kept, _ = _split(read_state(tmp_path))
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
