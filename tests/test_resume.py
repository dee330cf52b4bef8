"""A run that is killed goes on as if nothing had happened: at any moment, by any signal, from damaged states too."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY_RUN

from part_fast.config import read_config
from part_fast.evaluation.sanity import gradient_agreement
from part_fast.methods import METHODS
from part_fast.training import checkpoint, loop, run_folder
from part_fast.training.checkpoint import PREVIOUS, STATE, read_state, write_state
from part_fast.training.loop import train
from part_fast.training.run_folder import WEIGHTS

TINY = dataclasses.replace(
    TINY_RUN, method="at", epochs=3, train_size=27, batch_size=8, test_size=10, warmup_epochs=1, augment=True
)
# All methods; averages, kept masks, accumulated batches, controls and validation among them.
CASES = {
    "at, EMA": {"method": "at", "average": "ema:0.8"},
    "part, masks kept, accumulated": {"method": "part", "refresh": "1", "accumulate": 2},
    "trades, validation": {"method": "trades", "validation": 5, "train_size": 32},
    "part-t, masks kept for 2, SWA": {"method": "part-t", "refresh": "2", "average": "swa:2", "epochs": 4},
    "mart, MMA": {"method": "mart", "attack": "mma", "schedule": "cosine"},
    "part-m, permuted, skip": {"method": "part-m", "control": "permuted", "on_nonfinite": "skip"},
}


def silent(line):
    pass


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


# --- processes that are killed ----------------------------------------------------------------------------------------

# Imports everything once, and then makes a process for each line that it reads: no thread has started when it forks.
NURSERY = """
    import functools, json, os, sys
    import torch
    from part_fast import cli
    from part_fast.config import TrainConfig
    from part_fast.data.catalogue import load
    from part_fast.evaluation import trained
    from part_fast.report import figures
    from part_fast.training import loop
    from pathlib import Path

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    loop.load = trained.load = functools.lru_cache(load)
    loop.load("demo", "train", None, False), loop.load("demo", "test", None, False)
    figures.draw_curves = lambda path, rows, title: path.write_bytes(b"drawn")
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = open(task["log"], "w", buffering=1)
            code = 1
            try:
                if "arguments" in task:
                    code = cli.main(task["arguments"])
                else:
                    config = TrainConfig.from_json(task["config"], "the test")
                    loop.train(config, Path(task["out"]), resume=task["resume"], save_every=task["save_every"], log=print)
                    code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                print(type(error).__name__, error)
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Starts runs in processes of their own."""

    def __init__(self, folder):
        script = folder / "nursery.py"
        script.write_text(textwrap.dedent(NURSERY))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.log = folder / "log"
        assert self.process.stdout.readline() == "ready\n"

    def start(self, **task):
        self.process.stdin.write(json.dumps({"log": str(self.log), **task}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """The exit code of the process; the signal's number, negative, that ended it."""
        return int(self.process.stdout.readline())

    def train(self, config, out, *, save_every=0.0, kill_after=None, by=signal.SIGKILL):
        """A run, or the rest of one; its exit code, and how long it took."""
        resume = (out / "config.json").is_file()
        begin = time.monotonic()
        pid = self.start(config=config.to_json(), out=str(out), resume=resume, save_every=save_every)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, by)  # not waited for yet, so nobody else has its number
        return self.end(), time.monotonic() - begin


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.process.stdin.close()
    made.process.wait(30)


def contents(folder):
    """All that a run leaves, but for times: tensors by name, numbers, texts."""
    state = torch.load(folder / STATE, weights_only=True)
    (process,) = state.pop("processes")
    times = ("seconds", "images_per_second")
    rows = [{key: value for key, value in row.items() if key not in times} for row in state.pop("rows")]
    with (folder / "metrics.csv").open(newline="") as file:
        table = [{key: value for key, value in row.items() if key not in times} for row in csv.DictReader(file)]
    assert len(table) == len(rows)
    found = {"rows": rows, "table": table, "state": state, "process": {**process, "seconds": 0}}
    for path in folder.glob("*.safetensors"):
        found[path.name] = path.read_bytes()
    return found


def assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def test_cases_are_all_methods():
    assert {case["method"] for case in CASES.values()} == set(METHODS)


