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
torch.set_num_threads(1)
def step():  # blocks of 40 MB: more than the allocator ever learns to keep by itself
    maps = [torch.ones(10_000_000)]
    while len(maps) < 4:
        maps.append(maps[-1].mul(2))
for _ in range(6):  # until free pieces of all sizes lie ready
    step()
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
        assert 2 * kept < plain
    else:
        assert kept < 2 * plain, "left alone where the allocator is another one"
