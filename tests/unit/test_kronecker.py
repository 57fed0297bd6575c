"""The method Kronecker: the factors that training begins with are a function of the seed."""

import pytest
import torch

from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Host
from kron_adapter import kronecker_state_dict
from tests.faults.checkpoints import make_config
from toyworld.tiny_pipeline import build_pipeline


def first_factors(config, drawn_before: int) -> dict[str, torch.Tensor]:
    pipeline = build_pipeline("sdxl")
    torch.manual_seed(drawn_before)
    state = torch.get_rng_state()
    models = SDXL.trained_models(pipeline.components, with_text=KRONECKER.trains_text(config))
    assert list(models) == ["unet", "text_encoder", "text_encoder_2"]
    KRONECKER.attach(Host(SDXL, models, {}), config)
    assert torch.equal(torch.get_rng_state(), state)
    return {f"{part}.{name}": A for part in models for name, A in kronecker_state_dict(models[part]).items()}


@pytest.mark.parametrize("seed, same", [(0, True), (1, False)])
def test_what_was_drawn_before_has_no_part_in_them_and_the_seed_has(seed, same, tmp_path):
    """Processes that draw another number of class images, and starts that find some, begin with the same factors."""
    ours = first_factors(make_config(tmp_path, train_text_encoder=True), 5)
    theirs = first_factors(make_config(tmp_path, train_text_encoder=True, seed=seed), 7)
    drawn = {name: factor for name, factor in ours.items() if name.endswith(".A")}
    assert all(torch.equal(theirs[name], factor) == same for name, factor in drawn.items())
    assert len({factor.flatten()[0].item() for factor in drawn.values()}) == len(drawn)  # no two begin alike
