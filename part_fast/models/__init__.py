"""CIFAR-style networks on [0,1] images, under the parameter names of the published checkpoints."""

from part_fast.models.catalogue import KNOWN_MODELS, MODELS, build_model
from part_fast.models.checkpoints import export_weights, load_weights
from part_fast.models.preact_resnet import PreActResNet, preact_resnet18
from part_fast.models.resnet import ResNet, resnet18, resnet_small
from part_fast.models.wideresnet import WideResNet, wideresnet

__all__ = [
    "KNOWN_MODELS",
    "MODELS",
    "PreActResNet",
    "ResNet",
    "WideResNet",
    "build_model",
    "export_weights",
    "load_weights",
    "preact_resnet18",
    "resnet18",
    "resnet_small",
    "wideresnet",
]
