"""Where models run, and the process settings that workers run best with on CPU."""

import ctypes
import platform
import sys

__all__ = ["device", "keep_freed_memory", "lacks_memory", "tune_process"]

# mallopt's parameters (malloc.h). glibc takes a mmap threshold of at most 32 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 2**20

_SHORT = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where memory is short and it raises no class of its own: its CPU allocator, CUDA, cuBLAS."""


def device() -> str:
    """The device of every model of this process: `cuda`, the first GPU that it sees, where there is one; else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a forward did not fit into memory: a GPU's, or this machine's."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SHORT)


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of mapping it anew for each large buffer.

    Activations and raw values are allocated and freed by the megabyte; by default glibc maps and unmaps each, and the kernel
    zeroes every page again. Calling again changes nothing.

    Returns:
        Whether the allocator took the settings (glibc only; elsewhere it is left alone).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB),
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB),
        mallopt(_M_TOP_PAD, 64 * _MIB),
    ]
    return all(taken)


def tune_process(torch_threads: int = 1) -> bool:
    """Fix how many threads one forward uses, and keep freed memory.

    Call once per worker process, before the first forward; calling again changes nothing.

    Args:
        torch_threads: threads of one operation. One, where each core has a worker of its own.

    Returns:
        What `keep_freed_memory` returned.
    """
    import torch

    if torch.get_num_threads() != torch_threads:
        torch.set_num_threads(torch_threads)
    return keep_freed_memory()
