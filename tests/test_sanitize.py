"""`make sanitize`: the library that its tests load is watched, and a fault of each kind ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import part_fast

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

pytestmark = pytest.mark.skipif(not SANITIZED, reason="needs the library with sanitizers: make sanitize")

# Raw ops check nothing, so a call can ask for each fault: images of which one is shorter than the others, and a size
# whose square no int64 holds.
FAULTS = {
    "heap-buffer-overflow": "x = torch.rand(1, 3, 64, 64); ops._pgd_step(x, x, x[:, :1, :8, :8].clone(), *EPS)",
    "signed integer overflow": "ops._upsample_cam(torch.rand(1, 4, 4), 2**40, 2**40)",
}


def test_the_sanitized_library_is_the_one_that_is_loaded():
    assert Path(part_fast.__file__).parent.parent.name == "sanitize"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_process(fault):
    code = f"import torch, part_fast; ops = torch.ops.part_fast; EPS = None, .1, .1, .1, 0., 1.; {FAULTS[fault]}"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert fault in run.stderr
    assert "csrc/" in run.stderr
