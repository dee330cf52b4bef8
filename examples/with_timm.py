"""timm: any of its networks, copied to be attacked, explained and trained with PART.

docs/target_layers.md lists the layer of each network. timm's `pretrained_cfg` has the mean and std: give them as `clip`
and in the units of eps, or normalise inside the model, as with_torchvision.py does. Here the images stay in [0,1].
"""

import timm
import torch
import torch.nn.functional as F

import part_fast

LAYERS = {
    "resnet50": None,
    "convnext_atto": "stages.3",
    "mobilenetv2_050": "bn2",
    "efficientnet_b0": "bn2",
}


def off(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


def main() -> None:
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    for name, layer in LAYERS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        fast = part_fast.AttackModel(model)
        budget = part_fast.CamBudget(fast, 8 / 255, 7 / 255, target_layer=layer)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        error = off(fast(x), model.eval()(x))
        x_adv = part_fast.pgd(fast, x, y, budget(x), 2 / 255, 2)
        loss = F.cross_entropy(model.train()(x_adv), y)
        loss.backward()
        optimizer.step()
        moved = off(fast(x), model.eval()(x))
        print(f"{name}: loss {loss.item():.2f}, copy off by {error:.0e}, after a step by {moved:.0e}")


if __name__ == "__main__":
    main()
