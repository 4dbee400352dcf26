"""An S3 server of this machine, in a process of its own: deltalake holds the interpreter's lock while it waits for answers."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import s3fs

from tests.processes import answers, wait_for

__all__ = ["REGION", "loopback_s3"]

REGION = "eu-west-1"
START_S = 60


@contextmanager
def loopback_s3(host: str = "127.0.0.1", on: Sequence[str] = ()) -> Iterator[str]:
    """The endpoint of an S3 without buckets; the environment, also of processes started now, has keys to it.

    Args:
        host: its address.
        on: the command that puts a process onto that host.
    """
    with socket.socket() as probe, pytest.MonkeyPatch.context() as patch:
        if on:
            port = 5000
        else:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": f"{host},localhost",
            "no_proxy": f"{host},localhost",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        probe.close()
        command = [*on, sys.executable, "-W", "ignore", "-m", "moto.server", "-H", host, "-p", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            # A client that was made without keys, or for another server, may be kept.
            s3fs.S3FileSystem.clear_instance_cache()
            try:
                wait_for(lambda: answers(host, port), START_S, "the S3 server")
                yield f"http://{host}:{port}"
            finally:
                server.kill()
