"""RobustBench: a checkpoint in its zoo's layout loaded here, and a model exported from here in its `benchmark`.

`load_weights` finds the weights under whatever key and prefix they have. `export_weights` writes a `.pt` that the
zoo's own class loads. Nothing is downloaded: `benchmark` sees images of its data set's shape, made on the spot.
Install robustbench after torchattacks, which brings an old copy of it without `benchmark`.
"""

import importlib.util
import pathlib
import sys
import tempfile

import pyautoattack
import pyautoattack.state
import torch

from part_fast.models import export_weights, load_weights, wideresnet


class AutoAttack(pyautoattack.AutoAttack):
    """RobustBench imports the package `autoattack`, which PyPI lacks; pyautoattack names an argument otherwise."""

    def __init__(self, model, norm, eps, version, device, log_path):
        super().__init__(model, norm=norm, eps=eps, version=version, device=device)

    def run_standard_evaluation(self, x, y, bs, state_path=None):
        return super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]


def layouts(weights: dict[str, torch.Tensor]) -> dict[str, dict]:
    """The weights as the zoo's training codes write them."""

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in weights.items()}

    return {
        "module.": under("module."),
        "module.basic_net.": {"net": under("module.basic_net."), "acc": 50.1},
        "1., with mu and sigma": {"0.mu": torch.zeros(1, 3, 1, 1), "0.sigma": torch.ones(1, 3, 1, 1), **under("1.")},
        "ema_state_dict": {"ema_state_dict": weights, "epoch": 3},
    }


def main() -> None:
    if importlib.util.find_spec("autoattack") is None:
        sys.modules["autoattack"], sys.modules["autoattack.state"] = sys.modules[__name__], pyautoattack.state
    import robustbench.eval
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    theirs = WideResNet(depth=10, widen_factor=1, sub_block1=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.pt")
        for name, checkpoint in layouts(theirs.state_dict()).items():
            torch.save(checkpoint, path)
            ours = load_weights(wideresnet(10, 1), path).eval()
            print(f"{name}: equal logits {torch.allclose(ours(x), theirs(x), atol=1e-5)}")

        again = WideResNet(depth=10, widen_factor=1).eval()
        again.load_state_dict(torch.load(export_weights(ours, path, overwrite=True)))
    robustbench.eval.load_clean_dataset = lambda *data: (x, again(x).argmax(1))
    # An eps so large that the attacks end soon.
    clean, robust = robustbench.eval.benchmark(again, dataset="cifar10", n_examples=4, eps=128 / 255)
    print(f"benchmark: clean {clean:.0%}, robust {robust:.0%}")


if __name__ == "__main__":
    main()
