"""A small model in training, and its checkpoints, without a run around them."""

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel

from dreambooth.families.sd import SD
from dreambooth.kronecker import KRONECKER
from dreambooth.layout import checkpoint_path
from dreambooth.loop.optimizers import build_lr_scheduler, build_optimizer
from dreambooth.loop.state import TrainingState
from dreambooth.method import Host
from dreambooth.output.checkpoint import load_checkpoint, save_checkpoint
from dreambooth.output.identity import identify_run
from train_dreambooth_kronecker import Config

ALONE = SimpleNamespace(num_processes=1, is_main_process=True, mixed_precision="no")


def make_config(output: Path, **options) -> Config:
    return Config(
        pretrained_model_name_or_path="base",
        instance_data_dir="photos",
        instance_prompt="sks",
        output_dir=str(output),
        kron_a1=2,
        kron_a2=2,
        **options,
    )


class Training:
    """One attention block that trains towards nothing in particular, the same way every time."""

    def __init__(self, output: Path, **options):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(4,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=2,
            cross_attention_dim=4,
        )
        self.config = make_config(output, **options)
        self.attached = KRONECKER.attach(Host(SD, {"unet": unet}, {}), self.config)
        (group,) = self.attached.groups
        self.factors = group.parameters
        self.optimizer = build_optimizer(self.attached.groups, self.config, num_ranks=1)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, self.config, total_steps=10)
        self.training = TrainingState(self.attached, self.optimizer, self.lr_scheduler)
        self.run = identify_run(KRONECKER, None, [], [], self.config, ALONE)
        output.mkdir(exist_ok=True)

    def step(self) -> None:
        for number, factor in enumerate(self.factors):
            factor.grad.copy_(factor.detach() + number)
        self.optimizer.step()
        self.lr_scheduler.step()

    def save(self, step: int, stopping: bool = False) -> Path:
        name = KRONECKER.weights_name
        save_checkpoint(ALONE, self.training, name, self.run, self.config, step=step, stopping=stopping)
        return checkpoint_path(Path(self.config.output_dir), step)

    def load(self, path: Path) -> int:
        return load_checkpoint(path, self.training)

    def state(self) -> list:
        return [self.optimizer.state_dict(), self.lr_scheduler.state_dict(), [f.detach() for f in self.factors]]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
