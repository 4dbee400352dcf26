"""Hosts of their own, as network namespaces joined by a bridge: one address each, and nothing else they can reach."""

import os
import subprocess
from types import TracebackType

import pytest

__all__ = ["Hosts"]

NET = "198.18.77"
"""Of the range that RFC 2544 keeps for tests of networks; a machine that has a route into it is left alone."""


class Hosts:
    """Namespaces; the caller's own has `NET`.1 on the bridge. Skips the test where they cannot be made.

    Used as a context it removes them; processes in them are the caller's to end before.
    """

    def __init__(self, *names: str) -> None:
        self._bridge = f"brd{os.getpid()}"
        self.addresses = {name: f"{NET}.{number}" for number, name in enumerate(names, 2)}

    def on(self, name: str) -> list[str]:
        """The command that runs another one on a host."""
        return ["ip", "netns", "exec", self._space(name)]

    def unplug(self, name: str) -> None:
        """Takes a host's link down: nothing is closed, packets are lost."""
        _ip("link", "set", self._link(name), "down")

    def __enter__(self) -> "Hosts":
        try:
            if taken := _ip("route", "show", "root", "198.18.0.0/15"):
                pytest.skip(f"this machine has a route into the test's addresses: {taken}")
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"network namespaces cannot be made here: {said}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._remove()

    def _space(self, name: str) -> str:
        return f"{self._bridge}-{name}"

    def _link(self, name: str) -> str:
        return f"{self._bridge}v{self.addresses[name].rpartition('.')[2]}"

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{NET}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, address in self.addresses.items():
            space, link = self._space(name), self._link(name)
            _ip("netns", "add", space)
            _ip("link", "add", link, "master", self._bridge, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "up")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", self._space(name)], capture_output=True)
            # A namespace lives on while a socket of it does: its link goes now, so that the name is free.
            subprocess.run(["ip", "link", "delete", self._link(name)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)


def _ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout.strip()
