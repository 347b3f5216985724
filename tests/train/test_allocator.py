"""Memory that tensors give back is taken again without page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from train.allocator import freed_memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with freed_memory_kept() if sys.argv[1] == "keep" else nullcontext():
    for _ in range(10):  # of one size seven are kept before one is used again
        torch.ones(2**24)  # 64 MiB
    before = faults()
    for _ in range(4):
        torch.ones(2**24)
    print(faults() - before)
print(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
"""


def faults_and_size(how: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries than glibc are left alone")
def test_freed_memory_is_kept_and_given_back_in_the_end() -> None:
    kept, usual = faults_and_size("keep"), faults_and_size("return")
    assert kept[0] < 100 < usual[0]
    assert abs(kept[1] - usual[1]) < 32e6
