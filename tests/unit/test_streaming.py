"""Files larger than the memory: the bytes of safetensors' own writer, with one tensor in memory at a time."""

import hashlib
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from dreambooth.loop.optimizers import build_lr_scheduler, build_optimizer
from dreambooth.loop.state import TrainingState
from dreambooth.method import Group
from dreambooth.output.checkpoint import load_checkpoint, save_checkpoint
from kron_formats.streaming import TYPES, Pending, file_digest, pending, stream_tensors
from tests.faults.checkpoints import ALONE, make_config

MIB = 2**20


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors_own_writer(metadata, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{number}é": torch.randn(3, number, generator=generator).to(kind) for number, kind in enumerate(TYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 3), "a": torch.ones(5).half()}
    columns = torch.randn(4, 6, generator=generator).t()  # not contiguous
    tensors["columns"] = columns.contiguous()
    given = {name: pending(tensor) for name, tensor in tensors.items()} | {"columns": pending(columns)}
    digest = stream_tensors(tmp_path / "file", given, metadata)
    content = (tmp_path / "file").read_bytes()
    assert content == save(tensors, metadata or None)
    assert digest == hashlib.sha256(content).hexdigest() == file_digest(tmp_path / "file")


def test_a_tensor_of_another_shape_than_was_said_is_noticed(tmp_path):
    with pytest.raises(ValueError, match="w is .3,. instead of .4,."):
        stream_tensors(tmp_path / "file", {"w": Pending((4,), torch.float32, lambda: torch.zeros(3))}, {})


class Peak:
    """How much memory of its own the process needs inside a `with`, more than at the beginning."""

    def __enter__(self):
        self.first = self.highest = self.now()
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self):
        while not self.over.wait(0.001):
            self.highest = max(self.highest, self.now())

    def __exit__(self, *_):
        self.over.set()
        self.watch.join()

    @staticmethod
    def now():
        """Without pages of files, which the system can drop."""
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    @property
    def bytes(self):
        return self.highest - self.first


def training(output, value):
    """Eight weights of 4 MiB whose AdamW has made a step: a state of 96 MiB."""
    weights = {str(number): torch.nn.Parameter(torch.full((2**20,), value + number)) for number in range(8)}
    groups = [Group("UNet", [*weights.values()], 1e-2, 0.0, flat=False)]

    @torch.no_grad()
    def load(state):
        for name, weight in weights.items():
            weight.copy_(state["unet"][name])

    attached = SimpleNamespace(
        groups=groups,
        state=lambda: {"unet": {name: weight.detach() for name, weight in weights.items()}},
        load_state=load,
        save=lambda path, metadata, dtype: path.write_bytes(b""),
    )
    config = make_config(output)
    optimizer = build_optimizer(groups, config, 1)
    return TrainingState(attached, optimizer, build_lr_scheduler(optimizer, config, 10)), config


def step(state):
    for number, weight in enumerate(state.attached.groups[0].parameters):
        weight.grad = None if number == 7 else weight.detach().sin()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.lr_scheduler.step()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory is used")
def test_a_checkpoint_needs_no_more_memory_than_a_few_tensors(tmp_path):
    state, config = training(tmp_path, 1.0)
    step(state)
    with Peak() as saving:
        save_checkpoint(ALONE, state, "result", {"options": {}, "photos": {}}, config, step=1, stopping=False)
    assert saving.bytes < 20 * MIB

    other, _ = training(tmp_path, 5.0)
    with Peak() as loading:
        load_checkpoint(tmp_path / "checkpoint-1", other)
    assert loading.bytes < (56 + 20) * MIB  # the moments have to be somewhere: 7 x 2 x 4 MiB
    for _ in range(2):
        step(state)
        step(other)
    assert str(other.state_dict()) == str(state.state_dict())
    for one, same in zip(state.attached.groups[0].parameters, other.attached.groups[0].parameters):
        assert torch.equal(one, same)
    assert all(value.data_ptr() % 64 == 0 for value in moments(other)), "a part of a file, wherever in it it lay"


def moments(state):
    return [entry[name] for entry in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
