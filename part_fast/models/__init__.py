"""CIFAR-style networks on [0,1] images, under the parameter names of the published checkpoints."""

from part_fast.models.checkpoints import (
    KNOWN_MODELS,
    ResNet,
    WideResNet,
    build_model,
    export_weights,
    load_weights,
    resnet18,
    resnet_small,
    wideresnet,
)

__all__ = [
    "KNOWN_MODELS",
    "ResNet",
    "WideResNet",
    "build_model",
    "export_weights",
    "load_weights",
    "resnet18",
    "resnet_small",
    "wideresnet",
]
