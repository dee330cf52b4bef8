"""RobustBench: a checkpoint in its zoo's layout loaded here, and a model exported from here in its `benchmark`.

`load_weights` finds the weights under whatever key and prefix they have. `export_weights` writes a `.pt` that the
zoo's own class loads; nothing is downloaded here, `benchmark` sees images of its data set's shape made on the spot.
"""

import pathlib
import sys
import tempfile

import pyautoattack
import pyautoattack.state
import torch

from part_fast.models import export_weights, load_weights, wideresnet


class AutoAttack(pyautoattack.AutoAttack):
    """RobustBench imports the package `autoattack`, which PyPI lacks; pyautoattack names two arguments otherwise."""

    def __init__(self, model, norm, eps, version, device, log_path):
        super().__init__(model, norm=norm, eps=eps, version=version, device=device)

    def run_standard_evaluation(self, x, y, bs, state_path=None):
        return super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]


try:
    import autoattack
except ImportError:
    sys.modules["autoattack"], sys.modules["autoattack.state"] = sys.modules[__name__], pyautoattack.state
import robustbench.eval
from robustbench.model_zoo.architectures.wide_resnet import WideResNet


def main() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        # From the zoo: its class, the layouts of its training codes, TRADES's unused sub_block1.
        theirs = WideResNet(depth=10, widen_factor=1, sub_block1=True).eval()
        for name, layout in {
            "module.": {"module." + key: value for key, value in theirs.state_dict().items()},
            "module.basic_net.": {"net": {"module.basic_net." + k: v for k, v in theirs.state_dict().items()}, "acc": 50.1},
            "1., with mu and sigma": {
                **{"1." + key: value for key, value in theirs.state_dict().items()},
                **{"0.mu": torch.zeros(1, 3, 1, 1), "0.sigma": torch.ones(1, 3, 1, 1)},
            },
            "ema_state_dict": {"ema_state_dict": theirs.state_dict(), "epoch": 3},
        }.items():
            torch.save(layout, pathlib.Path(folder, "zoo.pt"))
            ours = load_weights(wideresnet(10, 1), pathlib.Path(folder, "zoo.pt")).eval()
            print(f"{name}: equal logits {torch.allclose(ours(x), theirs(x), atol=1e-5)}")

        # To the zoo: its class loads our file.
        exported = export_weights(ours, pathlib.Path(folder, "exported.pt"))
        again = WideResNet(depth=10, widen_factor=1).eval()
        again.load_state_dict(torch.load(exported))
        robustbench.eval.load_clean_dataset = lambda *data: (x, again(x).argmax(1))
        clean, robust = robustbench.eval.benchmark(again, dataset="cifar10", n_examples=4, eps=128 / 255)  # so large that the attacks end soon
        print(f"benchmark: clean {clean:.0%}, robust {robust:.0%}")


if __name__ == "__main__":
    main()
