"""A process that keeps what it frees has fewer pages to fault in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

CHURN = """
import resource, sys
from pipeline.allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
import torch
import torchvision
torch.set_num_threads(1)
network = torchvision.models.resnet18()
images = torch.randn(8, 3, 160, 160)
def step():
    network(images).sum().backward()
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_blocks_are_used_again() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(*words: str) -> int:
        command = [sys.executable, "-c", CHURN, *words]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
        return int(done.stdout)

    plain = faults()
    kept = faults("keep")
    if platform.libc_ver()[0] == "glibc":
        assert 3 * kept < plain and plain > 2000
    else:
        assert kept < 2 * plain, "left alone where the allocator is another one"
