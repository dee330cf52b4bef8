"""Two processes under torchrun train what one does on batches of twice the size; each writes nothing twice."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from part_fast import distributed
from part_fast.config import TrainConfig
from part_fast.data.catalogue import load
from part_fast.training.epoch import epoch_order

# BatchNorm would normalise a batch by the share that each process sees, and starts are drawn by each for its own.
WORK = """
    import atexit
    import sys
    import torch
    from part_fast.config import TrainConfig
    from part_fast.evaluation import trained
    from part_fast.evaluation.accuracy import evaluate
    from part_fast.training import engine
    from part_fast.training.loop import train
    from pathlib import Path

    def threads():
        return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

    atexit.register(lambda: print("threads at the end:", threads(), flush=True))

    class Plain(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            conv = lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1, stride=2)
            self.layer4 = torch.nn.Sequential(conv(3, 8), torch.nn.ReLU(), conv(8, 16), torch.nn.ReLU())
            self.linear = torch.nn.Linear(16, classes)

        def forward(self, x):
            return self.linear(self.layer4(x).mean((2, 3)))

    engine.build_model = trained.build_model = lambda name, classes: Plain(classes)
    draw = torch.randn_like
    torch.randn_like = lambda x, **k: torch.zeros_like(x)
    sys.modules["part_fast.attacks.pgd"].starting_point = lambda x, *rest: x.clone()
    torch.randperm = lambda n, **k: torch.arange(n)
    out, config = Path(sys.argv[1]), TrainConfig(**eval(sys.argv[2]))
    rows = train(config, out, log=print)
    evaluate(out, ("natural", "pgd20"), batch_size=7)
"""
SETTINGS = {
    "method": "part", "epochs": 2, "warmup_epochs": 1, "train_size": 80, "test_size": 40, "steps": 2, "lr": 0.1,
    "augment": False, "pgd_test_size": 20, "lr_drops": (), "device": "cpu",
}  # fmt: skip


def run(folder, processes, tmp_path, **changes):
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(WORK))
    settings = {**SETTINGS, **changes}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, *launcher, str(script), str(folder), repr(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Gloo's would let go of their last tensors later, and abort the process where the interpreter is gone by then.
    ends = re.findall(r"threads at the end: \['.*", done.stdout)  # the main one at least
    assert len(ends) == processes
    assert not any("gloo" in line for line in ends), ends
    return done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "part-t", "beta": 2.0, "accumulate": 2, "average": "ema:0.5", "refresh": "1", "schedule": "cosine"},
        {"method": "at", "accumulate": 2, "awp": 0.02, "label_smoothing": 0.1, "nesterov": True, "average": "ema:0.5"},
    ],
    ids=["part", "part-t, accumulated, averaged, mask bank", "AWP, smoothed labels, Nesterov"],
)
def test_two_processes_train_what_one_does_on_batches_of_twice_the_size(changes, tmp_path):
    one = run(tmp_path / "one", 1, tmp_path, batch_size=16, **changes)
    two = run(tmp_path / "two", 2, tmp_path, batch_size=8, **changes)
    assert one.count("epoch 1/2") == two.count("epoch 1/2") == 1, "one process speaks"
    for name in ("model.safetensors", *(["averaged.safetensors"] if "average" in changes else [])):
        single, shared = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
        for key, value in single.items():
            # Gradients are summed in another order; what rounding does to a sign moves a pixel of many.
            torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-5)
    rows = [(tmp_path / folder / "metrics.csv").read_text().splitlines() for folder in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 3
    for line, other in zip(*(table[1:] for table in rows), strict=True):
        fields, others = line.split(",")[3:7], other.split(",")[3:7]  # loss and the accuracies
        assert [float(v) for v in others] == pytest.approx([float(v) for v in fields], rel=1e-3)
    results = [json.loads((tmp_path / folder / "evaluation.json").read_text())["results"] for folder in ("one", "two")]
    assert {k: v["correct"] for k, v in results[0].items()} == {k: v["correct"] for k, v in results[1].items()}
    images = [load_file(tmp_path / folder / "evaluation_images.safetensors") for folder in ("one", "two")]
    assert all(torch.equal(value, images[1][key]) for key, value in images[0].items())
    if "refresh" in changes:
        masks = [torch.load(tmp_path / f / "training_state.pt", weights_only=True)["masks"] for f in ("one", "two")]
        assert masks[0].any()
        # Of 80 masks of 1,024 pixels: those at their threshold may fall otherwise.
        differing = (masks[0] ^ masks[1]).count_nonzero() / masks[0].numel()
        assert differing < 0.02


AVERAGES = """
    import torch
    import torch.distributed as dist
    from part_fast import distributed
    from part_fast.config import TrainConfig
    from part_fast.training.engine import Engine
    from part_fast.training.step import train_step

    def main(average, device):
        config = TrainConfig(method="at", average=average, batch_size=8, steps=1, lr=0.1, device="cpu")
        torch.manual_seed(0)
        engine = Engine(config, 10, device)
        torch.manual_seed(distributed.rank())
        for epoch in range(2):
            for i in range(3):
                x, y = torch.rand(8, 3, 16, 16) ** (1 + distributed.rank()), torch.randint(0, 10, (8,))
                engine.model.train()
                train_step(engine, "at", x, y, 8 / 255, 8 * i, 24, epoch)
            engine.end_epoch(epoch)
        x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        for model in (engine.model, engine.averaged):
            for tensor in (*model.parameters(), *model.buffers(), model.eval()(x)):
                first = tensor.detach().clone()
                dist.broadcast(first, 0)
                assert torch.equal(first, tensor), (average, tensor.shape, (first - tensor).abs().max())

    device = distributed.join(torch.device("cpu"))
    for average in ("ema:0.5", "swa:1"):
        main(average, device)
    print("alike", flush=True)
