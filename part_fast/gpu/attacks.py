"""AttackModel and Engine on a GPU: CUDA graphs, torch.compile and reduced precision give the same attack, follow the
weights, and leave no step waiting for the GPU.

The network is trained for a moment first, so that its gradients mean something. Whatever is captured, compiled or in
reduced precision is compared with the eager attack from the same start, by how many pixels differ and by the loss that
the float32 model has on what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import part_fast
from part_fast import AttackModel, CamBudget, PackedEpsilon, PerturbationBank, fgsm_rs, mma, n_fgsm, pgd, pgi, warm
from part_fast.attacks.ascend import clean_logits
from part_fast.bench.step_cases import settle
from part_fast.budgets.bank import MaskBank
from part_fast.config import TrainConfig
from part_fast.data.catalogue import load
from part_fast.data.memory import draw_augmentation, to_float
from part_fast.gpu import oracle
from part_fast.gpu.record import (
    ALPHA,
    EPS,
    EPS_LOW,
    MissingError,
    Recorder,
    parser,
    require,
    share_differing,
    synchronize,
)
from part_fast.methods import METHODS
from part_fast.training.engine import Engine
from part_fast.training.step import batch_epsilon, train_step

KINDS = ("signs", "single", "agree", "follow", "waits", "train", "compile")
FAST = ("fgsm-rs", "n-fgsm", "pgi", "warm")
# Of an attack whose arithmetic is another: the same algorithm may be chosen otherwise by cuDNN for another memory.
PIXELS_OFF = 0.02
# Beside an attack that is not compiled: six of a hundred pixels of an H100's bf16 attacks, which round otherwise.
COMPILED_OFF = 0.15


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and matrix products in float32 itself, without TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class Checks:
    """A network in a moment's training, a batch that it was not trained on, and the checks of attacks on it."""

    def __init__(self, recorder: Recorder, args: argparse.Namespace) -> None:
        self.recorder, self.device, self.dry = recorder, recorder.device, recorder.dry
        self.name, self.batch, self.steps = args.model, args.batch, args.steps
        self.graphs = self.device.type == "cuda"
        if self.dry:
            draw = torch.Generator().manual_seed(0)
            self.images = torch.randint(0, 256, (12 * self.batch, 3, 32, 32), dtype=torch.uint8, generator=draw)
            self.labels = torch.randint(0, 10, (len(self.images),), generator=draw)
        else:
            data = load("demo", "train").to(self.device)
            self.images, self.labels = data.images, data.labels
        self.model = self.trained(args.train_steps)
        self.x, self.y = to_float(self.images[-self.batch :]), self.labels[-self.batch :]
        self.kept: dict[tuple[str, bool, bool], AttackModel] = {}
        self.found: dict[tuple[Any, ...], Tensor] = {}
        natural = self.strength(self.x)[1]
        recorder.value("the network", natural=natural, backend=part_fast.current_backend(self.device))

    def engine(self, **changed: Any) -> Engine:
        """An Engine of the network, seeded, in train mode; `changed` fields of its configuration."""
        given: dict[str, Any] = {"precision": "fp32", "cuda_graph": False, "compile": False, **changed}
        given["cuda_graph"] = given["cuda_graph"] and self.graphs
        torch.manual_seed(0)
        config = TrainConfig(model=self.name, batch_size=self.batch, lr=0.05, steps=self.steps, **given)
        engine = Engine(config, 10, self.device)
        settle(engine.model, to_float(self.images[: self.batch]))
        engine.model.train()
        return engine

    def trained(self, steps: int) -> nn.Module:
        engine = self.engine()
        order = torch.randperm(len(self.images) - self.batch, device=self.device)
        loss = torch.zeros(())
        for i in range(steps):
            at = order[i * self.batch % (len(order) - self.batch) :][: self.batch]
            x, y = to_float(self.images[at]), self.labels[at]
            loss = train_step(engine, "at", x, y, EPS).loss
        require(torch.isfinite(loss), f"the loss is {loss}")
        model: nn.Module = engine.model.eval().requires_grad_(False)
        return model

    def attack_model(self, precision: str, compile: bool = False, graph: bool = False) -> AttackModel:
        """A copy of the network to attack, made once."""
        key = (precision, compile, graph)
        if key not in self.kept:
            graph = graph and self.graphs
            self.kept[key] = AttackModel(self.model, precision=precision, compile=compile, cuda_graph=graph)
        return self.kept[key]

    def start(self, x: Tensor) -> Tensor:
        return (x + (2 * torch.rand_like(x) - 1) * EPS).clamp(0, 1)

    def strength(self, x_adv: Tensor) -> tuple[float, float]:
        """(cross-entropy, accuracy) of the float32 network on the batch in that form."""
        logits = clean_logits(self.model, x_adv)
        return float(F.cross_entropy(logits, self.y)), float((logits.argmax(1) == self.y).float().mean())

    def attack(self, model: nn.Module, x: Tensor | None = None, **given: Any) -> Tensor:
        x = self.x if x is None else x
        return pgd(model, x, self.y[: len(x)], given.pop("eps", EPS), ALPHA, self.steps, **given)

    # --- the same attack ----------------------------------------------------------------------------------------------

    def signs(self, precision: str) -> None:
        """Signs of the input gradient beside those of float32 without TF32."""

        def gradient(of: nn.Module) -> Tensor:
            leaf = self.x.clone().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(F.cross_entropy(of(leaf).float(), self.y, reduction="sum"), leaf)[0]

        with full_float32():
            right = gradient(self.model)
        got = gradient(self.attack_model(precision))
        same = float((got.sign() == right.sign()).float().mean())
        tf32 = torch.backends.cudnn.allow_tf32 and self.device.type == "cuda"
        name = "fp32 (TF32)" if precision == "fp32" and tf32 else precision
        self.recorder.value(f"signs of {name}", same=same, zeros=float((got == 0).float().mean()))
        require(not got.isnan().any(), "NaN in the gradient")

    def budgets(self) -> dict[str, float | Tensor | PackedEpsilon]:
        """Eps in every form that attacks tell apart."""
        draw = torch.Generator().manual_seed(2)
        mask = (torch.rand(self.batch, 1, 32, 32, generator=draw) < 0.3).to(self.device)
        dense = torch.where(mask, EPS, EPS_LOW)
        return {"float": EPS, "tensor": dense, "packed": PackedEpsilon.pack(mask, EPS, EPS_LOW)}

    def agree(self, compile: bool = False) -> None:
        """Every way of computing the attack, for every form of eps and every loss, from one start."""
        ways = [("fp32", False, False), ("fp32", False, True), ("bf16", False, False), ("bf16", False, True)]
        if self.device.type == "cuda":
            ways.append(("fp16", False, True))
        if compile:
            ways = [("bf16", True, False), ("bf16", True, True)]
        torch.manual_seed(1)
        start = self.start(self.x)
        for form, eps in self.budgets().items():
            for loss in ("ce", "kl", "margin") if form == "float" else ("ce",):
                right = self.attack(self.model, eps=eps, start=start, loss=loss)
                if not compile:  # then it has been said
                    cross_entropy, accuracy = self.strength(right)
                    self.recorder.value(f"agree, the network itself, {form} {loss}", ce=cross_entropy, robust=accuracy)
                for way in ways:
                    name = f"agree, {_named(*way)}, {form} {loss}"
                    self.recorder.case(name, self.same, name, way, eps, form, loss, start, right, quiet=True)

    def same(
        self, name: str, way: tuple[str, bool, bool], eps: Any, form: str, loss: str, start: Tensor, right: Tensor
    ) -> None:
        """One way of computing one attack: in its ball, as strong as the eager one, a graph the same as without."""
        fast = self.attack_model(*way)
        first, second = (self.attack(fast, eps=eps, start=start, loss=loss) for _ in range(2))
        bound = eps.dense() if isinstance(eps, PackedEpsilon) else eps
        require(((first - self.x).abs() <= bound + 1e-6).all(), "left its ball")
        require(((first >= 0) & (first <= 1)).all(), "left [0,1]")
        cross_entropy, accuracy = self.strength(first)
        values = {"ce": cross_entropy, "robust": accuracy, "off": share_differing(first, right)}
        values["run_to_run"] = share_differing(first, second)
        precision, compiled, graph = way
        eager = self.found.get((precision, compiled, form, loss))
        if not graph:
            self.found[precision, compiled, form, loss] = first
        elif eager is not None:
            values["off_without_graph"] = share_differing(first, eager)
        self.recorder.value(name, **values)
        due = self.strength(right)[0] * (0.97 if precision == "fp32" else 0.9)
        require(cross_entropy >= due, f"a weaker attack: cross-entropy {cross_entropy:.4f}, at least {due:.4f} was due")
        off = values.get("off_without_graph", 0.0)
        require(off <= PIXELS_OFF, f"{off:.3g} of the pixels are not those without a graph")

    def follow(self, precision: str, compile: bool) -> None:
        """A captured attack reads the weights where they are: after an update it is the eager one on the new ones."""
        model = copy.deepcopy(self.model).requires_grad_(True)
        fast = AttackModel(model, precision=precision, compile=compile, cuda_graph=self.graphs)
        # Compiled, one copy serves all steps, since compiling takes long; else a new one each time.
        kept = AttackModel(model, precision=precision, compile=True) if compile else None
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        start, before = self.start(self.x), None
        for step in range(3):
            got = self.attack(fast, start=start)
            off = share_differing(got, self.attack(kept or AttackModel(model, precision=precision), start=start))
            moved = 1.0 if before is None else share_differing(got, before)
            name = f"follow, {_named(precision, compile, True)}, step {step}"
            self.recorder.value(name, off=off, moved=moved)
            require(off <= PIXELS_OFF, f"{off:.3g} of the pixels are those of other weights")
            require(moved > PIXELS_OFF or self.dry, "the attack does not follow the weights")
            before = got
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(got), self.y).backward()
            optimizer.step()
            model.eval()
        captured = 0 if fast.graphs is None else len(fast.graphs)
        require(captured == int(self.graphs), f"{captured} graphs captured")
        short = self.x[: self.batch // 2 + 1]  # as the last batch of an epoch
        eager = self.attack(AttackModel(model, precision=precision), short, start=start[: len(short)])
        off = share_differing(self.attack(fast, short, start=start[: len(short)]), eager)
        self.recorder.value(f"follow, {_named(precision, compile, True)}, a short batch", off=off)
        # Not beside a compiled one, as above: for another batch it would be compiled again.
        require(off <= (COMPILED_OFF if compile else PIXELS_OFF), f"{off:.3g} of a short batch's pixels")

    # --- single questions ---------------------------------------------------------------------------------------------

    def random_starts(self) -> None:
        """Two draws are two starts, and a seed repeats them, also where the steps are captured."""
        fast = self.attack_model("bf16", False, True)
        torch.manual_seed(3)
        first, second = self.attack(fast), self.attack(fast)
        torch.manual_seed(3)
        again = self.attack(fast)
        # Most pixels end on their bound, wherever they began: on an H100 fewer than 0.3 differ.
        drawn, repeated = share_differing(first, second), share_differing(first, again)
        self.recorder.value("random starts", two_draws_off=drawn, one_seed_off=repeated)
        require(drawn > PIXELS_OFF, f"two draws are one start: {drawn:.3g} of the pixels differ")
        require(repeated <= PIXELS_OFF, f"a seed does not repeat: {repeated:.3g} of the pixels differ")

    def minimum_margin(self) -> None:
        """mma with and without a graph."""
        few = min(32, self.batch)
        results = []
        for graph in (True, False):
            model = self.attack_model("bf16", False, graph)
            results.append(mma(model, self.x[:few], self.y[:few], EPS, ALPHA, min(4, self.steps), start="zero"))
        off = share_differing(*results)
        require(off <= 0.03, f"{off:.3g} of the pixels are not those without a graph")

    def oracle_attack(self) -> None:
        """pgd, captured, in float32 without TF32, beside the oracle's loop."""
        few = min(16, self.batch)
        x, y = self.x[:few], self.y[:few]
        start = self.start(x)
        with full_float32():
            wanted = oracle.pgd(self.model, x, y, EPS, start, self.steps, ALPHA)
            fast = AttackModel(self.model, cuda_graph=self.graphs)
            got = pgd(fast, x, y, EPS, ALPHA, self.steps, start=start)
        off = float(((got - wanted).abs() > 1e-6).float().mean())
        self.recorder.value("pgd beside the oracle", off=off)
        require(off <= PIXELS_OFF, f"{off:.3g} of the pixels are not the oracle's")

    def fast(self, name: str) -> None:
        """A fast attack twice in a row, captured and not: the same images, and what the bank keeps."""
        found: list[Tensor] = []
        banks: list[Tensor] = []
        for graph in (False, True):
            model = self.attack_model("bf16", False, graph)
            bank = PerturbationBank(self.batch, self.x.shape[1:], EPS, self.device, seed=1)
            view = bank.at(torch.arange(self.batch, device=self.device), None)
            torch.manual_seed(4)
            for _ in range(2):
                if name == "warm":
                    got = warm(model, self.x, self.y, EPS, ALPHA, 2, start=view)
                elif name == "pgi":
                    got = pgi(model, self.x, self.y, EPS, start=view)
                else:
                    got = (fgsm_rs if name == "fgsm-rs" else n_fgsm)(model, self.x, self.y, EPS)
            found.append(got)
            banks.append(bank.values)
        cross_entropy, accuracy = self.strength(found[1])
        off = share_differing(*found)
        self.recorder.value(f"fast, {name}", ce=cross_entropy, robust=accuracy, off=off)
        reach = 3 if name == "n-fgsm" else 1
        require((found[1] - self.x).abs().max() <= reach * EPS + 1e-6, "left its ball")
        require(cross_entropy > self.strength(self.x)[0], "it does not attack")
        require(off <= PIXELS_OFF, f"{off:.3g} of the pixels are not those without a graph")
        kept = share_differing(*banks)
        require(kept <= PIXELS_OFF, f"{kept:.3g} of the bank's values are not those without a graph")

    def fast_formula(self) -> None:
        """pgi, captured, in float32 without TF32, beside the published formula; and what it keeps of it."""
        few = min(16, self.batch)
        x, y = self.x[:few], self.y[:few]
        bank = PerturbationBank(few, x.shape[1:], EPS, self.device, seed=1)
        begin = (x + bank.values * (EPS / 127)).clamp(0, 1)
        with full_float32():
            leaf = begin.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(leaf), y, reduction="sum"), leaf)
            wanted = (x + (begin + EPS * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
            view = bank.at(torch.arange(few, device=self.device), None)
            got = pgi(AttackModel(self.model, cuda_graph=self.graphs), x, y, EPS, start=view)
        off = float(((got - wanted).abs() > 1e-6).float().mean())
        kept = float((bank.values - (got - x) * (127 / EPS)).abs().max())
        self.recorder.value("pgi beside the formula", off=off, kept=kept)
        require(off <= PIXELS_OFF, f"{off:.3g} of the pixels are not the formula's")
        require(kept <= 0.5 + 1e-3, f"the bank is off by {kept:.3g} of its unit")

    def oracle_masks(self) -> None:
        """CamBudget, rule released, beside the oracle's activations, gradients and masks."""
        if not hasattr(self.model, "layer4"):
            raise MissingError(f"{self.name} has no layer4")
        x = self.x[: min(32, self.batch)]
        model = copy.deepcopy(self.model).requires_grad_(True)  # the oracle takes its graph from the parameters
        with full_float32():
            eps = CamBudget(self.model, EPS, EPS_LOW, rule="released")(x).cpu()
            activation, gradient = oracle.activation_and_gradient(model, model.get_submodule("layer4"), x)
        maps = oracle.cam(activation.cpu(), gradient.cpu()).float()
        wanted = torch.stack([oracle.released_mask(oracle.normalised(one), (32, 32)) for one in maps])
        mask = eps > (EPS + EPS_LOW) / 2
        off = share_differing(mask, wanted)
        self.recorder.value("masks beside the oracle", off=off, kept=float(mask.float().mean()))
        require(off <= 0.01, f"{off:.3g} of the mask values are not the oracle's")

    def another_stream(self) -> None:
        """A captured attack on a side stream."""
        if self.device.type != "cuda":
            raise MissingError("needs a CUDA device")
        fast = self.attack_model("bf16", False, True)
        wanted = self.attack(fast, start="zero")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = self.attack(fast, start="zero")
        side.synchronize()
        require(share_differing(got, wanted) <= PIXELS_OFF, "another result on a side stream")

    def returns_at_once(self) -> None:
        """Milliseconds until a captured attack returns, and until it is done."""
        fast = self.attack_model("bf16", False, True)
        self.attack(fast, start="zero")
        synchronize(self.device)
        begin = time.perf_counter()
        self.attack(fast, start="zero")
        host = time.perf_counter() - begin
        synchronize(self.device)
        done = time.perf_counter() - begin
        self.recorder.value("a captured attack", returns_ms=1e3 * host, done_ms=1e3 * done)

    # --- training steps -----------------------------------------------------------------------------------------------

    def waits(self, title: str) -> None:
        """No wait for the GPU in a step, by torch's own alarm."""
        if self.device.type != "cuda":
            raise MissingError("needs a CUDA device")
        step = self.step_of(title)
        for i in range(2):
            step(i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def step_of(self, title: str) -> Any:
        """step(i), a whole training step on the i-th batch from stored images: of a method, "part bank", "ema", or PART
        with a fast attack."""
        method = {"part bank": "part", "ema": "at", **dict.fromkeys(FAST, "part")}.get(title, title)
        changed: dict[str, Any] = {"average": "ema:0.999"} if title == "ema" else {}
        if title in FAST:
            changed |= {"attack": title}
        engine = self.engine(precision="bf16", cuda_graph=True, **changed)
        bank = kept = None
        if title in ("pgi", "warm"):
            kept = PerturbationBank(len(self.images), self.images.shape[1:], EPS, self.device)
        if title == "part bank":
            bank = MaskBank(len(self.images), (32, 32), engine.budget.channels, EPS, EPS_LOW, self.device)

        def step(i: int) -> Tensor:
            indices = torch.arange(i * self.batch, (i + 1) * self.batch, device=self.device)
            drawn = draw_augmentation(self.batch, device=self.device)
            x = drawn.apply(self.images[indices])
            epsilon = batch_epsilon(method, engine.budget, bank, indices, drawn, engine.config)
            view = None if kept is None else kept.at(indices, drawn)
            return train_step(engine, method, x, self.labels[indices], epsilon, view=view).loss

        return step

    def train(self, method: str, compile: bool = False) -> None:
        """Three steps in bf16 with graphs: finite, and the first loss is that of the eager float32 engine."""
        ways: dict[str, dict[str, Any]] = {"fp32": {}, "bf16 graph": {"precision": "bf16", "cuda_graph": True}}
        if compile:
            ways = {"fp32": {}, "bf16 compile graph": {"precision": "bf16", "cuda_graph": True, "compile": True}}
        losses: dict[str, list[float]] = {}
        for way, changed in ways.items():
            engine = self.engine(**changed)
            losses[way] = []
            for i in range(1 if self.dry else 3):
                torch.manual_seed(10 + i)
                at = slice(i * self.batch, (i + 1) * self.batch)
                x, y = to_float(self.images[at]), self.labels[at]
                epsilon = batch_epsilon(method, engine.budget, None, None, None, engine.config)  # type: ignore[arg-type]
                losses[way].append(float(train_step(engine, method, x, y, epsilon).loss))
        self.recorder.value(f"losses of {method}", **{way: _rounded(values) for way, values in losses.items()})
        right = losses["fp32"][0]
        for way, values in losses.items():
            require(all(math.isfinite(value) and abs(value) < 1e4 for value in values), f"{way}: {values}")
            require(abs(values[0] / right - 1) < 0.05, f"{way}: first loss {values[0]:.4f}, in fp32 {right:.4f}")


def _rounded(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _named(precision: str, compile: bool, graph: bool) -> str:
    return f"{precision}{' compile' if compile else ''}{' graph' if graph else ''}"


def main(arguments: list[str] | None = None) -> int:
    """All checks, what needs a compiler last."""
    flags = parser(__doc__)
    flags.add_argument("--model", help="default: resnet18, on a dry run resnet-small")
    flags.add_argument("--batch", type=int, help="default: 128, on a dry run 4")
    flags.add_argument("--kinds", default=",".join(KINDS))
    args = flags.parse_args(arguments)
    dry = args.dry_run
    args.model = args.model or ("resnet-small" if dry else "resnet18")
    args.batch = args.batch or (4 if dry else 128)
    args.steps, args.train_steps = (2, 2) if dry else (10, 60)
    kinds = set(args.kinds.split(","))
    recorder = Recorder("attacks", args)
    checks = recorder.case("train a network", Checks, recorder, args)
    if checks is None:
        return recorder.code
    cuda = recorder.device.type == "cuda"
    if "signs" in kinds:
        for precision in ("fp32", "bf16", "fp16") if cuda else ("fp32", "bf16"):
            recorder.case(f"signs of {precision}", checks.signs, precision)
    if "single" in kinds:
        recorder.case("random starts", checks.random_starts)
        recorder.case("mma", checks.minimum_margin)
        recorder.case("pgd beside the oracle", checks.oracle_attack)
        for name in FAST:
            recorder.case(f"fast, {name}", checks.fast, name)
        recorder.case("pgi beside the formula", checks.fast_formula)
        recorder.case("masks beside the oracle", checks.oracle_masks)
        recorder.case("another stream", checks.another_stream)
        recorder.case("returns at once", checks.returns_at_once)
    if "agree" in kinds:
        checks.agree()
    if "follow" in kinds:
        for precision in ("bf16", "fp32"):
            recorder.case(f"follow, {precision}", checks.follow, precision, False)
    if "waits" in kinds:
        for title in (*METHODS, "part bank", "ema", *FAST):
            recorder.case(f"no wait in a step of {title}", checks.waits, title)
    if "train" in kinds:
        for method in METHODS:
            recorder.case(f"train {method}", checks.train, method)
    if "compile" in kinds and recorder.dry:
        recorder.skip("compile", "takes long: not on a dry run")
    elif "compile" in kinds:
        checks.agree(compile=True)
        recorder.case("follow, bf16 compile", checks.follow, "bf16", True)
        for method in ("at", "part"):
            recorder.case(f"train {method}, compiled", checks.train, method, True)
    if cuda:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        recorder.value("memory", allocated_gb=allocated / 1e9, reserved_gb=reserved / 1e9)
    return recorder.code


if __name__ == "__main__":
    sys.exit(main())
