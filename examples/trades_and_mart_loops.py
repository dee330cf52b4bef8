"""The training loops of TRADES and MART as published: only the import of the loss is another.

    from part_fast import trades_loss    in the place of    from trades import trades_loss
    from part_fast import mart_loss      in the place of    from mart import mart_loss

Everything else stays. An AttackModel makes the attack faster; a CamBudget as `epsilon` makes it PART-T and PART-M.
"""

from types import SimpleNamespace

import torch
from torch import nn, optim

from part_fast import AttackModel, CamBudget, mart_loss, trades_loss
from part_fast.data import load, to_float
from part_fast.models import resnet_small

args = SimpleNamespace(lr=0.05, step_size=2 / 255, epsilon=8 / 255, num_steps=3, beta=6.0, batch_size=100)


def train(loss_of, model, device, train_loader, optimizer, **faster) -> float:
    model.train()
    for data, target in train_loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = loss_of(
            model=model,
            x_natural=data,
            y=target,
            optimizer=optimizer,
            **{
                "step_size": args.step_size,
                "epsilon": args.epsilon,
                "perturb_steps": args.num_steps,
                "beta": args.beta,
                **faster,
            },
        )
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    images = load("demo", "train").subset(600)
    pairs = torch.utils.data.TensorDataset(to_float(images.images), images.labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=args.batch_size)
    device = torch.device("cpu")
    for name, loss_of in (("TRADES", trades_loss), ("MART", mart_loss)):
        for part in (False, True):
            torch.manual_seed(0)
            model: nn.Module = resnet_small().to(device)
            optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
            fast = AttackModel(model)
            more = {"attack_model": fast, "epsilon": CamBudget(fast, 8 / 255, 7 / 255)} if part else {}
            losses = [train(loss_of, model, device, loader, optimizer, **more) for _ in range(2)]
            print(f"{name}{' with a CamBudget' if part else ''}: loss {losses[0]:.3f}, then {losses[1]:.3f}")


if __name__ == "__main__":
    main()
