"""The options of photos, captions, priors and latents: what goes together, and what is refused in which words."""

import pytest

from dreambooth.errors import UserError
from dreambooth.options.checking import check_options
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import TrainingConfig
from dreambooth.options.yaml_file import save_config

PHOTOS = {"instance_data_dir": "photos"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a dog"}


def make_config(**options):
    return TrainingConfig(pretrained_model_name_or_path="base", instance_prompt="sks dog", **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "--instance_data_dir.*--dataset_name"),
        (PHOTOS | {"dataset_name": "dogs"}, "--instance_data_dir.*--dataset_name"),
        (PHOTOS | {"dataset_config_name": "x"}, "--dataset_config_name .*--dataset_name"),
        (PHOTOS | {"image_column": "photo"}, "--image_column .*--dataset_name"),
        (PHOTOS | {"aspect_ratio_buckets": True, "resolution": 56}, "--aspect_ratio_buckets .*--resolution .*56"),
        (
            PHOTOS | {"cache_latents": "off", "cache_latents_to_disk": "cache"},
            "--cache_latents_to_disk .*--cache_latents off",
        ),
        (PHOTOS | {"prior_source": "base_model"}, "--prior_source base_model .*--with_prior_preservation"),
        (
            PHOTOS | PRIOR | {"prior_source": "base_model", "class_data_dir": "class"},
            "--class_data_dir .*--prior_source base_model",
        ),
        (
            PHOTOS | {"with_prior_preservation": True, "prior_source": "base_model"},
            "--with_prior_preservation .*--class_prompt",
        ),
        (PHOTOS | PRIOR, "--with_prior_preservation .*--class_data_dir"),
        ({"dataset_name": "dogs"} | PRIOR, "--with_prior_preservation .*--class_data_dir"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        check_options(make_config(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"dataset_name": "dogs", "dataset_config_name": "x", "image_column": "photo", "caption_column": "text"},
        {"dataset_name": "dogs", "class_data_dir": "class"} | PRIOR,
        PHOTOS | PRIOR | {"prior_source": "base_model"},
        PHOTOS | {"aspect_ratio_buckets": True, "resolution": 64},
        PHOTOS | {"caption_dropout_probability": 1.0, "repeats": 100, "unmasked_weight": 0.0},
        PHOTOS | {"cache_latents": "on", "cache_latents_to_disk": "cache"},
        PHOTOS | {"cache_latents_to_disk": "cache", "caption_column": "text"},
    ],
)
def test_the_rest_goes_together_and_round_again(tmp_path, options):
    config = make_config(**options)
    check_options(config)
    save_config(config, tmp_path / "config.yaml")
    assert parse_options(TrainingConfig, "", ["--config", str(tmp_path / "config.yaml")]) == config
