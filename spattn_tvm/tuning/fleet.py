"""A fleet of machines that measure: the servers that are registered with TVM's RPC tracker under a key.

Whoever reaches a TVM server may run any code on it, so both belong in a network of trusted machines.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_CONNECT_TIMEOUT_S = 5.0


class ServerLostError(RuntimeError):
    """A server can't be reached any more: it died, or a kernel took its process along."""


@dataclass(frozen=True)
class Fleet:
    """Servers of one kind, by their tracker and key.

    Parameters
    ----------
    host : str
        Of the tracker.
    port : int
    key : str
        What the servers were started with.
    """

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, address: str, key: str | None) -> Fleet:
        """A fleet from ``HOST:PORT`` and a key.

        Raises
        ------
        ValueError
            When the address has another form, or the key is missing.
        """
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"an RPC tracker's address is HOST:PORT, such as 10.0.0.5:9190, got {address!r}")
        if not key or any(character.isspace() for character in key):
            raise ValueError(f"give the key that the servers were started with (--key h200), got {key!r}")
        return cls(host.strip("[]"), int(port), key)

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the tracker."""
        return f"{self.host}:{self.port}"

    def servers(self) -> list[str]:
        """``HOST:PORT`` of each server that is registered under the key now, busy or not.

        Raises
        ------
        RuntimeError
            When no tracker answers at the address.
        """
        return sorted(_server_name(entry) for entry in self._registered() if _key_of(entry) == self.key)

    def require_servers(self) -> list[str]:
        """As :meth:`servers`, at least one.

        Raises
        ------
        RuntimeError
            When no tracker answers, or none of its servers has the key; names those it has.
        """
        registered = self._registered()
        servers = sorted(_server_name(entry) for entry in registered if _key_of(entry) == self.key)
        if not servers:
            others = sorted({_key_of(entry) for entry in registered})
            known = f"it has servers under {', '.join(others)}" if others else "it has no servers at all"
            raise RuntimeError(
                f"no server is registered under the key {self.key!r} with the tracker {self.address}; {known}"
                f". On each machine: python -m tvm.exec.rpc_server --tracker {self.address} --key {self.key}"
            )
        return servers

    def claim(self, wait_s: float) -> tuple[str, int, str]:
        """Host, port and one-time password of a server that is free, once one is.

        Parameters
        ----------
        wait_s : float
            How long the present users of the servers may keep it waiting.

        Raises
        ------
        RuntimeError
            When no tracker answers, or no server becomes free in time.
        """
        from tvm.rpc.base import TrackerCode

        with self._connection() as tracker:
            tracker.settimeout(wait_s)
            try:
                answer = _ask(tracker, [TrackerCode.REQUEST, self.key, "", 1])
            except TimeoutError:
                raise RuntimeError(
                    f"no server of the key {self.key!r} became free within {wait_s:.0f} s "
                    f"(tracker {self.address})"
                ) from None
        host, port, password = answer[1]
        return str(host), int(port), str(password)

    def _registered(self) -> list[dict[str, Any]]:
        from tvm.rpc.base import TrackerCode

        with self._connection() as tracker:
            return list(_ask(tracker, [TrackerCode.SUMMARY])[1]["server_info"])

    @contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        # TVM's own client tries for a minute where nothing listens, and waits forever for whatever does.
        try:
            tracker = socket.create_connection((self.host, self.port), timeout=_CONNECT_TIMEOUT_S)
        except OSError as error:
            raise RuntimeError(
                f"no RPC tracker listens at {self.address} ({error}); start one there: python -m "
                f"tvm.exec.rpc_tracker --host 0.0.0.0 --port {self.port} --port-end {self.port + 1}"
            ) from None
        from tvm.rpc.base import RPC_TRACKER_MAGIC, recvall

        with tracker:
            try:
                tracker.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
                greeting = struct.unpack("<i", recvall(tracker, 4))[0]
            except OSError as error:
                raise RuntimeError(f"what listens at {self.address} is no RPC tracker: {error}") from None
            if greeting != RPC_TRACKER_MAGIC:
                raise RuntimeError(f"what listens at {self.address} is no RPC tracker: it says {greeting:#x}")
            yield tracker


def _ask(tracker: socket.socket, question: list[Any]) -> Any:
    from tvm.rpc.base import recvjson, sendjson

    sendjson(tracker, question)
    return recvjson(tracker)


def _key_of(entry: dict[str, Any]) -> str:
    return str(entry["key"]).removeprefix("server:")


def _server_name(entry: dict[str, Any]) -> str:
    host, port = entry["addr"]
    return f"{host}:{port}"
