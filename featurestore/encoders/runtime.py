"""Process settings that encoders run best with on CPU."""

import ctypes
import platform

__all__ = ["tune_process"]

# mallopt's parameters (malloc.h). glibc takes a mmap threshold of at most 32 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 2**20


def tune_process(torch_threads: int = 1) -> bool:
    """Keep freed memory in the process, and fix how many threads one forward uses.

    Activations are allocated and freed by the megabyte; by default glibc maps and unmaps them, and the kernel zeroes
    every page again: EfficientNet-Lite0 took 1,000 to 3,200 page faults and 1.7 to 4.5 ms of system time for each
    image, and none of either at batch 4 with these settings (an activation must stay below 32 MiB, the highest
    threshold that glibc takes; at batch 16, 77 MB, 2,400 faults remain). Up to 1 GiB of freed memory stays with the
    process. Call it once per worker process; calling it again changes nothing.

    Args:
        torch_threads: threads of one operation. One, where each core has a thread of its own that runs batches.

    Returns:
        Whether the allocator took the settings (glibc only; elsewhere it is left alone).
    """
    import torch

    if torch.get_num_threads() != torch_threads:
        torch.set_num_threads(torch_threads)
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB),
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB),
        mallopt(_M_TOP_PAD, 64 * _MIB),
    ]
    return all(taken)
