"""torchvision: any of its networks, copied to be attacked, explained and trained with PART-T.

docs/target_layers.md lists the layer of each network; ResNets need none. ImageNet's normalisation goes inside, so that
images stay in [0,1] and eps in image units; in plain arithmetic, as torch.fx, which finds what to fold, cannot read
torchvision.transforms.Normalize.
"""

import torch
import torchvision
from torch import nn

import part_fast

LAYERS = {
    "resnet50": None,
    "convnext_tiny": "features.7",
    "mobilenet_v2": "features.18",
    "efficientnet_b0": "features.8",
}


class Normalized(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mean) / self.std)


def off(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


def main() -> None:
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    for name, layer in LAYERS.items():
        torch.manual_seed(0)
        model = Normalized(getattr(torchvision.models, name)(num_classes=10))
        fast = part_fast.AttackModel(model)
        budget = part_fast.CamBudget(fast, 8 / 255, 7 / 255, target_layer=layer and f"model.{layer}")
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        error = off(fast(x), model.eval()(x))
        loss = part_fast.trades_loss(model, x, y, optimizer, 2 / 255, budget, 1, attack_model=fast)
        loss.backward()
        optimizer.step()
        moved = off(fast(x), model.eval()(x))
        print(f"{name}: loss {loss.item():.2f}, copy off by {error:.0e}, after a step by {moved:.0e}")


if __name__ == "__main__":
    main()
