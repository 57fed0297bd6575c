"""What makes a resumed run the same run."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dreambooth.data.photos import Photo
from dreambooth.data.pixels import Pixels
from dreambooth.errors import UserError
from dreambooth.kronecker import KRONECKER
from dreambooth.layout import RUN_NAME
from dreambooth.output import identity
from tests.faults.checkpoints import ALONE, make_config

TWO = SimpleNamespace(num_processes=2, mixed_precision="no")


def deciding_options(config, accelerator):
    return identity.deciding_options(KRONECKER, config, accelerator)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "b"},
        {"max_train_steps": 9},
        {"checkpointing_steps": 9},
        {"hub_token": "t"},
        {"max_train_time": "1h"},
        {"lr_warmup_steps": 3},  # --lr_scheduler is constant
    ],
)
def test_what_may_differ(changes, tmp_path):
    changed = replace(make_config(tmp_path), **changes)
    assert deciding_options(changed, ALONE) == deciding_options(make_config(tmp_path), ALONE)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"kron_init": "reference"}, {"learning_rate": 1e-5}, {"train_batch_size": 2}, {"resolution": 64}],
)
def test_what_may_not(changes, tmp_path):
    assert deciding_options(make_config(tmp_path, **changes), ALONE) != deciding_options(make_config(tmp_path), ALONE)


def test_the_global_batch_counts_and_with_buckets_its_rows_too(tmp_path):
    for buckets in (False, True):
        one = deciding_options(make_config(tmp_path, train_batch_size=4, aspect_ratio_buckets=buckets), ALONE)
        split = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "aspect_ratio_buckets": buckets}
        assert (deciding_options(make_config(tmp_path, **split), TWO) == one) is not buckets


def test_the_length_counts_where_the_schedule_looks_at_it(tmp_path):
    cosine = [make_config(tmp_path, lr_scheduler="cosine", max_train_steps=steps) for steps in (5, 6)]
    assert deciding_options(cosine[0], ALONE) != deciding_options(cosine[1], ALONE)


def test_an_option_that_there_was_not_yet_had_its_default(tmp_path):
    now = deciding_options(make_config(tmp_path), ALONE)
    then = {name: value for name, value in now.items() if name not in ("timestep_sampling", "kron_lr")}
    (tmp_path / RUN_NAME).write_text(json.dumps({"options": then}))
    identity.refuse_other_options(tmp_path, KRONECKER, make_config(tmp_path), ALONE)
    with pytest.raises(UserError, match="timestep_sampling"):
        changed = make_config(tmp_path, timestep_sampling="thinned")
        identity.refuse_other_options(tmp_path, KRONECKER, changed, ALONE)


def test_another_method_is_another_run(tmp_path):
    config = make_config(tmp_path)
    ours, theirs = (identity.deciding_options(SimpleNamespace(name=name), config, ALONE) for name in ("a", "b"))
    assert ours != theirs


def test_a_photo_has_one_name_however_its_accents_are_stored(tmp_path):
    named = []
    for form in ("NFC", "NFD"):
        path = Path(unicodedata.normalize(form, "café.jpg"))
        photo = Photo(path, Pixels(np.zeros((8, 8, 3), np.uint8)), "sks", None, (8, 8))
        named.append(identity.identify_run(KRONECKER, None, [photo], [], make_config(tmp_path), ALONE)["photos"])
    assert named[0] == named[1]


def test_tokens_are_in_no_description(tmp_path):
    assert "canary" not in str(deciding_options(make_config(tmp_path, hub_token="canary"), ALONE))
