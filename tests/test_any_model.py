"""Models of every kind that users bring, at every entry point: the plain model's numbers, or one line that names it.

Each kind is compared with attacks, maps and losses written out here in plain PyTorch. `python tests/test_any_model.py`
prints the table of docs/models.md.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import part_fast
from part_fast import AttackModel, CamBudget, mart_loss, mma, pgd, trades_loss
from part_fast.eval_mode import modules_of

N, SIDE, WIDTH, CLASSES = 3, 16, 16, 5  # 16 channels and 48 tiles: what Winograd takes
EPS, ALPHA, STEPS, BETA = 8 / 255, 2 / 255, 2, 6.0
WRONG = 4  # a class that none of the models here predicts
DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def images(channels: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(N) % CLASSES


# ---- what users bring ----


class Net(nn.Module):
    """The plain one, which the others vary."""

    head = WIDTH

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.layer4 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.fc = nn.Linear(self.head, CLASSES)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.running_mean, 0, 0.3)
                nn.init.uniform_(norm.running_var, 0.5, 2)
                nn.init.uniform_(norm.weight, 0.5, 1.5)

    def body(self, x: Tensor) -> Tensor:
        return self.layer4(F.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x).mean((2, 3)))


class View(Net):
    head = WIDTH * SIDE * SIDE

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).view(-1, WIDTH * SIDE * SIDE))


class ViewOfPool(Net):
    """A head for images a quarter as large: 2x2 is left to flatten."""

    head = WIDTH * 4

    def forward(self, x: Tensor) -> Tensor:
        out = F.avg_pool2d(self.body(x), SIDE // 2)
        return self.fc(out.view(out.size(0), -1))


class ViewOfInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(x.shape[0], -1))


class WritesThroughView(Net):
    """Reads an activation after writing into its view: a copy in the view's place would be another number."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x) * 1.5
        out.view(len(x), -1)[:, ::3] = 0.5
        return self.fc(out.mean((2, 3)))


class SmallCNN(nn.Module):
    """The usual MNIST network of adversarial training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(8 * 6 * 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(x).view(-1, 8 * 6 * 6))


class KeepsTensors(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x)
        self.seen = [{"mean": self.features.mean((2, 3))}]
        return self.fc(self.seen[0]["mean"])


class KeepsOfLast(Net):
    """Keeps what it computes in a buffer of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        self.last = out
        return self.fc(out.mean((2, 3)))


def after_a_forward(model: nn.Module) -> nn.Module:
    model.train()(images(dtype=torch.get_default_dtype())[0])
    return model


def with_layer(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Net whose convolution in layer4 is what `change` makes of it."""
    model = Net()
    model.layer4[0] = change(model.layer4[0])
    return model


def pruned(conv: nn.Module) -> nn.Module:
    return prune.l1_unstructured(conv, "weight", 0.5)


class LoRA(nn.Module):
    """A convolution with an addition of low rank, which eval mode merges into its weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, conv.weight[0].numel()) * 0.1)
        self.b = nn.Parameter(torch.randn(conv.out_channels, 2) * 0.1)
        self.merged = False

    def delta(self) -> Tensor:
        return (self.b @ self.a).view_as(self.conv.weight)

    def train(self, mode: bool = True) -> LoRA:
        super().train(mode)
        if mode == self.merged:
            self.merge(-1 if mode else 1)
            self.merged = not mode
        return self

    @torch.no_grad()
    def merge(self, sign: int) -> None:
        self.conv.weight += sign * self.delta()

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.conv(x)
        return self.conv._conv_forward(x, self.conv.weight + self.delta(), self.conv.bias)


class LoRAThroughData(LoRA):
    def merge(self, sign: int) -> None:
        self.conv.weight.data += sign * self.delta().data


