"""A stand-in for torchvision, of which torchmetrics' LPIPS takes the backbones alone."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


def alexnet(weights):
    """The features of torchvision's AlexNet, with random weights that are always the same."""
    assert weights == "pretrained"
    torch.manual_seed(0)
    pool, relu = (lambda: nn.MaxPool2d(3, 2)), nn.ReLU
    layers = [nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), nn.Conv2d(64, 192, 5, padding=2), relu(), pool()]
    layers += [nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), relu(), pool()]
    return SimpleNamespace(features=nn.Sequential(*layers))


def stand_in_for_torchvision(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Have torchmetrics take this for torchvision; return its `models`."""
    from torchmetrics.functional.image import lpips as functional
    from torchmetrics.image import lpip as module

    torchvision = ModuleType("torchvision")
    torchvision.__spec__ = ModuleSpec("torchvision", None)
    torchvision.models = SimpleNamespace(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT="pretrained"))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    for owner in (functional, module):
        monkeypatch.setattr(owner, "_TORCHVISION_AVAILABLE", True)
    return torchvision.models


def distance(left: Image.Image, right: Image.Image) -> float:
    """LPIPS of two images as torchmetrics' function has it, from pixels in [0, 1]."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    pixels = (torch.tensor(np.asarray(image) / 255).float().permute(2, 0, 1)[None] for image in (left, right))
    return float(learned_perceptual_image_patch_similarity(*pixels, net_type="alex", normalize=True))
