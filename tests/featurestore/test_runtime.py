"""The process keeps the memory that a forward frees."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
import torch
from featurestore.encoders.runtime import tune_process

if sys.argv[1] == "tuned":
    assert tune_process() and tune_process()
    assert torch.get_num_threads() == 1

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        # Two of 16 MiB at a time, as the input and the output of a layer.
        held = np.ones(2**21), np.ones(2**21)
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_tuned_memory_is_not_given_back_and_faulted_in_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("tuned") < 100
    assert faults("as it comes") > 10_000
