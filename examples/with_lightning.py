"""Lightning: a LightningModule whose training and validation steps attack with PART.

The AttackModel is no submodule of what holds it: checkpoints, parameters and devices are those of `self.model` alone.
"""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

import part_fast
from part_fast.data import load, to_float
from part_fast.models import resnet_small


class PartModule(lightning.LightningModule):
    def __init__(self, steps: int = 2):
        super().__init__()
        self.steps = steps
        self.model = resnet_small()
        self.fast = part_fast.AttackModel(self.model)
        self.budget = part_fast.CamBudget(self.fast, 8 / 255, 7 / 255)

    def attacked(self, x: Tensor, y: Tensor) -> Tensor:
        return part_fast.pgd(self.fast, x, y, self.budget(x), 2 / 255, self.steps)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(self.attacked(x, y)), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch  # within inference_mode, which attacks leave
        self.log("robust", (self.fast(self.attacked(x, y)).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader(split: str, size: int) -> torch.utils.data.DataLoader:
    images = load("demo", split).subset(size)
    pairs = torch.utils.data.TensorDataset(to_float(images.images), images.labels)
    return torch.utils.data.DataLoader(pairs, batch_size=100, shuffle=split == "train")


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    module = PartModule()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, loader("train", 600), loader("test", 100))
    keys = {key.partition(".")[0] for key in module.state_dict()}
    print(f"robust accuracy {trainer.callback_metrics['robust']:.0%}; state_dict holds {sorted(keys)}")


if __name__ == "__main__":
    main()
