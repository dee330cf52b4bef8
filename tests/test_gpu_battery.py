"""`python -m part_fast.gpu`: parts, time, failures and the page by stand-in processes; every part's dry run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED, ROOT

from part_fast.gpu import attacks, battery, checkout, ops, oracle, page, record, sanitize, speed, training
from part_fast.gpu.__main__ import main
from part_fast.gpu.battery import Part, Process, Settings

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "RESERVE", 0.0)
    monkeypatch.setattr(battery, "LEAST", 0.0)
    return Settings(tmp_path / "gpu", "cpu", 1.0, True)


def python(code, name="one", judged=False, **environment):
    return Process(name, [sys.executable, "-S", "-c", code], environment, judged)


def writes(out, **row):
    """Code of a process that writes a row."""
    return f"open({str(out / record.RESULTS)!r}, 'a').write({json.dumps(row) + chr(10)!r})"


def part(name, *processes, weight=1.0, **more):
    return Part(name, weight, f"what {name} is", lambda settings: list(processes), **more)


def rows(out, **wanted):
    return [row for row in page.read(out) if all(row.get(key) == value for key, value in wanted.items())]


def test_a_failed_part_stops_no_other(settings, capsys):
    out = settings.out
    failing = writes(out, part="first", kind="failed", name="a case", error="ValueError: so it is")
    groups = [
        [part("first", python(f"{failing}; raise SystemExit({record.CASES_FAILED})"))],
        [part("second", python("raise RuntimeError('a crash')")), part("third", python("import os; os.abort()"))],
        [part("last", python("print('hello')", judged=True)), part("asked", python(""), asked=True)],
    ]
    assert battery.run(settings, (), groups) == 1
    errors = [(row["part"], row["name"], row["error"]) for row in rows(out, kind="failed")]
    last = "the last that it printed"
    assert sorted(errors) == [
        ("first", "a case", "ValueError: so it is"),
        ("second", "one", f"ended with exit code 1; {last}: RuntimeError: a crash"),
        ("third", "one", f"ended by SIGABRT; {last}: nothing"),
    ]
    assert [row["name"] for row in rows(out, kind="ok")] == ["one"]
    text = (out / "report.md").read_text()
    for name, result in (("first", "**failed**"), ("second", "**failed**"), ("third", "**failed**"), ("last", "ok")):
        assert re.search(rf"^\| {name} +\| what {name} is +\| {re.escape(result)} ", text, re.MULTILINE), name
    assert "asked" not in text
    assert re.search(r"^\| first +\| a case +\| ValueError: so it is ", text, re.MULTILINE)
    assert "hello" in (out / battery.LOG).read_text()
    assert "## Failures" in capsys.readouterr().out.rpartition("## Parts")[2]


def test_all_well_is_exit_code_0(settings):
    assert battery.run(settings, (), [[part("only", python("", judged=True))]]) == 0


def test_what_takes_too_long_is_killed_with_all_it_has_started(settings, tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'w').close(); time.sleep(0.05)"
    code = (
        f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    )
    settings = dataclasses.replace(settings, minutes=2 / 60)
    begin = time.time()
    assert battery.run(settings, (), [[part("slow", python(code))], [part("next", python("", judged=True))]]) == 1
    assert time.time() - begin < 10
    (row,) = rows(settings.out, kind="failed")
    assert row["error"].startswith("killed at its limit, after ")
    assert row["error"].endswith("begun")
    assert rows(settings.out, part="next", kind="ok")
    time.sleep(0.2)
    beat.unlink()
    time.sleep(0.3)
    assert not beat.exists()


def test_time_not_used_is_the_others(settings, monkeypatch):
    """Shares are of the time left: parts that take none leave it to those to come."""
    limits = []
    monkeypatch.setattr(battery, "run_group", lambda settings, group, limit: limits.append(limit))
    battery.run(
        settings, (), [[part("a", weight=1)], [part("b", weight=1), part("c", weight=2)], [part("d", weight=3)]]
    )
    assert limits == pytest.approx([60 / 6, 60 * 2 / 5, 60], abs=1)


def test_what_fails_alike_is_one_line_and_no_table_is_wide(tmp_path):
    """One fault of a hundred tests hides no other; all is in the results."""
    long = "TypeError: " + "no " * 200
    for i in range(60):
        record.append(tmp_path, {"part": "tests", "kind": "failed", "name": f"test {i}", "error": long})
    record.append(tmp_path, {"part": "bench", "kind": "failed", "name": "an op", "error": "ValueError: another"})
    text = page.sections(tmp_path, {})["failures"]
    assert re.search(r"^\| tests +\| test 0 and 59 more +\| TypeError: no [no ]*\.\.\. +\|$", text, re.MULTILINE)
    assert re.search(r"^\| bench +\| an op +\| ValueError: another +\|$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) < 170
    assert "more, in" not in text


def test_processes_are_told_when_to_stop_and_judged_ones_are_not(settings):
    said = "import sys; print(sys.argv)"
    battery.run(settings, (), [[part("a", python(said, "told"), python(said, "judged", True))]])
    lines = [line for line in (settings.out / battery.LOG).read_text().splitlines() if line.startswith("[")]
    judged, told = sorted(lines, key=len)
    assert judged == "['-c']"
    assert eval(told)[1] == "--until"
    assert time.time() < float(eval(told)[2]) < time.time() + 60


def test_what_compute_sanitizer_found_is_the_error(settings):
    said = "========= Invalid __global__ write of size 4 bytes\\n=========     at pgd_step_kernel\\n"
    said += "========= ERROR SUMMARY: 3 errors\\n"
    process = python(f"print('{said}'); raise SystemExit({battery.SANITIZER_FOUND})", "memcheck cuda", True)
    assert battery.run(settings, (), [[part("sanitize", process)]]) == 1
    (row,) = rows(settings.out, kind="failed")
    assert row["error"].startswith("ERROR SUMMARY: 3 errors; ")
    assert "pgd_step_kernel" in row["error"]


def test_a_part_that_is_run_again_replaces_what_is_there(settings):
    out = settings.out
    bad = python(writes(out, part="a", kind="failed", name="case", error="no"))
    other = part("b", python(writes(out, part="b", kind="ok", name="kept", seconds=0)))
    first = [[part("a", bad, files=("a.csv",))], [other]]
    assert battery.run(settings, (), first) == 1
    (out / "a.csv").write_text("stale")
    mended = python(writes(out, part="a", kind="ok", name="case", seconds=0))
    assert battery.run(settings, ["a"], [[part("a", mended, files=("a.csv",))], [other]]) == 0
    assert not rows(out, kind="failed")
    assert len(rows(out, name="kept")) == 1
    assert not (out / "a.csv").exists()


def test_results_of_another_machine_are_not_mixed_in(settings):
    settings.out.mkdir()
    record.append(
        settings.out, {"part": "environment", "kind": "value", "card": "H100", "torch": "2.11.0", "python": "3.12.3"}
    )
    with pytest.raises(
        ValueError, match=r"^out must be a folder without results of another machine, got .*card H100 there"
    ):
        battery.run(settings, (), [[part("a", python(""))]])
    assert len(page.read(settings.out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--only", "opps"], "only must name parts among build, environment, ops, .*, got opps$"),
        (["--dry-run", "--minutes", "0"], r"minutes must be > 0, got 0\.0$"),
        (["--device", "cpu"], "device must be cuda but for a --dry-run, got cpu$"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(f"^part_fast.gpu: error: {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device; try --dry-run" in capsys.readouterr().err


def test_parts_on_a_gpu_name_modules_that_are_there(monkeypatch, tmp_path):
    """What a dry run does not start: its commands parse, and every part has some."""
    monkeypatch.setattr(battery, "find_sanitizer", lambda: "/cuda/bin/compute-sanitizer")
    settings = Settings(tmp_path, "cuda", 9.0, data=tmp_path)
    for group in battery.GROUPS:
        for each in group:
            processes = each.processes(settings)
            assert not isinstance(processes, str), processes
            for process in processes:
                module = next(word for word in process.command if word.startswith("part_fast.gpu."))
                assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    names = [process.name for process in battery._sanitize(settings)]
    assert names == ["memcheck cuda", "racecheck cuda", "initcheck cuda", "synccheck cuda", "memcheck triton"]
    *_, triton = battery._sanitize(settings)
    assert triton.command[0] == sys.executable  # not the tool: it compiles first
    assert triton.command[triton.command.index("--watch") + 1] == "/cuda/bin/compute-sanitizer"
    monkeypatch.setattr(battery, "find_sanitizer", lambda: None)
    assert "neither on PATH" in battery._sanitize(settings)


# --- recording --------------------------------------------------------------------------------------------------------


def recorder(out, device="cpu", **given):
    flags = record.parser("").parse_args(["--out", str(out), "--device", device, "--dry-run"])
    for name, value in given.items():
        setattr(flags, name, value)
    return record.Recorder("some", flags)


def test_cases(tmp_path):
    found = recorder(tmp_path)
    assert found.case("good", lambda a, b: a + b, 1, b=2) == 3

    def missing():
        raise record.MissingError("no such thing here")

    def failing():
        raise ValueError("two\nlines")

    assert found.case("missing", missing) is None
    assert found.code == 0
    assert found.case("bad", failing) is None
    assert found.code == record.CASES_FAILED
    found.until = 0
    found.case("late", failing)
    kinds = [(row["kind"], row["name"]) for row in page.read(tmp_path)]
    assert kinds == [("ok", "good"), ("skipped", "missing"), ("failed", "bad"), ("late", "late")]
    assert rows(tmp_path, name="bad")[0]["error"] == "ValueError: two lines"


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(record, "synchronize", lost)
    with pytest.raises(SystemExit) as stop:
        recorder(tmp_path).case("kernel", lambda: None)
    assert stop.value.code == record.CASES_FAILED
    assert [row["name"] for row in page.read(tmp_path)] == ["kernel", "everything after kernel"]


def test_differing():
    nan = float("nan")
    assert record.differing(torch.tensor([1.0, nan, 0.0, 2.0]), torch.tensor([1.0, nan, -0.0, 3.0])) == 1
    assert record.differing(torch.tensor([nan]), torch.tensor([1.0])) == 1
    with pytest.raises(AssertionError, match="shape"):
        record.differing(torch.zeros(2), torch.zeros(1))


def test_kinds_of_kernels():
    kinds = {
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolution, matrix product",
        "void part_fast::pgd_step_kernel<float>": "part_fast",
        "void at::native::vectorized_elementwise_kernel<4>": "elementwise",
        "void at::native::(anonymous)::multi_tensor_apply_kernel": "optimizer, foreach",
        "triton_poi_fused_add_relu_3": "compiled by Inductor",
        "triton_poi_fused_convolution_relu_3": "compiled by Inductor",
        "triton_per_fused__native_batch_norm_legit_functional_relu_2": "compiled by Inductor",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>": "layout, casts",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>": "BatchNorm",
        "sm80_xmma_fprop_implicit_gemm_bf16bf16_f32_nhwckrsc_nhwc": "convolution, matrix product",
        "Memcpy DtoD": "layout, casts",
        "something": "other",
    }
    assert {name: speed.kernel_kind(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("setting", "published"),
    [
        ("AT bf16, graph", "published AT"),
        ("PART-T bf16", "published PART-T"),
        ("AT bf16, compiled, graph, cudnn.benchmark", "published AT, cudnn.benchmark"),
        ("AT fgsm-rs bf16, graph", None),
        ("PART, bank, bf16, graph", None),
        ("input-gradient AT", None),
        ("published AT", None),
        ("published AT, cudnn.benchmark", None),
    ],
)
def test_a_setting_is_compared_with_the_loop_that_does_as_much(setting, published):
    loops = {"published AT": 100.0, "published AT, cudnn.benchmark": 200.0, "published PART-T": 50.0}
    rows = [
        {"model": "net", "batch": "128", "setting": name, "images_per_s": str(rate), "percent_of_matmul": "", "ms": "1",
         "host_ms": "1", "least_ms": "1", "most_ms": "1", "first_s": "1"}
        for name, rate in {**loops, setting: 600.0}.items()
    ]  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")] for line in page._settings(rows).splitlines()]
    (times,) = [cells[7] for cells in lines if cells[1:2] == [setting]]
    assert times == ("" if published is None else f"{600 / loops[published]:.2f}x")


def test_rates_of_goals_are_no_ratios():
    row = {"what": "AT, images/s", "model": "resnet18", "batch": "128", "kind": "rate", "met": "False"}
    text = page._goals([{**row, "value": "7032.97", "p20": "7000.1", "p80": "7050.9", "by_parts": "", "goal": "7100"}])
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert cells[4:9] == ["7033", "7000", "7051", "", "7100"]


def event(name, device, microseconds, count=1, annotation=False):
    return SimpleNamespace(
        key=name, device_type=f"DeviceType.{device}", self_device_time_total=microseconds, count=count,
        is_user_annotation=annotation,
    )  # fmt: skip


def test_ranges_are_not_kernels():
    """A profile has each named range on the host and, as long as its kernels, on the device."""
    averages = [
        event("part_fast: attack forward", "CPU", 0, 10, annotation=True),
        event("part_fast: attack forward", "CUDA", 900.0, 10, annotation=True),
        event("Optimizer.step#SGD.step", "CPU", 0),
        event("Optimizer.step#SGD.step", "CUDA", 80.0),  # by its name alone
        event("aten::conv2d", "CPU", 0, 20),
        event("cudaLaunchKernel", "CPU", 0, 40),
        event("void part_fast::pgd_step_kernel<float>", "CUDA", 30.0, 10),
        event("sm90_xmma_fprop", "CUDA", 700.0, 20),
        event("Memset (Device)", "CUDA", 5.0, 2),
    ]
    assert speed.kernels_in(averages) == [
        (700.0, 20, "sm90_xmma_fprop"),
        (30.0, 10, "void part_fast::pgd_step_kernel<float>"),
        (5.0, 2, "Memset (Device)"),
    ]


def test_ranges_of_a_profile_have_their_names_on_the_host():
    """What tells them apart, as torch's own profiler has it."""
    x = torch.ones(3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("part_fast: a range"):
        x + x
    averages = {each.key: each for each in profile.key_averages()}
    assert averages["part_fast: a range"].is_user_annotation
    assert not averages["aten::add"].is_user_annotation
    assert speed.kernels_in(averages.values()) == []


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_the_oracle_is_the_published_code(golden):
    """Against golden data that the published code made."""
    data = golden("mask")
    for key in ("4x4_to_32x32", "8x8_to_32x32", "5x7_to_30x44"):
        size = tuple(int(n) for n in key.split("_to_")[1].split("x"))
        maps = [oracle.normalised(one) for one in data[f"{key}.cam"].float()]
        for rule, find in (("zscore", oracle.zscore_mask), ("released", oracle.released_mask)):
            wanted = data[f"{key}.mask_{rule}"].bool()
            wrong = sum(record.differing(find(one, size), mask) for one, mask in zip(maps, wanted, strict=True))
            assert wrong <= 1e-4 * wanted.numel()


# --- every part, as far as a CPU goes ---------------------------------------------------------------------------------


def dry(run, out, *arguments):
    """The rows that a module's dry run writes in this process; it succeeds."""
    out.mkdir(exist_ok=True)
    code = run([*arguments, "--out", str(out), "--device", "cpu", "--dry-run"])
    failed = [f"{row['name']}: {row['error']}" for row in rows(out, kind="failed")]
    assert (code, failed) == (0, [])
    return page.read(out)


def test_ops_dry_run(tmp_path):
    found = dry(ops.main, tmp_path, "--backends", "cpp,reference,triton", "--thin", "211")
    names = [row["name"] for row in found if row["kind"] == "ok"]
    for backend in ("cpp", "reference"):
        for kind in ("step", "backward", "fast", "cam", "upsample", "soft", "mask", "big", "host"):
            assert any(name.startswith(f"{backend}: {kind}") for name in names), (backend, kind)
    assert "TRITON_INTERPRET=1" in next(row["why"] for row in found if row["name"] == "triton")


def test_ops_checks_see_a_wrong_op(tmp_path, monkeypatch):
    right = ops.pgd_step
    monkeypatch.setattr(ops, "pgd_step", lambda *given: right(*given) + 2.0**-24)
    out = ["--out", str(tmp_path), "--device", "cpu", "--dry-run"]
    assert ops.main(["--backends", "cpp", "--kinds", "step", "--thin", "97", *out]) == record.CASES_FAILED
    assert "pgd_step: " in rows(tmp_path, kind="failed")[0]["error"]
    monkeypatch.setattr(ops, "cam_mask", lambda c, size, rule: torch.zeros(len(c), 1, *size, dtype=torch.bool))
    ops.main(["--backends", "cpp", "--kinds", "mask", "--thin", "37", *out])
    assert any("epsilon_map: " in row["error"] for row in rows(tmp_path, kind="failed"))


def test_attacks_dry_run(tmp_path):
    found = dry(attacks.main, tmp_path, "--kinds", "signs,single,follow,waits,train")
    assert {row["name"] for row in found if row["kind"] == "ok"} >= {
        "masks beside the oracle",
        "follow, fp32",
        "train part-m",
    }


def some_attacks(tmp_path, results):
    """Checks whose attacks find what `results` has, one after the other."""
    found = iter(results)
    return SimpleNamespace(
        recorder=recorder(tmp_path), model=None, attack_model=lambda *way: None,
        attack=lambda *given, **more: next(found),
        budgets=lambda: {"float": 0.1}, device=CPU, x=torch.zeros(10), start=lambda x: x, same=None,
        strength=lambda x: (1.0, 0.5),
    )  # fmt: skip


def off_by(share):
    """A hundred pixels, of which so many are not 0."""
    return (torch.arange(100) < 100 * share).float()


def test_two_starts_may_end_in_the_same_place_but_for_some_pixels(tmp_path):
    """Most pixels end on their bound."""
    attacks.Checks.random_starts(some_attacks(tmp_path, [off_by(0), off_by(0.1), off_by(0.01)]))
    (row,) = rows(tmp_path, name="random starts")
    assert (row["two_draws_off"], row["one_seed_off"]) == pytest.approx((0.1, 0.01))
    with pytest.raises(AssertionError, match="two draws are one start"):
        attacks.Checks.random_starts(some_attacks(tmp_path, [off_by(0), off_by(0.01), off_by(0)]))
    with pytest.raises(AssertionError, match="a seed does not repeat"):
        attacks.Checks.random_starts(some_attacks(tmp_path, [off_by(0), off_by(0.5), off_by(0.5)]))


def test_the_network_itself_is_said_once(tmp_path):
    for compiled in (False, True):
        checks = some_attacks(tmp_path, [off_by(0)] * 3)
        checks.recorder.until = 0  # none of the ways of computing it
        attacks.Checks.agree(checks, compile=compiled)
    names = [row["name"] for row in rows(tmp_path, kind="value")]
    assert names == [f"agree, the network itself, float {loss}" for loss in ("ce", "kl", "margin")]


@pytest.mark.slow
def test_attacks_check_sees_another_attack(tmp_path, monkeypatch):
    """An attack model with other weights attacks more weakly, or elsewhere."""
    real = attacks.Checks.attack_model

    def off(self, *way):
        model = real(self, *way)
        with torch.no_grad():
            model.module.linear.weight.neg_()
        return model

    monkeypatch.setattr(attacks.Checks, "attack_model", off)
    out = ["--out", str(tmp_path), "--device", "cpu", "--dry-run"]
    assert attacks.main(["--kinds", "agree", *out]) == record.CASES_FAILED
    assert "a weaker attack" in rows(tmp_path, kind="failed")[0]["error"]


def test_sanitize_dry_run(capsys):
    assert sanitize.main(["--device", "cpu", "--backend", "cpp", "--much", "few"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("calls on cpp: done")
    assert len(said) > 5  # how far it is


def test_sanitize_compiles_before_it_is_watched(capfd):
    tool = "import subprocess, sys; print('watching', flush=True); sys.exit(subprocess.call(sys.argv[1:]))"
    command = ["--device", "cpu", "--backend", "cpp", "--much", "least", "--watch", sys.executable, "-c", tool]
    assert sanitize.main(command) == 0
    said = capfd.readouterr().out.splitlines()
    ends = [i for i, line in enumerate(said) if line.endswith("calls on cpp: done")]
    assert ends == [said.index("watching") - 2, len(said) - 1]
    assert sanitize.main([*command[:-2], "-c", "raise SystemExit(9)"]) == battery.SANITIZER_FOUND


@pytest.mark.skipif(INTERPRETED, reason="looks at what a process that compiles would compile")
def test_what_triton_is_watched_with_is_quick_to_compile(monkeypatch):
    """Every kernel is among it, and few enough are: one takes most of a second."""
    pytest.importorskip("triton", reason="triton is not installed")
    import importlib

    from part_fast import backends, kernels

    found = set()

    def launch(op, *arguments):
        name = op.name.removeprefix("_")
        module = importlib.import_module(f"part_fast.kernels.{name.rstrip('_').removesuffix('_bwd')}")
        return getattr(module, name)(*arguments)

    def note(self):
        """As Triton tells specialisations apart."""
        kinds = []
        for value in self.arguments.values():
            aligned = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else value
            whole = isinstance(value, int) and (value == 1, value % 16 == 0)
            kinds.append((value.dtype, aligned) if isinstance(value, torch.Tensor) else (value is None, whole))
        found.add((self.kernel.__name__, *kinds, *map(str, self.constants.values())))

    monkeypatch.setattr(backends.RawOp, "__call__", launch)
    monkeypatch.setattr(backends.RawOp, "on", lambda op, asked, *arguments: launch(op, *arguments))
    monkeypatch.setattr(kernels.Launch, "run", note)
    sanitize.launches("reference", "cpu", "least")
    assert len({kernel[0] for kernel in found}) == 12
    assert len(found) <= 70


def test_settings_dry_run(tmp_path):
    dry(speed.main, tmp_path, "settings")
    measured = page._csv(tmp_path / "settings.csv")
    assert [row["setting"] for row in measured][:3] == ["AT bf16", "published AT", "PART bf16"]
    assert all(float(row["ms"]) > 0 for row in measured)


def test_bench_dry_run(tmp_path):
    dry(speed.main, tmp_path, "ops")
    assert {row["provider"] for row in page._csv(tmp_path / "ops.csv")} == {"copy", "reference", "cpp"}
    assert "| pgd_step |" in page.sections(tmp_path, {})["ops"]


def test_training_dry_run(tmp_path):
    found = dry(training.main, tmp_path)
    assert {row["name"] for row in found if row["kind"] == "ok"} == {"train", "evaluate, masks"}


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    """One that can be imported is there, also where nobody installed it."""
    (tmp_path / "only_a_file.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checkout, "PACKAGES", ("pytest", "only_a_file", "no_such_package"))
    (missing,) = [row for row in dry(lambda given: checkout.main(["environment", *given]), tmp_path) if "why" in row]
    assert missing["why"] == "not installed: no_such_package"


def run_tests(folder, tests, *arguments):
    """The part `tests` of a checkout of one file."""
    (folder / "setup.py").touch()
    (folder / "csrc").mkdir()
    (folder / "tests").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (folder / "tests" / "test_some.py").write_text(f"import pytest, time\n\npytestmark = pytest.mark.gpu\n\n\n{tests}")
    given = ["tests", "--out", str(folder), "--device", "cpu", *arguments]
    code = (
        f"import pathlib, sys; from part_fast.gpu import checkout; checkout.ROOT = pathlib.Path({str(folder)!r}); "
        f"sys.exit(checkout.main({given!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_the_tests_part_stops_in_time(tmp_path):
    """pytest-xdist's processes too, which are not stopped as pytest's own is, and would run what they hold."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    many = "@pytest.mark.parametrize('i', range(1000))\ndef test_slow(i):\n    time.sleep(0.1)\n"
    # All of them take 50 s, and to begin some seconds; however slow the machine is, what is late runs no further.
    done = run_tests(tmp_path, many, "--workers", "2", "--until", str(time.time() + 12))
    assert done.returncode == 0, done.stdout + done.stderr
    (counts,) = rows(tmp_path, kind="value")
    assert 0 < counts["passed"] < 500
    assert len(rows(tmp_path, kind="late")) == 1


def test_the_tests_part_reports_each_failure(tmp_path):
    """One test passes, one fails, one is skipped."""
    done = run_tests(
        tmp_path,
        "def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n\n\n"
        "def test_absent():\n    pytest.skip('not here')\n",
    )
    assert done.returncode == record.CASES_FAILED, done.stdout + done.stderr
    (failed,) = rows(tmp_path, kind="failed")
    assert failed["name"].endswith("test_bad")
    assert "assert 1 == 2" in failed["error"]
    (counts,) = rows(tmp_path, kind="value")
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)


def test_the_tests_part_says_which_file_lacks_a_package(tmp_path):
    done = run_tests(tmp_path, "pytest.importorskip('no_such_package', reason='needs the package X')\n")
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = {row["name"]: row["why"] for row in rows(tmp_path, kind="skipped")}
    assert reasons["tests/test_some.py"] == "needs the package X"


def test_no_more_tests_than_there_is_time_for():
    assert checkout.share(4500, 10, 95) == 7
    assert checkout.share(4500, 10, 1000) == 1
    assert checkout.share(600, 5, float("inf")) == 1
    assert checkout.share(600, 5, 0) == 120  # which tests/conftest.py still gives one of each


def run_command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "part_fast.gpu", "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_command_in_processes_of_its_own(tmp_path):
    done = run_command(tmp_path, "--only", "ops")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# part_fast: a dry run on a CPU\n")
    assert "| ops         | every op against an oracle, on every backend | ok " in text
    assert {row["part"] for row in page.read(tmp_path)} == {"environment", "ops"}


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path):
    done = run_command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {row["part"] for row in page.read(tmp_path)}
    assert ran == set(battery.PARTS) - {"poster"}
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) <= 8
    for name in ("ops.csv", "settings.csv", "step.csv"):
        assert (tmp_path / name).exists()