def killed_and_resumed(nursery, config, folder, kills, moments, intervals):
    """How many kills hit a run that was under way; at the end it is what it would have been."""
    code, seconds = nursery.train(config, folder / "whole", save_every=0.0)
    assert code == 0, nursery.log.read_text()
    out, hit = folder / "killed", 0
    while hit < kills:
        interval = next(intervals)
        code, _ = nursery.train(config, out, save_every=interval, kill_after=seconds * moments.uniform(0.02, 0.9))
        assert code in (0, -signal.SIGKILL), nursery.log.read_text()
        hit += code == -signal.SIGKILL
        if code == 0:  # it was done before; another life begins
            assert_same(contents(out), contents(folder / "whole"))
            shutil.rmtree(out)
    code, _ = nursery.train(config, out)
    assert code == 0, nursery.log.read_text()
    assert_same(contents(out), contents(folder / "whole"))
    left = {path.name for path in out.iterdir()} ^ {path.name for path in (folder / "whole").iterdir()}
    assert not {name for name in left if not name.endswith(".tmp")}
    return hit


@pytest.mark.parametrize("case", ["part, masks kept, accumulated", "at, EMA"])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(case, nursery, tmp_path):
    moments = random.Random(case)
    assert killed_and_resumed(nursery, tiny(**CASES[case]), tmp_path, 2, moments, itertools.repeat(0.0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_many_random_moments(case, nursery, tmp_path):
    """Six methods, ten kills each, with states after every update, every 60 ms, and at the ends of epochs alone."""
    moments = random.Random(f"{case}, many")
    intervals = itertools.cycle([0.0, 0.001, 0.0, 10.0])
    hit = killed_and_resumed(nursery, tiny(**CASES[case]), tmp_path, 10, moments, intervals)
    print(f"{case}: {hit} kills, the same bits")


# --- the same, at every update, in this process -----------------------------------------------------------------------


class Killed(BaseException):
    """No handler of the run catches it."""


def cut(monkeypatch, config, out, at, saves, **how):
    """Train, and stop before the batch number `at`; states are saved at the updates of `saves` alone, counted from 1."""
    done, real = itertools.count(), loop.train_step

    def counted(*arguments):
        if next(done) == at:
            raise Killed
        return real(*arguments)

    updates = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", counted)
        patch.setattr(run_folder.Checkpoints, "due", property(lambda self: next(updates) in saves))
        with contextlib.suppress(Killed):
            train(config, out, log=silent, **how)


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("case", CASES)
def test_stopped_in_mid_epoch_a_run_ends_as_if_it_had_not_been(case, tmp_path, monkeypatch):
    """From a state of some batches before, twice, in other epochs."""
    config = tiny(**CASES[case])
    train(config, tmp_path / "whole", log=silent)
    cut(monkeypatch, config, tmp_path / "cut", 6, saves=(1, 4))
    torch.manual_seed(12345)
    cut(monkeypatch, config, tmp_path / "cut", 5, saves=(3,), resume=True)
    torch.manual_seed(54321)
    train(config, tmp_path / "cut", resume=True, log=silent)
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))


@pytest.mark.usefixtures("quick_runs")
def test_reduced_precision_and_rows_beyond_the_state(tmp_path, monkeypatch):
    """The agreement that was measured at the epoch's begin is kept, and rows that the state does not know are not."""
    config = tiny(precision="bf16", epochs=2)
    calls = []
    monkeypatch.setattr(loop, "gradient_agreement", lambda *given: calls.append(1) or gradient_agreement(*given))
    train(config, tmp_path / "whole", log=silent)
    cut(monkeypatch, config, tmp_path / "cut", 2, saves=(1,))
    (tmp_path / "cut" / "metrics.csv").write_text("epoch\n1\n2\n3\n")
    train(config, tmp_path / "cut", resume=True, log=silent)
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))
    assert len(calls) == 4


@pytest.mark.usefixtures("quick_runs")
def test_stopped_while_it_tests_a_run_trains_no_epoch_twice(tmp_path, monkeypatch):
    config = tiny(average="swa:1", epochs=2)
    train(config, tmp_path / "whole", log=silent)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accuracies", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", log=silent)
    trained, real = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *given: trained.append(given[-1]) or real(*given))
    train(config, tmp_path / "cut", resume=True, log=silent)
    assert set(trained) == {1}
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))


