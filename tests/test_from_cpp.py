"""part_fast.h gives the bits of the Python functions, and their errors: tests/tools/ops_from_cpp.cpp runs the calls."""

import copy
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, lay

import part_fast
from part_fast import PackedEpsilon
from part_fast.checks import FLOATING
from part_fast.ops.cam import METHODS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("cpp" not in part_fast.available_backends(), reason="part_fast._C is not built"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not on PATH"),
]
Call = dict[str, Any]


@pytest.fixture(scope="module")
def from_cpp(tmp_path_factory) -> Callable[[list[Call]], list[Any]]:
    """What part_fast.h makes of each call: a tensor, or the text of an error."""
    folder, installed = tmp_path_factory.mktemp("cpp"), Path(torch.__path__[0])
    package = Path(part_fast.__path__[0])
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    command = ["c++", "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-isystem", installed / "include"]
    command += [f"-I{package / 'include'}", ROOT / "tests" / "tools" / "ops_from_cpp.cpp", "-o", folder / "ops"]
    command += [f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}", *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def run(calls: list[Call]) -> list[Any]:
        torch.save([plain(call) for call in calls], folder / "input.pt")
        library = package / "_C.abi3.so"
        subprocess.run([folder / "ops", library, folder / "input.pt", folder / "output.pt"], check=True, timeout=100)
        results = torch.load(folder / "output.pt", weights_only=True)
        assert len(results) == len(calls)
        return list(results)

    return run


def plain(call: Call) -> Call:
    """The call as the program reads it: a PackedEpsilon is a tuple, and x_adv, which may be written, nobody else's."""
    call = call | {name: copy.deepcopy(call[name]) for name in ("x_adv", "bank") if name in call}
    return {name: packed_parts(value) if isinstance(value, PackedEpsilon) else value for name, value in call.items()}


def packed_parts(eps: PackedEpsilon) -> tuple[Any, ...]:
    return (eps.bits, *eps.size, eps.eps, eps.eps_low)


def in_python(call: Call) -> torch.Tensor:
    arguments = {name: value for name, value in call.items() if name not in ("op", "no_grad", "requires_grad")}
    if call["op"] in ("pgd_step_", "eps_step_"):
        arguments |= {name: copy.deepcopy(arguments[name]) for name in ("x_adv", "bank") if name in arguments}
    result = getattr(part_fast, call["op"])(**arguments)
    if call["op"] == "eps_step_" and "bank" in call:
        return torch.cat([result.flatten().double(), arguments["bank"].flatten().double()])
    return result.bits if isinstance(result, PackedEpsilon) else result


def assert_same_bits(calls: list[Call], results: list[Any]) -> None:
    with part_fast.backend("cpp"), torch.no_grad():
        for call, result in zip(calls, results, strict=True):
            assert isinstance(result, torch.Tensor), (call["op"], result)
            expected = in_python(call)
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


SHAPE = (2, 3, 5, 7)


LAYOUTS = ["contiguous", "channels_last", "offset channels_last", "cropped", "cropped channels_last"]


