"""The ops from C++: builds examples/cpp with CMake against the installed torch, runs it, and compares with Python."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

import part_fast

EPS, EPS_LOW = 8 / 255, 7 / 255
folder = Path(__file__).resolve().parent / "cpp"
package = Path(part_fast.__file__).parent


def build(where: Path) -> Path:
    """The program of examples/cpp."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not on PATH")
    options = [f"-DTORCH={torch.__path__[0]}", f"-DPART_FAST={package}"]
    for command in (["cmake", "-S", folder, "-B", where, *options], ["cmake", "--build", where]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return where / "attack"


class Network(nn.Module):
    """The one of attack.cpp."""

    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


torch.manual_seed(0)
network = Network().eval().requires_grad_(False)
x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))

activation = network.features(x).requires_grad_()
score = network.head(activation.mean((2, 3))).gather(1, y[:, None]).sum()
(gradient,) = torch.autograd.grad(score, activation)
cam = part_fast.cam(activation, gradient)
eps = part_fast.epsilon_map(cam, (32, 32), EPS, EPS_LOW)
packed = part_fast.packed_epsilon_map(cam, (32, 32), EPS, EPS_LOW)
x_adv = part_fast.pgd(network, x, y, eps, alpha=2 / 255, steps=10, start="zero")
expected = {
    "cam": cam,
    "mask": part_fast.cam_mask(cam, (32, 32), "quantile:0.25"),
    "eps": eps,
    "bits": packed.bits,
    "x_adv": x_adv,
    "projected": part_fast.project_linf(x_adv, x, packed),
}

with tempfile.TemporaryDirectory() as temporary:
    program = build(Path(temporary) / "build")
    given, got = Path(temporary) / "input.pt", Path(temporary) / "output.pt"
    torch.save({**network.state_dict(), "x": x, "y": y}, given)
    subprocess.run([program, package / "_C.abi3.so", given, got], check=True)
    found = dict(torch.load(got, weights_only=True))
for name, value in expected.items():
    print(f"{name} {tuple(value.shape)}: equal bit for bit {torch.equal(value, found[name])}")
print(f"moved by at most {255 * (found['x_adv'] - x).abs().max():.2f}/255, mean eps {255 * eps.mean():.2f}/255")
