"""MNIST and other single-channel images: the network of the TRADES experiments, trained with PART-T at eps 0.3.

A CAM needs a feature map: `target_layer` names the last convolution's ReLU. The images are the package's own, of
Fashion-MNIST.
"""

import torch
from torch import Tensor, nn

import part_fast
from part_fast.data import load, to_float


class SmallCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(64 * 4 * 4, 200), nn.ReLU(), nn.Dropout(), nn.Linear(200, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def main() -> None:
    torch.manual_seed(0)
    images = load("demo", "train").subset(100)
    x, y = to_float(images.images)[:, :1, 2:-2, 2:-2], images.labels  # one channel of 28x28
    model = SmallCNN()
    fast = part_fast.AttackModel(model)
    budget = part_fast.CamBudget(fast, eps=0.3, eps_low=0.25, target_layer="features.8")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    eps = budget(x)
    print(f"images {tuple(x.shape[1:])}, map {tuple(eps.shape[1:])}, eps {eps.min():.2f} to {eps.max():.2f}")
    for epoch in range(2):
        for batch in torch.randperm(len(x)).split(50):
            loss = part_fast.trades_loss(
                model, x[batch], y[batch], optimizer, 0.1, budget, 3, beta=1.0, attack_model=fast
            )
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
