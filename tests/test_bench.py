"""bench: results are checked before they are timed, bytes are counted right, rounds interleave, files are written."""

import contextlib
import csv
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import part_fast
from part_fast.bench import cases, clocks, ops

CPU = torch.device("cpu")
COMPILE = torch.compile
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Compiling takes seconds a case; benchmarks/ compiles, and refuses results that differ."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(clocks.CpuClock, "seconds_at_least", 1e-5)


def small_cases():
    steps = [
        cases.step_case(op, (2, 3, 5, 5), dtype, packed, layout)
        for op in ("pgd_step", "pgd_step_", "project_linf")
        for dtype in (FLOAT, HALF)
        for packed in (False, True)
        for layout in cases.LAYOUTS
    ]
    steps += [
        cases.fast_case(op, (2, 3, 5, 5), dtype, packed, layout)
        for op in ("uniform_start", "bank_start", "eps_step_")
        for dtype, packed, layout in ((FLOAT, False, "contiguous"), (HALF, True, "channels_last"))
    ]
    maps = [cases.map_case("upsample_cam", (3, 4, 4), (9, 8), "")]
    for op in ("cam_mask", "epsilon_map"):
        maps += [cases.map_case(op, (3, 4, 4), (9, 8), rule) for rule in ("zscore", "released", "quantile:0.3")]
    maps.append(cases.map_case("epsilon_map", (3, 4, 4), (9, 8), "soft"))
    maps.append(cases.map_case("epsilon_map", (3, 4, 4), (9, 8), "zscore", packed=True))
    cams = [cases.cam_case((2, 6, 4, 4), dtype, layout) for dtype in (FLOAT, HALF) for layout in cases.LAYOUTS]
    return steps + cams + maps


def providers(case, **changed):
    """Those of the case; `reference=function` and so on exchange one."""
    return [dataclasses.replace(p, run=changed.get(p.name, p.run)) for p in cases.providers_of(case, CPU)]