@pytest.mark.usefixtures("quick_runs")
def test_init_is_not_forgotten_in_the_first_epoch(tmp_path, monkeypatch):
    """Killed before its first update, a run goes on from the checkpoint that it began from, which may be gone."""
    train(tiny(epochs=1, seed=3), tmp_path / "first", log=silent)
    init = tmp_path / "first" / WEIGHTS
    config = tiny(init=str(init), epochs=1)
    train(config, tmp_path / "whole", log=silent)
    cut(monkeypatch, config, tmp_path / "cut", 0, saves=())
    init.unlink()
    train(config, tmp_path / "cut", resume=True, log=silent)
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_what_to_type_and_exits(by, code, nursery, tmp_path):
    out = tmp_path / "run"
    flags = {"train-size": 64, "test-size": 10, "steps": 1, "batch-size": 8, "epochs": 100, "warmup-epochs": 0}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    pid = nursery.start(arguments=["train", "--out", str(out), *arguments, "--method", "at", "--device", "cpu"])
    deadline = time.monotonic() + 60
    while not (out / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, by)
    assert nursery.end() == code
    said = nursery.log.read_text().splitlines()
    assert said[-1] == f"stopped; go on with: part-fast train --out {out} --resume"
    assert not [line for line in said if "Traceback" in line]
    state = read_state(out, pytest.fail)
    rows = len(state["rows"])
    assert rows >= 1
    config = dataclasses.replace(read_config(out), epochs=rows + 1)
    assert nursery.train(config, out)[0] == 0
    assert nursery.train(config, tmp_path / "whole")[0] == 0
    assert_same(contents(out), contents(tmp_path / "whole"))


@pytest.mark.usefixtures("quick_runs")
def test_outside_of_the_main_thread_signals_stay_what_they_are(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(train(tiny(epochs=1), tmp_path / "run", log=silent)))
    thread.start()
    thread.join()
    assert len(seen[0]) == 1
    train(tiny(epochs=1), tmp_path / "main", log=silent)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- damaged states ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_states(tmp_path_factory):
    """A folder with two states, of rows of one and two."""
    folder = tmp_path_factory.mktemp("states")
    for i in (1, 2):
        write_state(folder, {"rows": [{"epoch": 1}] * i, "weights": torch.arange(200.0) * i, "numbers": {"x": 1.5}})
    return folder


def test_the_last_two_states_are_kept(two_states):
    assert len(read_state(two_states, pytest.fail)["rows"]) == 2
    assert len(checkpoint._read(two_states / PREVIOUS)["rows"]) == 1
    assert sorted(path.name for path in two_states.iterdir()) == [PREVIOUS, STATE]


def damaged(content, chosen):
    """A copy of the bytes with something wrong."""
    kind, place = chosen.randrange(4), chosen.randrange(len(content))
    if kind == 0:
        return "truncated", content[:place]
    if kind == 1:
        return "a hole", content[:place] + bytes(len(content[place : place + 512])) + content[place + 512 :]
    flipped = content[place] ^ (1 << chosen.randrange(8))
    return "flipped", content[:place] + bytes([flipped]) + content[place + 1 :]


@pytest.mark.parametrize("n", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_every_damage_is_seen_and_the_state_before_is_taken(n, two_states, tmp_path):
    content, previous = (two_states / STATE).read_bytes(), (two_states / PREVIOUS).read_bytes()
    (tmp_path / PREVIOUS).write_bytes(previous)
    chosen, kinds = random.Random(n), {}
    # Every byte of the checksum, and of the last record of the zip file, besides.
    ends = [("the end", content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]) for i in range(-80, -1)]
    ends += [("longer", content + b"x"), ("nothing", b""), ("zeros", bytes(len(content)))]
    for kind, bad in itertools.chain(ends, (damaged(content, chosen) for _ in range(n))):
        if bad == content:  # a hole in zeros
            continue
        (tmp_path / STATE).write_bytes(bad)
        said = []
        state = read_state(tmp_path, said.append)
        assert len(state["rows"]) == 1, kind
        assert state["file"] == PREVIOUS
        assert re.fullmatch(rf"warning: .*{STATE} is damaged: .*; the run goes on from the state .*{PREVIOUS}", said[0])
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"damaged states, all seen: {kinds}")


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_from_the_state_before_a_run_ends_as_it_would_have(how, tmp_path, monkeypatch):
    config = tiny(**CASES["part, masks kept, accumulated"], validation=3)
    train(config, tmp_path / "whole", log=silent)
    cut(monkeypatch, config, tmp_path / "cut", 7, saves=(1, 2, 3))
    newest = tmp_path / "cut" / STATE
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] if how == "truncated" else content[:99] + b"?" + content[100:])
    if how == "missing":
        newest.unlink()
    said = []
    # Killed again at once: the state that is whole must not be lost by then.
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *given: (_ for _ in ()).throw(Killed()))
        train(config, tmp_path / "cut", resume=True, log=said.append)
    assert any(f"{STATE} is damaged" in line for line in said) == (how != "missing")
    train(config, tmp_path / "cut", resume=True, log=said.append)
    assert_same(contents(tmp_path / "cut"), contents(tmp_path / "whole"))
