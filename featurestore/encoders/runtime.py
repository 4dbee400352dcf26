"""Where models run, how values come to a GPU and vectors back, and the process settings that workers run best with on CPU.

Every copy to or from a GPU is made here, out of and into pinned memory, and waits for nothing but itself: threads take turns at
a few streams, so that one batch computes while the next is copied there and the last one back. A thread that waits for its
vectors sleeps until an event of its own stream, and leaves its core to those that decode.

A model of bfloat16 or float16 holds its weights so, and is given its input so. Autocast would keep float32 weights, twice the
memory, and cast them again at every forward, as nothing here is trained.
"""

import ctypes
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import JobError

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOADING", "check_gpu", "device", "giving_memory_back", "keep_freed_memory", "lacks_memory", "placed", "stacked",
    "to_device", "to_host", "tune_process", "turns",
]  # fmt: skip

LOADING = threading.Lock()
"""Held while transformers loads a model: it sets torch's default dtype, which is the process's, and puts back what it found."""

ON_GPU = 2
"""Batches on a GPU at once: one computes while the other is copied; more would only hold its memory."""

# mallopt's parameters (malloc.h). glibc takes a mmap threshold of at most 32 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 2**20
_keeps = False

_SHORT = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where memory is short and it raises no class of its own: its CPU allocator, CUDA, cuBLAS."""


@cache
def device() -> str:
    """The device of every model of this process: `cuda`, the first GPU that it sees, where there is one; else `cpu`.

    A GPU's float32 is float32 from then on, in whatever loads a model: a job, a pipeline of one's own or a search.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    # Else convolutions are rounded to 10 bits of mantissa (TF32): a component moves by 1e-3, and a query's against the store's.
    torch.backends.cudnn.allow_tf32 = False
    return "cuda"


def check_gpu(job: str, accelerator: str | None) -> None:
    """Raises JobError where a GPU is paid for and torch does not compute on it: `device` would take the CPU, at its price.

    Args:
        job: what is to be done on it, as in `encode image`.
        accelerator: its type, as it was rented; None where none was.
    """
    if accelerator is None:
        return
    import torch

    try:
        torch.ones(1, device="cuda").add(1).item()
    except (AssertionError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200].rstrip(". ")
        raise JobError(
            f"{job}: worker {platform.node()} is rented with {accelerator}, and torch {torch.__version__} cannot compute on "
            f"it: {why} (driver {_driver()}, torch's CUDA {torch.version.cuda or 'none'}); nothing was encoded there; use an "
            "image with torch's CUDA build (worker-gpu) and a driver that is new enough for it (CUDA 13: 580), see "
            "infra/docker/README.md, or take accelerator out of the view's resources"
        ) from error


def _driver() -> str:
    """The version of the machine's NVIDIA driver, as its kernel says it."""
    try:
        found = re.search(r"\b\d{3}\.[\d.]+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "none"
    return found[0] if found else "unknown"


def placed(model: Any, *, channels_last: bool = False, compiled: Sequence[str] = ()) -> Any:
    """Bring a model to this process's device, ready to run.

    Args:
        model: a module.
        channels_last: lay its weights out so, as convolutions run best; its images are to be laid out so too.
        compiled: its methods that `torch.compile` compiles, each when it is first called.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.preserve_format
    model = model.eval().requires_grad_(False).to(device(), memory_format=layout)
    for name in compiled:
        setattr(model, name, torch.compile(getattr(model, name)))
    return model


def stacked(arrays: Sequence[NDArray[Any]]) -> "torch.Tensor":
    """Arrays of one shape and dtype as one tensor [len(arrays), …] of this machine, for `to_device`."""
    import torch

    kind = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    batch = torch.empty((len(arrays), *arrays[0].shape), dtype=kind, pin_memory=device() == "cuda")
    np.stack(arrays, out=batch.numpy())
    return batch


def to_device(batch: "torch.Tensor", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """A tensor of this machine where the models are, there cast to a dtype. On a GPU it comes while this thread goes on."""
    if device() == "cuda" and not batch.is_pinned():
        batch = batch.pin_memory()
    return batch.to(device(), non_blocking=True).to(dtype or batch.dtype)


def to_host(made: "torch.Tensor") -> NDArray[np.float32]:
    """A model's output as float32 of this machine. Of a GPU this thread waits for it asleep, and for no other's."""
    import torch

    made = made.float()
    if made.device.type == "cuda":
        there, made = made, torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        made.copy_(there, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()
    vectors: NDArray[np.float32] = made.numpy()
    return vectors


def turns() -> Callable[[], AbstractContextManager[Any]]:
    """Return what a batch is encoded in, of a model that is loaded: on a CPU nothing, on a GPU one of its `ON_GPU` turns.

    Each turn is a stream of its own, however many threads take them: memory that was freed is used again by its stream alone.
    """
    if device() == "cpu":
        return nullcontext
    free: SimpleQueue[AbstractContextManager[Any]] = SimpleQueue()
    for stream in _streams(ON_GPU):
        free.put(stream)

    @contextmanager
    def turn() -> Iterator[None]:
        stream = free.get()
        try:
            with stream:
                yield
        finally:
            free.put(stream)

    return turn


def _streams(count: int) -> list[AbstractContextManager[Any]]:
    import torch

    # They do not wait for the one that the weights came on.
    torch.cuda.synchronize()
    return [torch.cuda.stream(torch.cuda.Stream()) for _ in range(count)]  # type: ignore[no-untyped-call]


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
    global _keeps
    _keeps = True
    mallopt = ctypes.CDLL(None).mallopt
    taken = [
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB),
        mallopt(_M_TRIM_THRESHOLD, 1024 * _MIB),
        mallopt(_M_TOP_PAD, 64 * _MIB),
    ]
    return all(taken)


@contextmanager
def giving_memory_back() -> Iterator[None]:
    """Within, what is large and freed goes back to the system at once, also where the process keeps it else (glibc only)."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    # What is mapped by itself is unmapped by itself, whichever thread asked for it; and no arena has room that it would go to.
    mallopt(_M_MMAP_THRESHOLD, _MIB // 8)
    mallopt(_M_TOP_PAD, 0)
    try:
        yield
    finally:
        if _keeps:
            keep_freed_memory()


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
