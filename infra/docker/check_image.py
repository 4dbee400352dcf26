"""Run while an image is built, as its last step: what a worker would find out in the middle of a job fails the build instead.

Usage: python check_image.py cpu|gpu, with a folder that is not the checkout as the working directory.
"""

import importlib
import importlib.metadata
import os
import pkgutil
import sys

# Python's own modules that need a library of the system.
LINKED = ("bz2", "ctypes", "curses", "lzma", "readline", "sqlite3", "ssl", "uuid", "zlib")
# How a worker begins, and the clients of the stores that it may be sent to.
WORKER = ("apache_beam.runners.worker.sdk_worker_main", "apache_beam.runners.worker.worker_pool_main", "s3fs")
GCP = ("apache_beam.runners.dataflow.dataflow_runner", "apache_beam.io.gcp.gcsio", "gcsfs")
# A Dask cluster has workers of its own, which are no containers of Beam's.
ELSEWHERE = ("dask", "distributed")


def check_python() -> None:
    """Every module imports; Python is the one that Beam's jobs are submitted from."""
    assert sys.version_info[:2] == (3, 11), sys.version
    for name in (*LINKED, *WORKER, *GCP):
        importlib.import_module(name)


def check_braid() -> None:
    """Braid is installed whole, from no checkout, and all of it imports."""
    for package in ("featurestore", "pipelines", "jobs"):
        found = importlib.import_module(package)
        assert "site-packages" in next(iter(found.__path__)), f"{package} is from {list(found.__path__)}"
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in ELSEWHERE:
                    raise


def check_torch(device: str) -> None:
    """The build of torch is the image's: the CUDA build runs on a CPU too, at 3 GB more, and no GPU is used by the other."""
    import torch

    if device == "gpu":
        assert torch.version.cuda, f"torch {torch.__version__} is built without CUDA"
    elif torch.version.cuda:
        sys.exit(
            f"torch {torch.__version__} is the CUDA build; pass --build-arg TORCH_WHEELS=… with the address of an index of its "
            "CPU wheels, or leave it out for PyTorch's own; see infra/docker/README.md"
        )


def check_weights() -> None:
    """Every encoder that needs no option loads with no network. The weights of the others are files that a view names."""
    assert os.environ.get("HF_HUB_OFFLINE") == "1", (
        "HF_HUB_OFFLINE is not set: a missing model would be fetched at run time"
    )
    from featurestore import encoders

    for key in encoders.ready():
        encoder = encoders.find(key)
        encoder.load()
        print(f"{key}: {encoder.dim} dimensions, fingerprint {encoder.fingerprint()}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["cpu"], ["gpu"]):
        sys.exit(__doc__)
    check_python()
    check_braid()
    check_torch(sys.argv[1])
    check_weights()
    print(f"apache-beam {importlib.metadata.version('apache-beam')}, braid {importlib.metadata.version('braid')}: good")
