"""Diversity by LPIPS: torchmetrics' own code, with a stand-in for the backbones that it takes from torchvision."""

import sys
from itertools import combinations
from statistics import fmean

import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.scoring.lpips import load_lpips
from dreambooth.scoring.subject import read_subject_photos
from tests.backbones import distance, stand_in_for_torchvision
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def backbones(monkeypatch):
    return stand_in_for_torchvision(monkeypatch)


@pytest.fixture(scope="module")
def photos():
    return read_subject_photos(str(ROOT / "toyworld" / "photos" / "dog"))[:5]


def test_diversity_is_the_mean_distance_over_all_pairs(backbones, photos):
    lpips = load_lpips("alex", CPU)
    theirs = fmean(distance(left, right) for left, right in combinations(photos, 2))  # 10 pairs, more than at once
    ours = lpips.mean_distance(photos)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours > 0.01
    assert lpips.mean_distance(photos) == ours  # nothing is left of the first time
    assert lpips.mean_distance([photos[0]] * 3) == pytest.approx(0, abs=1e-6)


def test_every_prompt_weighs_the_same_and_one_image_has_none(backbones, photos):
    lpips = load_lpips("alex", CPU)
    varied = lpips.diversity_of([photos[:3], photos[:2], photos[:1]], photos[3:])
    rows = [lpips.mean_distance(photos[:3]), lpips.mean_distance(photos[:2]), None]
    assert list(varied.by_prompt) == rows and varied.prompts == fmean(rows[:2])
    assert varied.class_images == lpips.mean_distance(photos[3:])
    assert lpips.diversity_of([photos[:1]], []).prompts is None


@pytest.mark.parametrize("missing", ["torchvision", "torchmetrics"])
def test_a_missing_package_is_named_with_what_installs_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "torchmetrics":
        for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"--lpips vgg .*pip install torchmetrics==\S+ torchvision torch==[\d.]+ "):
        load_lpips("vgg", CPU)


def test_weights_that_cannot_be_downloaded_end_it(backbones):
    def unreachable(weights):
        raise OSError("urlopen error: no route to host")

    backbones.alexnet = unreachable
    with pytest.raises(UserError, match="--lpips alex: .*no route to host"):
        load_lpips("alex", CPU)