class FrozenNorm(Net):
    """Its BatchNorms stay in eval mode, whatever the rest is in."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class OwnMode(Net):
    """Its train() keeps a flag of its own and never torch's."""

    learning = True

    def train(self, mode: bool = True) -> OwnMode:
        self.learning = mode
        for child in self.children():
            child.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.learning else 2.0)


class TwoNorms(Net):
    """A BatchNorm for clean and one for adversarial images, chosen by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.bn1)
        nn.init.normal_(self.other.running_mean, 1, 0.3)
        self.adversarial = False

    def body(self, x: Tensor) -> Tensor:
        norm = self.other if self.adversarial else self.bn1
        return self.layer4(F.relu(norm(self.conv1(x))))


class RandomNorm(TwoNorms):
    def body(self, x: Tensor) -> Tensor:
        self.adversarial = bool(torch.rand(()) < 0.5)
        return super().body(x)


class OptionalArguments(Net):
    def forward(self, x: Tensor, features: bool = False, temperature: float | None = None) -> Any:
        out = self.body(x).mean((2, 3))
        if features:
            return out
        logits = self.fc(out)
        return logits if temperature is None else logits / temperature


class Conv3d(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, (3, 1, 1))
        self.register_buffer("shift", torch.rand(1, 1, 3, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.first(x[:, None] + self.shift)[:, :, 0])


class Position(Net):
    """Four dimensions that are no convolution's, flattened by view."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, WIDTH, SIDE, SIDE))

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + self.position.view(1, -1).view(1, WIDTH, SIDE, SIDE)


class GivesTuple(Net):
    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3))
        return self.fc(features), features


class GivesNamedTuple(Net):
    def forward(self, x: Tensor) -> Any:
        return collections.namedtuple("Output", "logits features")(super().forward(x), None)


