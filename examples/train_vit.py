"""A small vision transformer of torchvision trained with PART on real images, its maps from attention x gradient."""

import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer

import part_fast
from part_fast import AttackModel, CamBudget
from part_fast.data import load, to_float


def main() -> None:
    torch.manual_seed(0)
    images = load("demo", "train").subset(1000)
    x, y = to_float(images.images), images.labels
    channels, size = x.shape[1], x.shape[2]
    model = VisionTransformer(
        image_size=size, patch_size=size // 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    model.conv_proj = torch.nn.Conv2d(channels, 64, size // 8, size // 8)
    fast = AttackModel(model)
    budget = CamBudget(fast, eps=8 / 255, eps_low=4 / 255, method="attention-gradient", rule="quantile:0.3")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in torch.cat([torch.randperm(len(x)) for _ in range(3)]).split(50):
        eps = budget(x[batch])
        x_adv = part_fast.pgd(fast, x[batch], y[batch], eps, 4 / 255, 2)
        loss = F.cross_entropy(model.train()(x_adv), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"adversarial loss of the first ten steps {first:.3f}, of the last ten {last:.3f}")
    eps = budget(x[:50])
    masks = (eps > 6 / 255).flatten(1)
    different, share = len(masks.unique(dim=0)), masks.float().mean()
    print(f"{different} different masks for {len(masks)} images, {share:.0%} of the pixels in each")


if __name__ == "__main__":
    main()
