"""`make sanitize` and `make sanitize-threads`: the library that the tests load is watched, and a fault of each kind is
reported and ends the process with an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import part_fast

LOADED = os.environ.get("LD_PRELOAD", "")

pytestmark = pytest.mark.skipif(
    "libasan" not in LOADED and "libtsan" not in LOADED,
    reason="needs the library with sanitizers: make sanitize, make sanitize-threads",
)

# Raw ops check nothing, so a call can ask for each fault: images of which one is shorter than the others, a size whose
# square no int64 holds, and two threads that write into one tensor.
FAULTS = {
    "heap-buffer-overflow": "x = torch.rand(1, 3, 64, 64); ops._pgd_step(x, x, x[:, :1, :8, :8].clone(), *EPS)",
    "signed integer overflow": "ops._upsample_cam(torch.rand(1, 4, 4), 2**40, 2**40)",
}
RACES = {
    "data race": """
import threading
x = torch.rand(4, 3, 64, 64)
threads = [threading.Thread(target=ops._pgd_step_, args=(x, x.clone(), x.clone(), *EPS)) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
}


def test_the_sanitized_library_is_the_one_that_is_loaded():
    assert Path(part_fast.__file__).parent.parent.name == ("sanitize" if "libasan" in LOADED else "sanitize-threads")


@pytest.mark.parametrize("fault", FAULTS if "libasan" in LOADED else RACES)
def test_a_fault_ends_the_process(fault):
    code = (
        f"import torch, part_fast; ops = torch.ops.part_fast; EPS = None, .1, .1, .1, 0., 1.; {(FAULTS | RACES)[fault]}"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert fault in run.stderr
    assert "csrc/" in run.stderr