class GivesDict(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """As Hugging Face's: a dataclass and a dict in one."""

    logits: Tensor | None = None


class GivesOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return ModelOutput(super().forward(x))


class GivesMap(Net):
    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class BodyWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.body(x)
        return self.fc(out.mean((2, 3)))


class BranchWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.bn1(self.conv1(x)).mean((2, 3))
        return self.fc(self.body(x).mean((2, 3)) * gate.sigmoid())


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.fc(checkpoint(self.layer4, out, use_reentrant=self.reentrant).mean((2, 3)))


class Reentrant(Checkpointed):
    reentrant = True


class ScriptedPart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = torch.jit.script(self.bn1)


class ScriptedLayer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer4 = torch.jit.script(self.layer4)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.LazyConv2d(WIDTH, 3, padding=1), nn.LazyLinear(CLASSES)


class HoldsLock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class FrozenBody(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.requires_grad_(False)
        self.layer4.requires_grad_(False)


class NormalisesInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


class Normalises(nn.Module):
    """NormalisesInPlace, elsewhere: what it gives when its input is copied."""

    def __init__(self, model: NormalisesInPlace) -> None:
        super().__init__()
        self.layer4, self.model = model.layer4, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.clone())


def hooked() -> nn.Module:
    model = Net()
    model.conv1.register_forward_hook(lambda module, args, out: out * 1.5)
    model.layer4[0].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    return model


def scripted() -> Any:
    return torch.jit.script(Net())


def traced() -> Any:
    return torch.jit.trace(Net().eval(), images(dtype=torch.get_default_dtype())[0])


def frozen() -> Any:
    return torch.jit.freeze(torch.jit.script(Net().eval()))


@functools.cache
def one_process() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="module", autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    if one_process.cache_info().currsize:
        dist.destroy_process_group()
        one_process.cache_clear()


def distributed() -> nn.Module:
    one_process()
    # In torch 2.10 and 2.11 each forward overwrites the buffers, which the one before has saved for its backward.
    overwrites = torch.__version__.startswith(("2.10.", "2.11."))
    return nn.parallel.DistributedDataParallel(Net(), broadcast_buffers=not overwrites)


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one_process()
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def compiled() -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(Net(), backend="eager")


def compiled_in_place() -> nn.Module:
    torch._dynamo.reset()
    model = Net()
    model.compile(backend="eager")
    return model


def compiled_part() -> nn.Module:
    torch._dynamo.reset()
    return with_layer(lambda conv: torch.compile(conv, backend="eager"))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def assigned() -> nn.Module:
    weights = Net().state_dict()
    model = on_meta()
    model.load_state_dict(weights, assign=True)
    return model


def decorated(model: nn.Module) -> Callable[[Tensor], Tensor]:
    @functools.wraps(model)
    def call(x: Tensor) -> Tensor:
        return model(x)

    return call


@dataclasses.dataclass
class Kind:
    """make: what the user has. plain: the module of it that is compared with. refused: by entry point, what its error
    says, where it is not served; "" stands for all the others. channels: of its images. left_out: entry points where
    there is nothing to compare with."""

    make: Callable[[], Any]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    plain: Callable[[Any], Any] = lambda model: model
    channels: int = 3
    left_out: tuple[str, ...] = ()

    def says(self, entry: str) -> str | None:
        """What is said where this kind is refused; None where it is served."""
        return self.refused.get(entry, self.refused.get(""))


def everywhere(said: str) -> dict[str, str]:
    return {"": said}


def of_copies(said: str) -> dict[str, str]:
    return dict.fromkeys(("AttackModel", "pgd of it", "CamBudget of it"), said)


def of_cams(said: str) -> dict[str, str]:
    return dict.fromkeys(("CamBudget", "CamBudget of it"), said)


NO_MODULE = of_copies(got := "model must be a torch.nn.Module") | dict.fromkeys(("CamBudget", "trades", "mart"), got)
NO_TENSOR = "model must give logits (3, classes), a Tensor, got {}: wrap it in a module that returns the logits alone"
NO_GRADIENT = "model must lead from its input to the loss, got a loss that does not depend on x_adv"
NO_GRADIENT_OF_LAYER = "target_layer must lead to the logits"
NO_HOOKS = "model must not be TorchScript"
NO_HOOKS_OF_LAYER = "target_layer must be a module that takes hooks, got one of TorchScript"
SCRIPT = "model must be of Python modules to be copied and followed, got TorchScript"
IN_PLACE = "model must not write into its input"

KINDS = {
    "a plain network": Kind(Net),
    "flattens by `.view`": Kind(View),
    "flattens a pooled map by `.view`": Kind(ViewOfPool),
    "flattens its input by `.view`": Kind(ViewOfInput, of_cams("target_layer must be given")),
    "writes into a `.view`": Kind(WritesThroughView),
    "the MNIST network of TRADES": Kind(SmallCNN, channels=1),
    "keeps activations on itself": Kind(lambda: after_a_forward(KeepsTensors())),
    "keeps activations in a buffer": Kind(lambda: after_a_forward(KeepsOfLast())),
    "`nn.utils.weight_norm`": Kind(lambda: with_layer(nn.utils.weight_norm)),
    "`nn.utils.weight_norm`, after a forward": Kind(lambda: after_a_forward(with_layer(nn.utils.weight_norm))),
    "`parametrizations.weight_norm`": Kind(lambda: with_layer(nn.utils.parametrizations.weight_norm)),
    "`nn.utils.spectral_norm`, after a forward": Kind(lambda: after_a_forward(with_layer(nn.utils.spectral_norm))),
    "`parametrizations.spectral_norm`": Kind(
        lambda: after_a_forward(with_layer(nn.utils.parametrizations.spectral_norm))
    ),
    "pruned": Kind(lambda: with_layer(pruned)),
    "pruned, after a forward": Kind(lambda: after_a_forward(with_layer(pruned))),
    "merges LoRA in eval mode": Kind(lambda: with_layer(LoRA)),
    "merges LoRA through `.data`": Kind(lambda: with_layer(LoRAThroughData)),
    "`train()` that freezes BatchNorm": Kind(FrozenNorm),
    "`train()` that leaves `training` alone": Kind(OwnMode, everywhere("model must set `training` in its train()")),
    "BatchNorm chosen by a flag": Kind(TwoNorms),
    "BatchNorm chosen at random": Kind(RandomNorm, left_out=("mma",)),  # whose classes are one batch, with one draw
    "optional arguments": Kind(OptionalArguments),
    "`nn.Conv3d` and a buffer of 5 dimensions": Kind(Conv3d),
    "a parameter of 4 dimensions, viewed": Kind(Position),
    "gives a tuple": Kind(GivesTuple, everywhere(NO_TENSOR.format("tuple"))),
    "gives a named tuple": Kind(GivesNamedTuple, everywhere(NO_TENSOR.format("Output"))),
    "gives a dict": Kind(GivesDict, everywhere(NO_TENSOR.format("dict"))),
    "gives a Hugging Face output": Kind(GivesOutput, everywhere(NO_TENSOR.format("ModelOutput"))),
    "gives a feature map": Kind(GivesMap, everywhere("model must give logits (3, classes), got (3, 16, 16, 16)")),
    "body under its own `no_grad`": Kind(
        BodyWithoutGradient,
        of_cams(NO_GRADIENT_OF_LAYER)
        | {"autoattack": "model must lead from its input to the logits"}
        | dict.fromkeys(("pgd of it", "pgd", "mma", "trades", "mart"), NO_GRADIENT),
    ),
    "a branch under its own `no_grad`": Kind(BranchWithoutGradient),
    "frozen by `requires_grad_(False)`": Kind(FrozenBody),
    "checkpoints": Kind(Checkpointed),
    "checkpoints, reentrant": Kind(
        Reentrant,
        of_cams(NO_GRADIENT_OF_LAYER)
        | dict.fromkeys(
            ("pgd of it", "pgd", "mma", "trades", "mart", "autoattack"),
            "model must checkpoint with use_reentrant=False",
        ),
    ),
    "`torch.jit.script`": Kind(scripted, of_cams(NO_HOOKS) | of_copies(SCRIPT)),
    "`torch.jit.trace`": Kind(traced, of_cams(NO_HOOKS) | of_copies(SCRIPT)),
    "`torch.jit.freeze`": Kind(frozen, of_cams(NO_HOOKS) | of_copies(SCRIPT)),
    "a part of TorchScript": Kind(ScriptedPart, of_copies(SCRIPT)),
    "the explained layer of TorchScript": Kind(ScriptedLayer, of_cams(NO_HOOKS_OF_LAYER) | of_copies(SCRIPT)),
    "`functools.partial`": Kind(lambda: functools.partial(Net()), NO_MODULE, lambda model: model.func),
    "a bound method": Kind(lambda: Net().forward, NO_MODULE, lambda model: model.__self__),
    "a decorated function": Kind(lambda: decorated(Net()), NO_MODULE, lambda model: model.__wrapped__),
    "DistributedDataParallel": Kind(distributed, plain=lambda model: model.module),
    "DataParallel": Kind(lambda: nn.DataParallel(Net()), plain=lambda model: model.module),
    "AveragedModel": Kind(lambda: AveragedModel(Net()), plain=lambda model: model.module),
    "`torch.compile(model)`": Kind(compiled, plain=lambda model: model._orig_mod),
    "`model.compile()`": Kind(compiled_in_place),
    "a compiled part": Kind(compiled_part),
    "`fully_shard`": Kind(sharded, of_copies("model must be one that copy.deepcopy copies")),
    "lazy, before its first forward": Kind(Lazy, everywhere("model must have its weights, got a LazyConv2d")),
    "lazy, after a forward": Kind(lambda: after_a_forward(Lazy())),
    "weights of `inference_mode`": Kind(
        made_in_inference_mode, everywhere("model must record gradients, got weights made under torch.inference_mode")
    ),
    "on the meta device": Kind(on_meta, everywhere("model must have its weights, got some on the meta device")),
    "loaded with `assign=True`": Kind(assigned),
    "cannot be copied": Kind(HoldsLock, of_copies("model must be one that copy.deepcopy copies")),
    "has forward hooks": Kind(hooked),
    "normalises its input in place": Kind(
        NormalisesInPlace,
        dict.fromkeys(("pgd", "mma", "trades", "mart", "autoattack"), IN_PLACE),
        lambda model: Normalises(model),
    ),
}


# ---- plain PyTorch, to compare with ----


def plain_gradient(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf)).sum(), leaf)[0]


