"""The small network and the expected values of golden/attack.safetensors, and a stand-in for a real ResNet."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

EXPECTED = load_file(Path(__file__).parent / "golden" / "attack.safetensors")


class Net(nn.Module):
    """The network that golden/README.md describes; `relu2` is the layer that its CAM explains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def golden_net() -> Net:
    """The network in its stored state, in eval mode."""
    model = Net()
    model.dropout = nn.Identity()
    model.load_state_dict({key[len("state.") :]: value for key, value in EXPECTED.items() if key.startswith("state.")})
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a budget or an attack must leave alone."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_untouched(before: dict[str, object], model: nn.Module, rng: bool = True) -> None:
    after = snapshot(model)
    for key in ("modes", "hooks", "requires_grad"):
        assert after[key] == before[key], key
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key], value), key
    for was, now in zip(before["grads"], after["grads"], strict=True):
        assert (was is None and now is None) or torch.equal(was, now)
    if rng:
        assert torch.equal(after["rng"], before["rng"])


class Failing(nn.Module):
    """Raises at the n-th call."""

    def __init__(self, after: int = 0):
        super().__init__()
        self.left = after

    def forward(self, x: Tensor) -> Tensor:
        if self.left == 0:
            raise RuntimeError("planted failure")
        self.left -= 1
        return x
