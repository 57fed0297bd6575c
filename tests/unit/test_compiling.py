"""Compiled blocks: in as many versions as a base model needs."""

import pytest
import torch
from torch import nn

from dreambooth.base_model.loading import compile_blocks


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight


class Denoiser(nn.ModuleList):
    def compile_repeated_blocks(self, **options):
        for block in self:
            block.compile(backend="eager", **options)


@pytest.fixture
def limit():
    found = torch._dynamo.config.recompile_limit
    yield found
    torch._dynamo.config.recompile_limit = found
    torch._dynamo.reset()


def test_a_block_may_have_more_versions_than_pytorch_allows_by_default(limit):
    """SD 1.5's have four widths, each in training, in the base model's prediction and in samples."""
    denoiser = Denoiser(Block(width) for width in range(2, limit + 4))
    compile_blocks(denoiser)
    assert [len(block(torch.ones(len(block.weight)))) for block in denoiser] == [*range(2, limit + 4)]
