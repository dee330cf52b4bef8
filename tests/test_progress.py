"""What a run shows: a bar in a terminal, a line a minute in a log, and how seldom it asks a GPU for the loss."""

import contextlib
import dataclasses
import fcntl
import io
import os
import re
import struct
import sys
import termios
import types

import pytest
import torch
from conftest import TINY_RUN
from fake_gpu import net

from part_fast.data.memory import Dataset
from part_fast.training import engine as engines
from part_fast.training import epoch as epochs
from part_fast.training import loop, measures, progress, run_folder
from part_fast.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds as this test counts them."""
    time = types.SimpleNamespace(now=1000.0, monotonic=lambda: time.now)
    monkeypatch.setattr(progress, "time", time)
    return time


@contextlib.contextmanager
def terminal(monkeypatch):
    """In the block standard error is a terminal; what was written there since it was read last."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as stream:
        fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows, columns
        monkeypatch.setattr(sys, "stderr", stream)

        def read():
            stream.flush()
            found = b""
            while True:
                try:
                    found += os.read(ours, 65536)
                except BlockingIOError:
                    return found.decode()

        yield read
    os.close(ours)


def test_a_log_gets_a_line_a_minute(clock, monkeypatch):
    """What it says is counted from this start of the run: speed and time that is left too."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines = []
    with Progress(images=1000, done=200, epochs=4, log=lines.append, shown=True) as shown:
        shown.phase(1)
        for i in range(20):
            clock.now += 10
            shown.update(10, 2.5 - i / 10)
        assert lines == [
            "in epoch 2/4: 260 of 1000 images, loss 2, 1 img/s, about 12 min left",
            "in epoch 2/4: 320 of 1000 images, loss 1.4, 1 img/s, about 11 min left",
            "in epoch 2/4: 380 of 1000 images, loss 0.8, 1 img/s, about 10 min left",
        ]
        clock.now += 39
        shown.update(0)
        assert len(lines) == 3
    assert sys.stderr.getvalue() == ""


def test_the_line_has_the_loss_that_was_seen_last(clock, monkeypatch):
    """Where it is asked for seldom; of another epoch it says nothing."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines = []
    with Progress(images=100, done=0, epochs=2, log=lines.append, shown=True) as shown:
        shown.phase(0)
        shown.update(10, 1.5)
        clock.now += 60
        shown.update(10)
        shown.phase(1)
        clock.now += 60
        shown.update(10)
    assert [line.partition(" images")[2] for line in lines] == [
        ", loss 1.5, 0 img/s, about 4 min left",
        ", 0 img/s, about 5 min left",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(clock, monkeypatch):
    lines = []
    with (
        terminal(monkeypatch) as read,
        Progress(images=100, done=20, epochs=3, log=lines.append, shown=True) as shown,
    ):
        shown.phase(0)
        clock.now += 1000
        shown.bar.mininterval = 0
        shown.update(30, 1.25)
        trains = read()
        shown.phase(0, "test")
        tests = read()
    assert re.search(r"\repoch 1/3:  50%\|.*\| 50/100 \[.*, loss 1\.25\]", trains)
    assert re.search(r"\repoch 1/3, test:  50%\|", tests)
    assert lines == []


def test_other_processes_show_nothing(clock, monkeypatch):
    lines = []
    with terminal(monkeypatch) as read:
        for _ in range(2):  # in a terminal, and in a log
            with Progress(images=100, done=0, epochs=1, log=lines.append, shown=False) as shown:
                shown.phase(0)
                clock.now += 100
                shown.update(50, 1.0)
            assert (read(), lines) == ("", [])
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            read = sys.stderr.getvalue


def small(**changes):
    return dataclasses.replace(TINY_RUN, method="at", model="test_resume:Small", augment=True, batch_size=8, **changes)


@pytest.mark.usefixtures("quick_runs")
def test_a_run_in_a_terminal(tmp_path, monkeypatch):
    """Lines and bar do not break each other: each line stands on one of its own."""
    with terminal(monkeypatch) as read:
        loop.train(small(), tmp_path / "run", log=lambda line: loop.tqdm.write(line, file=sys.stderr))
        screen = [part for line in read().split("\n") for part in line.split("\r") if part.strip()]
    assert any(part.startswith("at on demo") for part in screen)
    assert any(re.match(r"epoch 2/2, test: 100%\|.*128/128.*loss \d", part) for part in screen)
    assert len([part for part in screen if re.fullmatch(r"epoch \d/2 at: lr .* img/s", part.strip())]) == 2


@pytest.mark.usefixtures("quick_runs")
def test_a_run_in_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    lines = []
    loop.train(small(epochs=1), tmp_path / "run", log=lines.append)
    assert sys.stderr.getvalue() == ""
    minutes = [line for line in lines if line.startswith("in epoch")]
    assert [re.sub(r"loss [\d.]+, \d+ img/s", "...", line) for line in minutes] == [
        f"in epoch 1/1: {8 * i} of 64 images, ..., about 0 min left" for i in range(1, 9)
    ]


def test_a_gpu_is_asked_for_the_loss_at_every_50th_step_alone(gpu, tmp_path, monkeypatch):
    """On an imagined GPU, which in between waits for nobody; what is not finite is found at the next look."""
    assert epochs.LOOK_EVERY == 50
    monkeypatch.setattr(loop, "LOOK_EVERY", 3)
    looks, real_look, real_step, real_mean = [], loop.refuse_bad_loss, loop.train_step, epochs.Epoch.mean_loss

    def look(epoch, *given):
        gpu.watching = False
        looks.append(epoch.done // 2)
        real_look(epoch, *given)

    def mean(epoch):
        gpu.watching = False  # which waits for the device: at a look alone
        assert looks[-1] == epoch.done // 2
        return real_mean(epoch)

    def step(*given):
        gpu.watching = True
        return real_step(*given)

    monkeypatch.setattr(loop, "refuse_bad_loss", look)
    monkeypatch.setattr(epochs.Epoch, "mean_loss", mean)
    monkeypatch.setattr(loop, "train_step", step)
    # What is beside the steps: where the device and the images are from, what is written and tested.
    data = Dataset(gpu.put(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)), gpu.put(torch.arange(16) % 10),
                   10, tuple("0123456789"), "demo", "train", "")  # fmt: skip
    monkeypatch.setattr(loop, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "imagined")
    monkeypatch.setattr(loop, "load", lambda *given: data)
    monkeypatch.setattr(measures, "evaluation_data", lambda config: data)
    monkeypatch.setattr(engines, "build_model", lambda *given: gpu.put(net(10)))
    monkeypatch.setattr(run_folder, "write_state", lambda *given: None)
    for name in ("export", "draw"):
        monkeypatch.setattr(loop, name, lambda *given: None)
    monkeypatch.setattr(loop, "accuracies", lambda *given: ({"test_natural": 0.5, "test_pgd20": None}, []))
    config = small(device="cuda", epochs=1, train_size=None)
    config = dataclasses.replace(config, model="resnet-small", batch_size=2, precision="fp32", cuda_graph=False)
    lines = []
    loop.train(config, tmp_path / "run", log=lines.append)
    assert looks == [3, 6, 8]  # every third of the eight steps, and all of the epoch at its end
    assert "fp32 on imagined" in lines[0]
    looks.clear()

    def diverged(*given):
        found = step(*given)
        return found._replace(loss=found.loss * float("nan")) if given[5] == 6 else found

    monkeypatch.setattr(loop, "train_step", diverged)
    with pytest.raises(RuntimeError, match="the loss is not finite in step 4, on"):
        loop.train(config, tmp_path / "bad", log=lines.append)
    assert looks == [3, 6]