def images(layout: str, dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    if layout.startswith("cropped"):
        larger = (2, 3, 5, 9)
        return [lay(torch.rand(larger).to(dtype), layout)[..., 1:8] for _ in range(count)]
    return [lay(torch.rand(SHAPE).to(dtype), layout) for _ in range(count)]


def every_eps(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.rand(2, 3, 5, 7) > 0.5
    return {
        "number": 0.1,
        "zero": 0.0,
        "0-dim": torch.tensor(0.1, dtype=dtype),
        "per image": torch.rand(2, 1, 1, 1, dtype=torch.float64).to(dtype),
        "per channel": torch.rand(3, 1, 1).to(dtype),
        "per column": torch.rand(1, 1, 1, 7).to(dtype),
        "map": torch.rand(2, 1, 5, 7).to(dtype),
        "NaN": torch.full((1, 1, 5, 7), torch.nan, dtype=dtype),
        "packed": PackedEpsilon.pack(mask[:, :1], 0.1, 0.02),
        "packed, 3 channels": PackedEpsilon.pack(mask, 0.1, 0.0),
    }


def test_steps_and_projections(from_cpp):
    calls = []
    for layout, dtype in itertools.product(LAYOUTS, FLOATING):
        (x_adv, grad, x), (_, wide, _) = images(layout, dtype), images("contiguous", torch.float64)
        for eps in every_eps(dtype).values():
            calls.append({"op": "project_linf", "x_adv": x_adv, "x": x, "eps": eps})
            step = {"x_adv": x_adv, "grad": grad - 0.5, "x": x, "eps": eps, "alpha": 0.05, "clip": (0.0, 1.0)}
            calls.append({"op": "pgd_step", **step})
            calls.append({"op": "pgd_step", **step, "grad": wide - 0.5, "alpha": -0.3, "clip": None})
            if not layout.startswith("cropped"):
                calls.append({"op": "pgd_step_", **step, "clip": (0.1, 0.9)})
    x_adv, grad, x = images("contiguous", torch.float32)
    empty = x_adv[:0]
    calls.append({"op": "project_linf", "x_adv": empty, "x": empty, "eps": 0.1})
    calls.append({"op": "project_linf", "x_adv": x_adv, "x": lay(x, "channels_last"), "eps": 0.1})
    calls.append({"op": "project_linf", "no_grad": True, "requires_grad": "x", "x_adv": x_adv, "x": x, "eps": 0.1})
    assert_same_bits(calls, from_cpp(calls))


PLACES = torch.tensor([(3, 1, -2, 1), (0, -1, 0, 0)])


def bank_of() -> Call:
    return {"bank": torch.randint(-127, 128, (4, *SHAPE[1:]), dtype=torch.int8), "places": PLACES, "scale": 0.1}


def test_fast_attacks(from_cpp):
    calls: list[Call] = []
    for layout, dtype in itertools.product(LAYOUTS, FLOATING):
        (x_adv, grad, x), bank = images(layout, dtype), bank_of()
        for number, eps in enumerate(every_eps(dtype).values()):
            clip = (0.1, 0.9) if number % 2 else None
            calls.append(
                {"op": "uniform_start", "x": x, "eps": eps, "seed": 2**62 + number, "scale": 1.5, "clip": clip}
            )
            calls.append({"op": "bank_start", "x": x, "eps": eps, "clip": clip, **bank})
            if not layout.startswith("cropped"):
                step = {"op": "eps_step_", "x_adv": x_adv, "grad": grad - 0.5, "x": x, "eps": eps, "factor": 1.25}
                calls.append({**step, "project": number % 3 > 0, "clip": clip})
                calls.append({**step, "project": True, "clip": clip, **bank})
    assert_same_bits(calls, from_cpp(calls))


def test_maps(from_cpp):
    calls: list[Call] = []
    for layout, dtype in itertools.product(LAYOUTS, FLOATING):
        activation, gradient, _ = images(layout, dtype)
        for method in METHODS:
            calls.append({"op": "cam", "activation": activation, "gradient": gradient - 0.5, "method": method})
    for dtype, rows in itertools.product(FLOATING, [slice(None), slice(None, None, 2)]):
        cam = torch.rand(3, 4, 4).to(dtype)[:, rows]
        here: Call = {"cam": cam, "size": (16, 11)}
        calls.append({"op": "upsample_cam", **here})
        quantiles = [f"quantile:{q}" for q in ("0.25", "0.07", ".5", "0.999999999", "0.1")]
        for rule in ["zscore", "released", *quantiles, "soft"]:
            calls.append({"op": "epsilon_map", **here, "eps": 0.1, "eps_low": 0.02, "rule": rule})
            if rule != "soft":
                calls.append({"op": "cam_mask", **here, "rule": rule})
                calls.append({"op": "packed_epsilon_map", **here, "eps": 0.1, "eps_low": 0.1, "rule": rule})
    assert_same_bits(calls, from_cpp(calls))


def good(op: str) -> Call:
    """A call that passes, for one argument to be made wrong."""
    x_adv, grad, x = torch.zeros(3, *SHAPE)
    step = {"x_adv": x_adv, "grad": grad, "x": x, "eps": 0.1, "alpha": 0.1, "clip": (0.0, 1.0)}
    maps = {"cam": torch.rand(2, 4, 4), "size": (8, 8), "eps": 0.1, "eps_low": 0.0, "rule": "zscore"}
    names = {
        "cam": ("activation", "gradient", "method"),
        "upsample_cam": ("cam", "size"),
        "cam_mask": ("cam", "size", "rule"),
        "epsilon_map": ("cam", "size", "eps", "eps_low", "rule"),
        "packed_epsilon_map": ("cam", "size", "eps", "eps_low", "rule"),
        "project_linf": ("x_adv", "x", "eps"),
        "uniform_start": ("x", "eps", "seed", "scale", "clip"),
        "bank_start": ("x", "eps", "clip", "bank", "places", "scale"),
        "eps_step_": ("x_adv", "grad", "x", "eps", "factor", "project", "clip", "bank", "places", "scale"),
    }
    fast = {**step, **bank_of(), "factor": 1.0, "project": True, "seed": 1}
    features = {"activation": torch.rand(SHAPE), "gradient": torch.rand(SHAPE), "method": "gradcam"}
    given = {"cam": features, "project_linf": step, "pgd_step": step, "pgd_step_": step}.get(op, maps)
    given = fast if op in ("uniform_start", "bank_start", "eps_step_") else given
    return {"op": op, **{name: given[name] for name in names.get(op, step)}}


BITS = torch.zeros(2, 1, 5, dtype=torch.uint8)
COLUMN = (
    "eps must broadcast to (N,C,H,W) by its own dimensions: (N,1,1,1) for one per image, "
    "(1,1,1,W) for one per column, got "
)
# op, argument, what is wrong with it, the message. Python refuses the same argument.
BAD: list[tuple[str, str, Any, str]] = [
    ("cam", "method", "gradcam++", "method must be one of gradcam, xgradcam, layercam, hirescam, got gradcam++"),
    (
        "cam",
        "activation",
        torch.rand(3, 5, 7),
        "activation must have shape (N,K,h,w), K, h and w at least 1, got [3, 5, 7]",
    ),
    (
        "cam",
        "gradient",
        torch.rand(2, 3, 0, 7),
        "gradient must have shape (N,K,h,w), K, h and w at least 1, got [2, 3, 0, 7]",
    ),
    (
        "cam",
        "gradient",
        torch.rand(2, 3, 7, 7),
        "gradient must have the shape of activation, [2, 3, 5, 7], got [2, 3, 7, 7]",
    ),
    ("cam", "gradient", torch.rand(SHAPE).double(), "gradient must have the dtype of activation, Float, got Double"),
    ("cam", "activation", None, "activation must be a tensor, got an undefined one"),
    (
        "upsample_cam",
        "cam",
        torch.zeros(2, 4, 4, dtype=torch.int64),
        "cam must be float32, bfloat16, float16 or float64, got Long",
    ),
    ("upsample_cam", "cam", torch.rand(4, 4), "cam must have shape (N,h,w), h and w at least 1, got [4, 4]"),
    ("upsample_cam", "size", (8, 3), "size must be at least the map's [4, 4], got [8, 3]"),
    ("cam_mask", "size", (-8, 8), "size must be at least the map's [4, 4], got [-8, 8]"),
    ("cam_mask", "rule", "soft", "rule must be one of zscore, released, quantile:q, got soft"),
    ("cam_mask", "rule", "quantile", "rule must be one of zscore, released, quantile:q, got quantile"),
    ("packed_epsilon_map", "rule", "soft", "rule must be one of zscore, released, quantile:q, got soft"),
    ("epsilon_map", "rule", "z-score", "rule must be one of zscore, released, quantile:q, soft, got z-score"),
    *(
        (
            "epsilon_map",
            "rule",
            f"quantile:{q}",
            f"rule must be quantile:q with q a decimal fraction of at most nine digits, 0 < q < 1, got quantile:{q}",
        )
        for q in ("0", "0.0", "1", "1.0", "-0.5", "", ".", "0.2x", "x", "0. 5", "nan")
    ),
    ("epsilon_map", "eps", float("nan"), "eps and eps_low must be finite, 0 <= eps_low <= eps, got nan and 0"),
    ("epsilon_map", "eps", float("inf"), "eps and eps_low must be finite, 0 <= eps_low <= eps, got inf and 0"),
    ("epsilon_map", "eps_low", 0.2, "eps and eps_low must be finite, 0 <= eps_low <= eps, got 0.1 and 0.2"),
    ("packed_epsilon_map", "eps_low", -0.1, "eps and eps_low must be finite, 0 <= eps_low <= eps, got 0.1 and -0.1"),
    ("project_linf", "x", torch.rand(2, 3, 5, 8), "x must have the shape of x_adv, [2, 3, 5, 7], got [2, 3, 5, 8]"),
    ("project_linf", "x", torch.rand(SHAPE).half(), "x must have the dtype of x_adv, Float, got Half"),
    ("project_linf", "x_adv", torch.rand(3, 5, 7), "x_adv must have shape (N,C,H,W), got [3, 5, 7]"),
    (
        "project_linf",
        "x_adv",
        torch.zeros(SHAPE, dtype=torch.uint8),
        "x_adv must be float32, bfloat16, float16 or float64, got Byte",
    ),
    ("project_linf", "eps", -0.1, "eps must be finite and >= 0, got -0.1"),
    ("project_linf", "eps", float("inf"), "eps must be finite and >= 0, got inf"),
    (
        "project_linf",
        "eps",
        torch.rand(7),
        COLUMN + "[7]",
    ),
    (
        "project_linf",
        "eps",
        torch.rand(5, 1),
        COLUMN + "[5, 1]",
    ),
    ("project_linf", "eps", torch.rand(2, 3, 5, 6), "eps must broadcast to the images, [2, 3, 5, 7], got [2, 3, 5, 6]"),
    (
        "project_linf",
        "eps",
        torch.rand(1, 2, 3, 5, 7),
        "eps must broadcast to the images, [2, 3, 5, 7], got [1, 2, 3, 5, 7]",
    ),
    (
        "project_linf",
        "eps",
        torch.zeros(2, 3, 5, 7, dtype=torch.int32),
        "eps must be float32, bfloat16, float16 or float64, got Int",
    ),
    (
        "project_linf",
        "eps",
        (BITS, 5, 8, 0.1, 0.0),
        "eps must broadcast to the images, [2, 3, 5, 7], got bits [2, 1, 5] for size [5, 8]",
    ),
    (
        "project_linf",
        "eps",
        (BITS[:1], 5, 7, 0.1, 0.0),
        "eps must broadcast to the images, [2, 3, 5, 7], got bits [1, 1, 5] for size [5, 7]",
    ),
    (
        "project_linf",
        "eps",
        (BITS[..., :4], 5, 7, 0.1, 0.0),
        "eps must broadcast to the images, [2, 3, 5, 7], got bits [2, 1, 4] for size [5, 7]",
    ),
    ("project_linf", "eps", (BITS, 5, 7, 0.1, 0.2), "eps must have 0 <= eps_low <= eps, got eps_low 0.2 and eps 0.1"),
    ("project_linf", "eps", (BITS.float(), 5, 7, 0.1, 0.0), "eps must have bits of dtype uint8"),
    ("pgd_step", "grad", torch.rand(2, 3, 7, 5), "grad must have the shape of x_adv, [2, 3, 5, 7], got [2, 3, 7, 5]"),
    ("pgd_step", "grad", torch.rand(5, 7), "grad must have shape (N,C,H,W), got [5, 7]"),
    ("pgd_step", "x", torch.rand(SHAPE).bfloat16(), "x must have the dtype of x_adv, Float, got BFloat16"),
    ("pgd_step", "alpha", float("inf"), "alpha must be finite, got inf"),
    ("pgd_step", "clip", (1.0, 0.0), "clip must have low <= high, got 1 and 0"),
    ("pgd_step", "clip", (float("nan"), 1.0), "clip must have low <= high, got nan and 1"),
    ("pgd_step_", "x", None, "x must be a tensor, got an undefined one"),
    ("uniform_start", "seed", -1, "seed must be >= 0, got -1"),
    ("uniform_start", "scale", -1.0, "scale must be finite and >= 0, got -1"),
    ("uniform_start", "clip", (1.0, 0.0), "clip must have low <= high, got 1 and 0"),
    ("bank_start", "bank", torch.zeros(4, 3, 5, 7), "bank must be a tensor of int8"),
    (
        "bank_start",
        "bank",
        torch.zeros(4, 3, 5, 8, dtype=torch.int8),
        "bank must have shape (S,C,H,W), as the images [2, 3, 5, 7], got [4, 3, 5, 8]",
    ),
    ("bank_start", "places", PLACES.int(), "places must be a tensor of int64"),
    (
        "bank_start",
        "places",
        PLACES[:1],
        "places must have shape (2, 4), a row (sample, dy, dx, flip) per image, got [1, 4]",
    ),
    ("bank_start", "scale", 0.0, "scale must be finite and > 0, got 0"),
    ("eps_step_", "factor", float("nan"), "factor must be finite, got nan"),
    ("eps_step_", "x", torch.rand(SHAPE).half(), "x must have the dtype of x_adv, Float, got Half"),
    ("eps_step_", "grad", torch.rand(2, 3, 7, 5), "grad must have the shape of x_adv, [2, 3, 5, 7], got [2, 3, 7, 5]"),
    ("eps_step_", "scale", -1.0, "scale must be finite and > 0, got -1"),
    ("pgd_step_", "eps", torch.rand(2, 1, 7), "eps must broadcast to the images, [2, 3, 5, 7], got [2, 1, 7]"),
]


def test_bad_input(from_cpp):
    calls = [{**good(op), argument: value} for op, argument, value, _ in BAD]
    results = from_cpp(calls)
    assert results == [message for *_, message in BAD]
    for call, (_, argument, value, message) in zip(calls, BAD, strict=True):
        if argument == "eps" and isinstance(value, tuple):
            with pytest.raises((ValueError, TypeError)):
                in_python({**call, "eps": PackedEpsilon(value[0], (value[1], value[2]), *value[3:])})
            continue
        with pytest.raises((ValueError, TypeError)) as caught:
            in_python(call)
        # One word, but for those of a pair, which C++ names together.
        assert str(caught.value).split()[0] in message.split(" must ")[0].split(), (str(caught.value), message)


def test_what_only_cpp_refuses(from_cpp):
    step = good("pgd_step_")
    calls = [
        {**good("project_linf"), "requires_grad": "x_adv"},
        {**step, "eps": torch.rand(2, 1, 5, 7), "requires_grad": "eps"},
        {**step, "x_adv": images("cropped", torch.float32)[0]},
        {**good("cam_mask"), "rule": "quantile:1/4"},
    ]
    expected = [
        r"x_adv must not require a gradient, which no op has in C\+\+: detach it, or use torch::NoGradGuard",
        r"eps must not require a gradient, which no op has in C\+\+: detach it, or use torch::NoGradGuard",
        r"x_adv must be contiguous or channels_last to be written, got strides \[[\d, ]+\]",
        r"rule must be quantile:q with q a decimal fraction of at most nine digits, 0 < q < 1, got quantile:1/4",
    ]
    for result, pattern in zip(from_cpp(calls), expected, strict=True):
        assert isinstance(result, str)
        assert re.fullmatch(pattern, result), result


def test_an_op_before_load_says_so(from_cpp):
    call = good("project_linf")
    (error, result) = from_cpp([{**call, "before_load": True}, call])
    assert error == "part_fast::load must be called before any op"
    assert torch.equal(result, call["x_adv"])


def test_what_is_written_may_not_overlap_what_is_read(from_cpp):
    results = from_cpp([{"op": "overlapping", "argument": name} for name in ("grad", "x", "eps")])
    assert results == [
        "grad must not overlap x_adv in part, got bytes 4 to 52 and 0 to 48",
        "x must not overlap x_adv in part, got bytes 4 to 52 and 0 to 48",
        "eps must not overlap x_adv in part, got bytes 4 to 40 and 0 to 48",
    ]


def test_autograd_refuses_what_was_written_since(from_cpp):
    x = torch.rand(1, 1, 3, 4)
    (error,) = from_cpp([{"op": "written_before_backward", "x_adv": x, "grad": x, "x": x, "eps": 0.1}])
    assert "modified by an inplace operation" in error