"""


def test_the_averaged_model_is_one_in_every_process(tmp_path):
    script = tmp_path / "averages.py"
    script.write_text(textwrap.dedent(AVERAGES))
    root = os.path.dirname(os.path.dirname(__file__))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("alike") == 2


def test_an_epoch_is_shared_evenly_and_wholly(monkeypatch):
    import part_fast.distributed as distributed
    from part_fast.training.epoch import epoch_order

    monkeypatch.setattr(distributed, "same_", lambda value: value.copy_(torch.arange(len(value)).flip(0)))
    monkeypatch.setattr(distributed, "size", lambda: 3)
    orders = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        orders.append(epoch_order(10, TrainConfig(), 0))
    assert [len(order) for order in orders] == [4, 4, 4], "or one would wait for the others for ever"
    together = torch.stack(orders, 1).flatten()
    assert together.tolist() == [*range(9, -1, -1), 9, 8]


def test_the_demo_set_has_what_is_tested_here():
    assert len(load("demo", "train")) >= SETTINGS["train_size"]
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= set(SETTINGS)


class Group:
    """In the place of torch's processes, two: each kind of tensor goes by its backend, or not at all."""

    def __init__(self, monkeypatch, present=None):
        self.by, self.sent = present, []
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
        for name, value in {
            "is_initialized": lambda: self.by is not None,
            "init_process_group": lambda by: setattr(self, "by", by),
            "get_backend_config": lambda: self.by,
            "get_world_size": lambda: 2,
            "get_rank": lambda: 1,
            "broadcast": lambda value, source: self.send(value),
            "all_reduce": self.send,
            "barrier": lambda: self.send(torch.zeros(1)),
        }.items():
            monkeypatch.setattr(distributed.dist, name, value)

    def send(self, value):
        backends = dict(pair.split(":") for pair in self.by.split(",") if ":" in pair) or {"cuda": self.by}
        if value.device.type not in backends:
            raise RuntimeError(f"No backend type associated with device type {value.device.type}")
        self.sent.append((value.device.type, backends[value.device.type]))


def test_cpu_and_gpu_tensors_each_have_their_way(gpu, monkeypatch):
    """An epoch's order is broadcast from the CPU, sums and statistics from the GPU."""
    group = Group(monkeypatch)
    assert distributed.join(torch.device("cuda")) == torch.device("cuda", 1)
    order = epoch_order(9, TrainConfig(), 0)
    assert len(order) == 5
    distributed.barrier()
    distributed.sum_(gpu.put(torch.zeros(())))
    distributed.same_(gpu.put(torch.zeros(3, dtype=torch.int64)))
    assert group.sent == [("cpu", "gloo"), ("cpu", "gloo"), ("cuda", "nccl"), ("cuda", "nccl")]


def test_processes_on_cpus_need_no_nccl(monkeypatch):
    group = Group(monkeypatch)
    assert distributed.join(torch.device("cpu")) == torch.device("cpu")
    epoch_order(9, TrainConfig(), 0)
    assert group.sent == [("cpu", "gloo")]


@pytest.mark.parametrize(("device", "present"), [("cuda", "cuda:nccl"), ("cuda", "cpu:gloo"), ("cpu", "cuda:nccl")])
def test_a_group_that_lacks_a_way_is_refused(device, present, monkeypatch):
    Group(monkeypatch, present)
    with pytest.raises(ValueError, match=f"the process group must take .* tensors, such as .*, got '{present}'"):
        distributed.join(torch.device(device))