def plain_pgd(model: nn.Module, x: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv + ALPHA * plain_gradient(model, x_adv, loss).sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return x_adv


def logits_and_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    logits = model(x).detach()
    try:
        return logits, plain_gradient(model, x, lambda z: F.cross_entropy(z, y, reduction="none"))
    except RuntimeError:  # of torch.autograd.grad, which the user calls here: there is no gradient
        return (logits,)


def plain_attack_model(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    return logits_and_gradient(model, x, y)


def plain_ce(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    return (plain_pgd(model, x, x, lambda logits: F.cross_entropy(logits, y, reduction="none")),)


def plain_mma(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    rows = torch.arange(len(x))
    clean = model(x).detach()
    clean[rows, y] = -torch.inf
    found = []
    for target in clean.topk(3, 1).indices.T:
        x_adv = plain_pgd(model, x, x, lambda z, to=target: -(z[rows, y] - z[rows, to] + 50).clamp(min=0))
        logits = model(x_adv).detach()
        found.append((logits[rows, target] - logits[rows, y], x_adv))
    best = torch.stack([reached for reached, _ in found]).argmax(0)
    return (torch.stack([x_adv for _, x_adv in found])[best, rows],)


def plain_cam(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Grad-CAM by hooks and one backward; how a map becomes eps is tested elsewhere."""
    model.eval()
    kept = []
    handle = model.layer4.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = model(x.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(x)), y].sum(), kept[0])
    cam = (kept[0] * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach()
    return part_fast.epsilon_map(cam, (SIDE, SIDE), EPS, 0.0, "soft"), logits.detach()


def plain_trades(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    target = model(x).detach().softmax(1)
    start = x + 0.001 * torch.randn_like(x)
    x_adv = plain_pgd(model, x, start, lambda z: F.kl_div(z.log_softmax(1), target, reduction="sum"))
    model.train()
    logits, logits_adv = model(x), model(x_adv)
    loss = F.cross_entropy(logits, y) + BETA * F.kl_div(
        logits_adv.log_softmax(1), logits.softmax(1), reduction="batchmean"
    )
    return trained(model, loss)


def plain_mart(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    start = x + 0.001 * torch.randn_like(x)
    x_adv = plain_pgd(model, x, start, lambda z: F.cross_entropy(z, y, reduction="none"))
    model.train()
    probs, logits_adv = model(x).softmax(1), model(x_adv)
    adv, rows = logits_adv.softmax(1), torch.arange(len(x))
    wrong = torch.stack([adv[i].index_fill(0, y[i], -1).argmax() for i in rows])
    boosted = F.cross_entropy(logits_adv, y) - (1.0001 - adv[rows, wrong] + 1e-12).log().mean()
    divergence = F.kl_div((adv + 1e-12).log(), probs, reduction="none").sum(1)
    return trained(model, boosted + BETA * (divergence * (1.0000001 - probs[rows, y])).mean())


def trained(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
    """The loss and what it gives to each parameter."""
    if loss.requires_grad:
        loss.backward()
    grads = [torch.zeros(()) if parameter.grad is None else parameter.grad for parameter in model.parameters()]
    return loss.detach(), *(full(grad) for grad in grads)


def full(value: Tensor) -> Tensor:
    """A DTensor's value as a plain tensor, others as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def plain_autoattack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Images that are wrong already are given back; the attacks themselves take too long here for every kind."""
    assert not (model.eval()(x).argmax(1) == WRONG).any()
    return (x,)


# ---- part_fast's own ----


def fast_attack_model(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return logits_and_gradient(AttackModel(model), x, y)


def fast_pgd(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (pgd(model, x, y, EPS, ALPHA, STEPS, start="zero"),)


def fast_cam(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    eps, logits = CamBudget(model, EPS, 0.0, rule="soft").with_logits(x, y)
    return eps, logits


def fast_loss(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda model, x, y: trained(model, loss(model, x, y, None, ALPHA, EPS, STEPS, BETA))


def fast_autoattack(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    from part_fast.attacks.autoattack import autoattack

    return (autoattack(model, x, torch.full((N,), WRONG), eps=EPS),)


ENTRIES: dict[str, tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]] = {
    "AttackModel": (fast_attack_model, plain_attack_model),
    "pgd of it": (lambda model, x, y: fast_pgd(AttackModel(model), x, y), plain_ce),
    "CamBudget of it": (lambda model, x, y: fast_cam(AttackModel(model), x, y), plain_cam),
    "pgd": (fast_pgd, plain_ce),
    "mma": (lambda model, x, y: (mma(model, x, y, EPS, ALPHA, STEPS, start="zero"),), plain_mma),
    "CamBudget": (fast_cam, plain_cam),
    "trades": (fast_loss(trades_loss), plain_trades),
    "mart": (fast_loss(mart_loss), plain_mart),
    "autoattack": (fast_autoattack, plain_autoattack),
}


def made(kind: Kind, dtype: torch.dtype) -> Any:
    """The user's model, in train mode; twice the same."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model = kind.make()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in modules_of(model)[:1]:
        module.train()
    return model


def state(model: Any) -> dict[str, object]:
    """Everything of a model that must be as it was."""
    modules = modules_of(model)
    lasting = list(modules[0].state_dict(keep_vars=True).values())
    return {
        "modes": [getattr(module, "training", None) for module in modules],
        "merged": [getattr(module, "merged", None) for module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        "grads": [tensor.grad is None for tensor in lasting],
        "asks": [tensor.requires_grad for tensor in lasting],
        "values": [full(tensor.detach()) for tensor in lasting],
    }


def assert_kept(before: dict[str, object], model: Any) -> None:
    after = state(model)
    values, then = after.pop("values"), before.pop("values")
    assert after == before
    assert all(map(torch.equal, values, then)), "weights are not bit for bit what they were"


def outcome(kind: Kind, entry: str) -> str:
    """What a user gets: "same", or the error. Anything else fails."""
    fast, plain = ENTRIES[entry]
    dtype = torch.float32 if entry == "autoattack" else torch.float64  # pyautoattack draws in float32
    x, y = images(kind.channels, dtype)
    given, model = x.clone(), made(kind, dtype)
    keeps = entry not in ("trades", "mart") and not kind.says("")  # these train; what is not there has no state
    before = state(model) if keeps else {}
    try:
        torch.manual_seed(2)
        actual = fast(model, x, y)
    except (TypeError, ValueError) as error:
        assert torch.equal(x, given)
        if keeps:
            assert_kept(before, model)
        return str(error)
    assert torch.equal(x, given)
    if keeps:
        assert_kept(before, model)
    reference = kind.plain(made(kind, dtype))
    torch.manual_seed(2)
    expected = plain(reference, given, y)
    # Folding and merging round float64 otherwise, by 1e-16 of the largest value that goes into a sum; the losses are
    # computed in float32.
    close = {"rtol": 1e-4, "atol": 1e-6} if entry in ("trades", "mart") else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(actual, expected, **close, check_dtype=False)
    return "same"


CELLS = [(name, entry) for name, kind in KINDS.items() for entry in ENTRIES if entry not in kind.left_out]


@pytest.mark.parametrize(("kind", "entry"), CELLS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_at_every_entry_point(kind: str, entry: str) -> None:
    if entry == "autoattack":
        pytest.importorskip("pyautoattack", reason="the package pyautoattack is not installed")
    said, got = KINDS[kind].says(entry), outcome(KINDS[kind], entry)
    if said is None:
        assert got == "same"
    else:
        assert got.startswith(said)
        assert "\n" not in got


def test_the_first_view_that_fails_is_told_once_and_the_copy_stays_the_same_modules() -> None:
    x, y = images(dtype=torch.float32)
    model = View().train()
    fast = AttackModel(model)
    budget = CamBudget(fast, EPS, 0.0, rule="soft")  # whose layer is a module of the copy
    with pytest.warns(UserWarning, match=r"View flattens by \.view.* or \.reshape is faster"):
        fast(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.eval()
        for _ in range(2):
            # Rounding of float32 in sums of 4096.
            for ours, theirs in zip(logits_and_gradient(fast, x, y), logits_and_gradient(plain, x, y), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(budget(x, y), plain_cam(plain, x, y)[0], rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                model.conv1.weight.mul_(1.5)  # which is followed there too
        again = copy.deepcopy(fast)
    torch.testing.assert_close(again(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:View flattens")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_view_in_every_precision_and_compiled(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(dtype=torch.float32)
    model = View().eval()
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.1, "atol": 0.1}  # 8 bits of mantissa
    torch.testing.assert_close(AttackModel(model, precision=precision)(x), model(x), **close)
    torch._dynamo.reset()
    compile = torch.compile  # by another backend: Inductor takes long, and traces the same
    monkeypatch.setattr(torch, "compile", lambda module, **given: compile(module, backend="aot_eager", **given))
    fast = AttackModel(model, precision=precision, compile=True)
    ours, theirs = logits_and_gradient(fast, x, y), logits_and_gradient(model, x, y)
    torch.testing.assert_close(ours[0], theirs[0], **close)
    if precision == "fp32":
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-6)


def test_a_runtime_error_that_is_none_of_view_is_the_models_own() -> None:
    fast = AttackModel(made(KINDS["a plain network"], torch.float64))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 5 channels"):
        fast(torch.rand(2, 5, SIDE, SIDE, dtype=torch.float64))


@pytest.mark.parametrize("layer", [LoRA, LoRAThroughData])
def test_merged_weights_are_followed_through_training(layer: Callable[..., nn.Module]) -> None:
    x, y = images(dtype=torch.float32)
    torch.manual_seed(0)
    model = with_layer(layer).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    fast = AttackModel(model)
    for _ in range(3):
        loss = trades_loss(model, x, y, optimizer, perturb_steps=1, attack_model=fast)
        loss.backward()
        assert model.layer4[0].a.grad.abs().sum() > 0
        optimizer.step()
        expected = copy.deepcopy(model).eval()(x)
        assert not model.layer4[0].merged
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", ["attribute", "list", "buffer"])
def test_the_copy_of_what_a_forward_kept_is_outside_of_its_graph(kept: str) -> None:
    model = after_a_forward(KeepsOfLast() if kept == "buffer" else KeepsTensors())
    copied = AttackModel(model).module
    theirs, ours = (
        {"attribute": lambda m: m.features, "list": lambda m: m.seen[0]["mean"], "buffer": lambda m: m.last}[kept](m)
        for m in (model, copied)
    )
    assert theirs.grad_fn is not None
    assert ours.grad_fn is None
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


class Drops(Net):
    """In train mode it draws and its BatchNorms move: what runs it unasked is seen."""

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), 0.5, self.training)


class Stages(Drops):
    """Functions of its own in a list, one of which is decorated, and one in a dict, which another reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"body": lambda x: self.body(x)}
        kept = self.kept["body"]
        self.stages = [lambda x, run=kept: run(x), torch.no_grad()(lambda x: x), lambda x: self.fc(x.mean((2, 3)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages[2](self.stages[0](self.stages[1](x) if self.training else x))


class HookOfItsOwn(Drops):
    """A hook that closes over the model, and keeps for the forward what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4.register_forward_hook(lambda module, args, out: setattr(self, "seen", self.bn1(out)))

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.fc(self.seen.mean((2, 3)))


def decorated_forward() -> nn.Module:
    model = Drops()
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)
    return model


@pytest.mark.parametrize("make", [Stages, HookOfItsOwn, decorated_forward])
@pytest.mark.filterwarnings("ignore:AttackModel folded none")
def test_functions_that_close_over_the_model_run_the_copy(make: Callable[[], nn.Module]) -> None:
    x, y = images()
    torch.manual_seed(0)
    model = make().double().train()
    fast = AttackModel(model)
    for attacked in (fast, copy.deepcopy(fast)):
        before, draws = state(model), torch.get_rng_state()
        found = attacked(x), pgd(attacked, x, y, EPS, ALPHA, STEPS, start="zero")
        assert_kept(before, model)
        assert torch.equal(draws, torch.get_rng_state())
        plain = copy.deepcopy(model.state_dict())
        expected = model.eval()(x), plain_ce(model, x, y)[0]
        model.train().load_state_dict(plain)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            model.layer4[0].weight.mul_(1.5)  # which is followed


reached: list[nn.Module] = []


class Elsewhere(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(reached[-1].body(x).mean((2, 3)))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore:AttackModel folded none")
def test_a_copy_that_reaches_the_models_modules_is_refused(compile: bool) -> None:
    x, y = images(dtype=torch.float32)
    model = Elsewhere().train()
    reached[:] = [model]
    fast, before = AttackModel(model, compile=compile), state(model)
    for use in (lambda: fast(x), lambda: pgd(fast, x, y, EPS), lambda: fast(x)):
        with pytest.raises(
            ValueError, match=r"^model must not reach its own modules through a closure, a global .*"
        ) as e:
            use()
        assert "\n" not in str(e.value)
    assert_kept(before, model)
    other: list[Tensor] = []
    thread = threading.Thread(target=lambda: other.append(model(x)))
    handle = model.fc.register_forward_pre_hook(lambda *_: None)  # the user's own hooks stay
    with torch.no_grad(), pytest.raises(ValueError, match="must not reach"):
        fast(x)
    thread.start()
    thread.join()
    assert len(other) == len(model.fc._forward_pre_hooks) == 1
    handle.remove()
    reached[:] = [Net()]  # another model: a constant
    assert torch.equal(fast(x), fast(x))


def test_made_and_used_within_inference_mode() -> None:
    x, y = images()
    model = made(KINDS["a plain network"], torch.float64)
    with torch.inference_mode():
        fast = AttackModel(model)
        inside = pgd(fast, x, y, EPS, ALPHA, STEPS, start="zero")
    assert not any(parameter.is_inference() for parameter in fast.module.parameters())
    torch.testing.assert_close(inside, plain_ce(model, x, y)[0])
    torch.testing.assert_close(pgd(fast, x, y, EPS, ALPHA, STEPS, start="zero"), plain_ce(model, x, y)[0])


def test_docs_have_the_table() -> None:
    assert table() in DOCS.read_text()


def table() -> str:
    """Markdown: kind by kind what a user gets at each entry point; errors as numbered notes."""
    notes: list[str] = []
    rows = [f"| The model | {' | '.join(ENTRIES)} |", "|---" * (len(ENTRIES) + 1) + "|"]
    for name, kind in KINDS.items():
        cells = []
        for entry in ENTRIES:
            said = kind.says(entry)
            if said is not None and said not in notes:
                notes.append(said)
            cells.append("-" if entry in kind.left_out else "same" if said is None else f"({notes.index(said) + 1})")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *(f"{i}. `{note} ...`" for i, note in enumerate(notes, 1))])


if __name__ == "__main__":
    print(table())