def test_cases_cover_every_op_at_its_shapes():
    every = cases.all_cases()
    assert len({case.name for case in every}) == len(every)
    assert tuple(dict.fromkeys(case.op for case in every)) == cases.OPS
    assert {case.op for case in every if case.quick} == set(cases.OPS)
    for op in ("pgd_step", "pgd_step_", "project_linf"):
        names = {case.name for case in every if case.op == op}
        assert names == {
            f"{op} {shape} {layout}, eps {form} {dtype}"
            for shape in ("128x3x32x32", "128x3x64x64", "512x3x128x128")
            for layout in cases.LAYOUTS
            for form in ("(N,1,H,W)", "packed")
            for dtype in ("float32", "bfloat16")
        }
    published = {case.shape for case in every if case.published}
    assert {"128 8x8->32x32 released", "128 8x8->32x32 zscore"} <= published


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_all_providers_compute_the_same(case):
    names = [provider.name for provider in cases.providers_of(case, CPU)]
    assert names[0] == "reference"
    assert "torch.compile" in names
    assert ("cpp" in names) == ("cpp" in part_fast.available_backends())
    cases.check(case, cases.providers_of(case, CPU), CPU)


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_what_is_compiled_is_one_graph_of_torchs_own_operations(case, monkeypatch):
    """And chooses no backend, which Dynamo before torch 2.14 does not trace."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    def refused(name):
        raise AssertionError(f"backend {name} chosen inside of what is compiled")

    plain, inputs = case.plain(CPU), case.inputs(CPU, 0)
    with part_fast.backend("reference"):
        wanted = case.run(*copied(inputs))
    monkeypatch.setattr(part_fast.backends, "backend", refused)
    torch.compiler.reset()
    got = COMPILE(plain, fullgraph=True, dynamic=False, backend=keep)(*copied(inputs))
    assert len(graphs) == 1
    assert not [node for node in graphs[0].nodes if "part_fast" in str(node.target)]
    assert float(((got.double() - wanted.double()).abs() > case.near * wanted.double().abs().max()).sum()) <= (
        case.away * wanted.numel()
    )


def copied(inputs):
    """The same, to be written to."""
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in inputs)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        # x_adv, grad, x and the result: 2*3*5*5 values each; eps: 2*5*5 float32, or 25 bits in 4 bytes, twice.
        (cases.step_case("pgd_step", (2, 3, 5, 5), FLOAT, False), 4 * 150 * 4 + 50 * 4),
        (cases.step_case("pgd_step_", (2, 3, 5, 5), FLOAT, True), 4 * 150 * 4 + 2 * 4),
        (cases.step_case("pgd_step", (2, 3, 5, 5), HALF, False), 4 * 150 * 2 + 50 * 4),
        (cases.step_case("project_linf", (2, 3, 5, 5), HALF, True), 3 * 150 * 2 + 2 * 4),
        # x, the result and eps; a bank of 150 bytes, two rows of four int64; x_adv and grad too.
        (cases.fast_case("uniform_start", (2, 3, 5, 5), FLOAT, False), 2 * 150 * 4 + 50 * 4),
        (cases.fast_case("bank_start", (2, 3, 5, 5), HALF, True), 2 * 150 * 2 + 2 * 4 + 150 + 64),
        (cases.fast_case("eps_step_", (2, 3, 5, 5), FLOAT, False), 4 * 150 * 4 + 50 * 4 + 150 + 64),
        # Two inputs of 2*6*4*4, a float32 map of 2*4*4.
        (cases.cam_case((2, 6, 4, 4), FLOAT), 2 * 192 * 4 + 32 * 4),
        (cases.cam_case((2, 6, 4, 4), HALF), 2 * 192 * 2 + 32 * 4),
        # A float32 map of 3*4*4; 3*9*8 pixels out as float32, bool, three channels of float32, 9 bytes of bits.
        (cases.map_case("upsample_cam", (3, 4, 4), (9, 8), ""), 48 * 4 + 216 * 4),
        (cases.map_case("cam_mask", (3, 4, 4), (9, 8), "zscore"), 48 * 4 + 216),
        (cases.map_case("epsilon_map", (3, 4, 4), (9, 8), "released"), 48 * 4 + 3 * 216 * 4),
        (cases.map_case("epsilon_map", (3, 4, 4), (9, 8), "zscore", packed=True), 48 * 4 + 3 * 9),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes(case, count):
    assert cases.check(case, providers(case), CPU) == count
    (copy, inputs) = ops.copy_provider(count)
    source, target = inputs(CPU)
    assert count - 8 < source.nbytes + target.nbytes <= count
    copy.run(source, target)
    assert torch.equal(source, target)


STEP = cases.step_case("pgd_step", (2, 3, 5, 5), FLOAT, False)
MASK = cases.map_case("epsilon_map", (100, 4, 4), (10, 10), "zscore")


def off_in(case, count, by):
    """The reference, but that many values are changed."""

    def run(*inputs):
        with part_fast.backend("reference"):
            result = case.run(*inputs).clone()
        result.view(-1)[:count] += by
        return result

    return run


@pytest.mark.parametrize(
    ("case", "wrong", "exact"),
    [
        (STEP, off_in(STEP, 1, 2.0**-24), True),  # one value, one ulp, where bits are promised
        (STEP, off_in(STEP, 1, 1e-6), False),
        (STEP, off_in(STEP, 1, float("nan")), False),
        (MASK, off_in(MASK, 1, 1 / 255), True),
        (MASK, off_in(MASK, 2, 1 / 255), False),  # of 10,000 values one may be on its threshold
        (MASK, lambda *inputs: MASK.run(*inputs)[:-1], False),
        (MASK, lambda *inputs: MASK.run(*inputs).double(), False),
    ],
)
def test_wrong_result_is_refused(case, wrong, exact):
    planted = cases.Provider("planted", wrong, exact=exact)
    reference = cases.providers_of(case, CPU)[0]
    with pytest.raises(cases.MismatchError, match=r"planted .*: not timed$") as caught:
        ops.measure(case, CPU, 1, [reference, planted])
    assert "\n" not in str(caught.value)


def test_a_bank_that_is_not_written_or_written_wrongly_is_refused():
    case = next(case for case in cases.all_cases() if case.op == "eps_step_")

    def without(x_adv, grad, x, eps, bank, places):
        return part_fast.ops.eps_step_(x_adv, grad, x, eps, 1.25)

    def emptied(x_adv, grad, x, eps, bank, places):
        bank.zero_()
        return without(x_adv, grad, x, eps, bank, places)

    reference = cases.Provider("reference", case.run, "reference")
    cases.check(case, [reference, cases.Provider("sound", case.run, "cpp", exact=True)], CPU)
    for wrong in (without, emptied):
        with pytest.raises(cases.MismatchError, match=r"planted differs from the reference in \d+ of \d+ values"):
            cases.check(case, [reference, cases.Provider("planted", wrong, "cpp", exact=True)], CPU)


@pytest.mark.parametrize(("case", "near"), [(STEP, off_in(STEP, 9, 2.0**-24)), (MASK, off_in(MASK, 1, 1 / 255))])
def test_rounding_is_not_refused_where_no_bits_are_promised(case, near):
    planted = cases.Provider("planted", near)
    cases.check(case, [cases.providers_of(case, CPU)[0], planted], CPU)


def test_in_place_writes_its_own_copy():
    case = cases.step_case("pgd_step_", (2, 3, 5, 5), FLOAT, False)
    given = case.inputs(CPU, 0)
    kept = given[0].clone()
    cases.check(dataclasses.replace(case, inputs=lambda device, seed: given), providers(case), CPU)
    assert torch.equal(given[0], kept)


def test_rounds_interleave():
    order = []
    samples = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    values = clocks.interleave(samples, 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert values == {"a": [1.0, 6.0, 8.0, 10.0], "b": [2.0, 4.0, 9.0, 11.0], "c": [3.0, 5.0, 7.0, 12.0]}


def test_sampler_gives_the_seconds_of_one_call():
    """On a clock by which every call takes 2 us: short calls are timed many at once, none is timed by itself."""

    class Clock(clocks.CpuClock):
        seconds_at_least = 1e-3

        def seconds(self, one_pass, passes):
            before = len(made)
            for _ in range(passes):
                one_pass()
            return 2e-6 * (len(made) - before)

    made = []
    provider = cases.Provider("reference", lambda which: made.append(which))
    sample, calls = clocks.sampler(provider, [(0,), (1,), (2,)], Clock())
    assert calls >= 500
    made.clear()
    assert sample() == pytest.approx(2e-6)
    assert len(made) == calls
    assert made[:6] == [0, 1, 2, 0, 1, 2]


def test_sampler_is_not_misled_by_slow_first_calls():
    class Clock(clocks.CpuClock):
        seconds_at_least = 1e-3

        def seconds(self, one_pass, passes):
            made.append(passes)
            return 2e-6 * passes if len(made) > 4 else 5e-3

    made = []
    _, calls = clocks.sampler(cases.Provider("reference", lambda: None), [()], Clock())
    assert calls >= 500


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only glibc's malloc can be told, and asked for faults"
)
def test_freed_memory_is_kept():
    """Filled again, 64 MiB that were freed take no new pages; without being told, malloc gives so much back."""
    code = """if True:
        import resource, torch
        from part_fast.bench import clocks
        torch.set_num_threads(1)
        def faults(values):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(values)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(1 << 24)
        print(faults(1 << 24))
        clocks.keep_freed_memory()
        # Each a little smaller: what is allocated between them may cut a piece off the memory that the last one left.
        print(min(faults((1 << 24) - 4096 * i) for i in range(5)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, kept = (int(line) for line in done.stdout.split())
    assert kept < told / 10


def test_what_takes_no_time_is_refused():
    class Clock(clocks.CpuClock):
        def seconds(self, one_pass, passes):
            return 0.0

    with pytest.raises(RuntimeError, match=r"^copy takes no time: "):
        clocks.sampler(cases.Provider("copy", lambda: None), [()], Clock())


def test_peak_memory_on_the_cpu():
    def call():
        first = torch.ones(1000)
        second = torch.ones(3000)
        del first
        return second[:10].clone(), torch.ones(500)

    # 4,000 values before `first` goes; after that 3,510.
    assert clocks.CpuClock().peak_bytes(call) == 16000
    assert clocks.CpuClock().peak_bytes(lambda: None) == 0


def test_rows():
    rows = ops.measure(MASK, CPU, 5)
    names = [row["provider"] for row in rows]
    assert names[:5] == ["copy", "reference", "published", "vectorised", "torch.compile"]
    for row in rows:
        assert row["bytes"] == 100 * 4 * 4 * 4 + 100 * 10 * 10 * 4
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
        assert row["percent_of_copy"] == pytest.approx(100 * rows[0]["median_us"] / row["median_us"])
        assert row["timing"] == "wall"
    peak = {row["provider"]: row["peak_bytes"] for row in rows}
    assert peak["published"] is None
    assert peak["copy"] == 0
    assert peak["vectorised"] > 100 * 10 * 10 * 4
    if "cpp" in names:
        assert peak["cpp"] == 100 * 10 * 10 * 4  # the result and nothing else


def test_ratios():
    def row(provider, median, threads=None):
        return {**case, "threads": threads, "provider": provider, "median_us": median}

    case = {"op": "cam", "shape": "s", "dtype": "float32"}
    found = ops.ratios([row("copy", 1.0), row("reference", 8.0), row("triton", 4.0), row("cuda", 2.0)])
    assert found == [{**case, "threads": None, "backend": "cuda", "copy": 0.5, "reference": 4.0}]
    assert ops.ratios([row("copy", 1.0), row("reference", 8.0)]) == []
    both = ops.ratios([row("reference", 8.0, 1), row("cpp", 4.0, 1), row("reference", 8.0, 2), row("cpp", 2.0, 2)])
    assert [(each["threads"], each["reference"]) for each in both] == [(1, 2.0), (2, 4.0)]


def test_command_writes_table_csv_plot_and_environment(tmp_path, capsys):
    out = tmp_path / "deep" / "bench"
    rows = ops.ops(out, device="cpu", rounds=2, cases=[STEP, MASK])
    printed = capsys.readouterr().out
    assert part_fast.__version__ in printed.splitlines()[0]
    assert "cpu" in printed.splitlines()[0]
    assert "not measured: triton" in printed
    for column in ("shape", "dtype", "provider", "median us", "p20", "p80", "GB/s", "% of copy", "peak MiB"):
        assert column in printed
    assert printed.index("\npgd_step: bytes =") < printed.index("\nepsilon_map: bytes =")
    with (out / "ops.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["provider"] for row in written] == [row["provider"] for row in rows]
    assert float(written[0]["median_us"]) == rows[0]["median_us"]
    with (out / "ratios.csv").open() as file:
        assert len(list(csv.DictReader(file))) == (2 if "cpp" in part_fast.available_backends() else 0)
    record = json.loads((out / "environment.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["bench"] == {
        "device": "cpu",
        "quick": False,
        "rounds": 2,
        "ops": ["pgd_step", "epsilon_map"],
        "threads": [torch.get_num_threads()],
    }
    with Image.open(out / "ops.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("RGB").resize((64, 64)).get_flattened_data())) > 3

    with pytest.raises(ValueError, match=r"^out must be .*ops\.csv.*--overwrite$"):
        ops.ops(out, device="cpu", rounds=1, cases=[STEP])
    before = torch.get_num_threads()
    ops.ops(out, device="cpu", rounds=1, threads=[1, 2], cases=[STEP], overwrite=True)
    with (out / "ops.csv").open() as file:
        written = list(csv.DictReader(file))
    assert {row["op"] for row in written} == {"pgd_step"}
    assert [row["threads"] for row in written if row["provider"] == "reference"] == ["1", "2"]
    assert torch.get_num_threads() == before


def test_command_shows_nothing_of_an_op_with_a_mismatch(tmp_path, capsys):
    wrong = dataclasses.replace(MASK, plain=lambda device: lambda cam: MASK.plain(device)(cam) + 1e-3)
    with pytest.raises(cases.MismatchError, match="vectorised differs from the reference in 10000 of 10000 values"):
        ops.ops(tmp_path, device="cpu", rounds=1, cases=[MASK, wrong])
    assert "GB/s" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": ["pgd"]}, "only must name ops among pgd_step, .*, got pgd$"),
        ({"rounds": 0}, "rounds must be >= 1, got 0$"),
        ({"threads": [2, 0]}, "threads must be >= 1, got 2, 0$"),
        ({"device": "mps"}, "device takes auto, cpu, cuda or cuda:N, got 'mps'$"),
        ({"device": "gpu"}, "device takes auto, cpu, cuda or cuda:N, got 'gpu'$"),
        ({"cases": [STEP], "only": ["cam"]}, "cases must hold one to measure, got none$"),
    ],
)
def test_errors(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.ops(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_inputs_have_the_layout(layout):
    other = next(name for name in cases.LAYOUTS if name != layout)
    for case in (
        cases.step_case("pgd_step", (2, 3, 5, 5), HALF, False, layout),
        cases.cam_case((2, 6, 4, 4), FLOAT, layout),
    ):
        assert layout in case.name
        for image in [given for given in case.inputs(CPU, 0) if given.shape[1] > 1]:
            assert image.is_contiguous(memory_format=cases.LAYOUTS[layout])
            assert not image.is_contiguous(memory_format=cases.LAYOUTS[other])


def test_measuring_gives_providers_from_python_few_inputs(monkeypatch):
    """On a clock that asks for many sets: seeds 0 to 19 for what a graph holds, the first three for the others."""
    monkeypatch.setattr(clocks.CpuClock, "sets", lambda self, nbytes, captured: 20 if captured else 3)
    seen = {"reference": set(), "captured": set()}
    case = dataclasses.replace(STEP, inputs=lambda device, seed: (torch.full((2,), float(seed)),))

    def run(name):
        return lambda x: seen[name].add(float(x[0])) or x

    ops.measure(
        case,
        CPU,
        1,
        [
            cases.Provider("reference", run("reference"), captured=False),
            cases.Provider("captured", run("captured")),
        ],
    )
    assert seen == {"reference": set(range(3)), "captured": set(range(20))}


QUICK = [case for case in cases.all_cases() if case.quick]


@pytest.mark.skipif("cpp" not in part_fast.available_backends(), reason="part_fast._C is not built")
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_ours_is_not_behind(case, monkeypatch):
    """The order of the quick rows: ours before the reference, and cam's before torch.compile (seconds to compile).

    By medians of interleaved rounds with one thread, which a busy machine disturbs alike, with a quarter of room, and
    once of five times: what is really behind is so every time.
    """
    monkeypatch.setattr(clocks.CpuClock, "seconds_at_least", 1e-3)
    names = ["reference", "cpp"]
    if case.op == "cam":
        monkeypatch.setattr(torch, "compile", COMPILE)
        names.append("torch.compile")
    chosen = [provider for provider in cases.providers_of(case, CPU) if provider.name in names]
    found = []
    with clocks.threads_of(1):
        for _ in range(5):
            median = {row["provider"]: row["median_us"] for row in ops.measure(case, CPU, 7, chosen)}
            found.append({name: median[name] / median["cpp"] for name in names})
            if min(found[-1].values()) > 0.8:
                return
    raise AssertionError(f"times as fast as: {found}")


def test_backends_without_a_kernel_are_left_out():
    assert "triton" in cases.why_not("_pgd_step", "triton", CPU)
    assert "cuda" in cases.why_not("_pgd_step", "cuda", CPU)
    if "cpp" in part_fast.available_backends():
        assert cases.why_not("_pgd_step", "cpp", CPU) is None
        with torch.library._scoped_library("part_fast", "FRAGMENT") as library:
            library.define("_none() -> ()")
            assert cases.why_not("_none", "cpp", CPU) == "cpp has no kernel of its own for part_fast::_none"


def test_gpu_clock_rotates_inputs_and_replays_a_graph(monkeypatch):
    """CudaClock on stand-ins for torch.cuda that run on the CPU: what it calls, on which inputs, how it divides."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)  # milliseconds

    class Graph:
        def replay(self):
            log.extend(self.calls)

    @contextlib.contextmanager
    def capture(graph):
        before = len(log)
        yield
        graph.calls = log[before:]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    clock = clocks.CudaClock(torch.device("cuda"))
    assert clock.sets(300, True) == 7  # 2100 bytes: more than twice the 1000 of L2
    assert clock.sets(10**6, True) == 2
    # What Python launches gets few: a hundred sets of PIL's masks would take minutes.
    assert clock.sets(10, True) == 200
    assert clock.sets(10, False) == clocks.LAUNCHED_SETS == 8
    assert clock.sets(300, False) == 7
    for captured in (True, False):
        log.clear()
        provider = cases.Provider("any", lambda which: log.append(which), captured=captured)
        sample, calls = clocks.sampler(provider, [(i,) for i in range(7)], clock)
        assert calls == 7  # 14 ms: long enough
        log.clear()
        assert sample() == pytest.approx(2e-3)
        assert log == list(range(7))
    assert clock.timing(True) == "graph"
    assert clock.timing(False) == "launched"

    # Inside a graph no two calls write the same memory: what one wrote would wait in L2 for the next.
    result = clock.one_pass([lambda: torch.ones(4)] * 3, True)()
    assert len({one.data_ptr() for one in result}) == 3

    levels = iter((100, 100))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(levels))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 175)
    assert clock.peak_bytes(lambda: None) == 75
