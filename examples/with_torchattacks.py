"""torchattacks: PART's attack as one of its own, with its MultiAttack and its targeted modes.

The budget is asked with every batch, since MultiAttack passes on only the images that no attack has fooled yet.
"""

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

import part_fast
from part_fast.models import resnet_small


class PartPGD(torchattacks.attack.Attack):
    """torchattacks.PGD with an eps for each pixel: `budget(images)` gives the map."""

    def __init__(self, model: nn.Module, budget: part_fast.CamBudget, alpha: float = 2 / 255, steps: int = 10):
        super().__init__("PartPGD", model)
        self.budget, self.alpha, self.steps = budget, alpha, steps
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = images.detach().to(self.device), labels.detach().to(self.device)
        eps = self.budget(images)
        if not self.targeted:
            return part_fast.pgd(self.get_logits, images, labels, eps, self.alpha, self.steps)
        target = self.get_target_label(images, labels)
        return part_fast.pgd(self.get_logits, images, target, eps, self.alpha, self.steps, loss=towards)


def towards(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(logits, target, reduction="none")


def main() -> None:
    torch.manual_seed(0)
    model = resnet_small().eval()
    x, y = torch.rand(16, 3, 16, 16), torch.randint(10, (16,))
    budget = part_fast.CamBudget(model, eps=8 / 255, eps_low=4 / 255)
    attack = PartPGD(model, budget)
    within = ((attack(x, y) - x).abs() <= budget(x) + 1e-6).all()
    print(f"within its map: {bool(within)}")

    weak = torchattacks.FGSM(model, eps=1 / 255)
    both = torchattacks.MultiAttack([weak, attack])(x, model(x).argmax(1))
    fooled = (model(both).argmax(1) != model(x).argmax(1)).float().mean()
    print(f"MultiAttack of FGSM and PartPGD fools {fooled:.0%}")

    target = (model(x).argmax(1) + 1) % 10
    before = model(x).gather(1, target[:, None]).mean()
    attack.set_mode_targeted_by_label(quiet=True)
    after = model(attack(x, target)).gather(1, target[:, None]).mean()
    print(f"targeted: the wrong class's logit rises: {bool(after > before)}")


if __name__ == "__main__":
    main()
