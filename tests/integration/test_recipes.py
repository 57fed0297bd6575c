"""Recipes that no other test trains with: they run as they are, but for paths, sizes and steps."""

import pytest

from dreambooth.options.parsing import parse_options
from dreambooth.options.training import config_class
from dreambooth.train import train
from methods.train import FAMILIES, METHODS
from tests.conftest import ROOT, flags

TINY = {"resolution": 64, "max_train_steps": 1, "checkpointing_steps": 1, "instance_prompt": "a photo of sks dog"}


@pytest.mark.parametrize(
    "recipe, base, own",
    [
        (
            "lora-sd-svdiff",
            "tiny_sd",
            {"class_prompt": "a photo of dog", "class_data_dir": "{folder}/class", "num_class_images": "1"},
        ),
        ("lora-sdxl", "tiny_sdxl", {"pretrained_vae_model_name_or_path": "{base}/vae"}),
    ],
)
def test_a_recipe_runs(recipe, base, own, request, dog_photos, tmp_path, fresh_accelerator):
    base = request.getfixturevalue(base)
    method, family = (table[word] for table, word in zip((METHODS, FAMILIES), recipe.split("-")))
    given = {
        **TINY,
        **{name: value.format(base=base, folder=tmp_path) for name, value in own.items()},
        "config": ROOT / "configs" / "methods" / f"{recipe}.yaml",
        "pretrained_model_name_or_path": base,
        "instance_data_dir": dog_photos,
        "output_dir": tmp_path / "out",
    }
    config = parse_options(config_class(family.options, method.options), "", flags(given))
    train(family.load(), method.load(), config)
    assert (tmp_path / "out" / method.load().weights_name).is_file()
