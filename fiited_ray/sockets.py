"""All-to-all between workers on CPUs over sockets of our own.

A collective of torch.distributed's gloo is handed from thread to thread four times on its way. Where cores are busy each of them has to
wait for one, which takes longer than the data. Here the calling thread sends and receives by itself (`cuda_ext/cpu/sockets.cpp`).

Every pair of workers has one TCP connection. They tell each other their addresses through the process group, and who connects shows the
random word that came with an address. Data are not encrypted, as they are not with gloo and NCCL: see SECURITY.md.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fiited_ray.store.ops import host_ops

_WORD_BYTES = 16
_RANK_BYTES = 4


class Peers:
    """This worker's connections to all others of a group. All workers make theirs together, and call `all_to_all` in the same order.

    Args:
        timeout_seconds: connecting, or an operation, that takes longer is an error.

    Raises:
        TimeoutError: when not all workers have connected in time.
        OSError: when an address that a worker told cannot be reached.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float) -> None:
        self.rank, self.workers = dist.get_rank(group), dist.get_world_size(group)
        self._timeout = timeout_seconds
        self._operation = 0
        self._sockets = _connect_all(group, self.rank, self.workers, timeout_seconds)
        self._descriptors = [-1 if each is None else each.fileno() for each in self._sockets]

    def all_to_all(self, out: Tensor, rows: Tensor, send: list[int], receive: list[int]) -> None:
        """Send the first send[0] bytes of `rows` to worker 0, the next send[1] to worker 1, ...; `out` is filled alike.

        Raises:
            RuntimeError: naming the worker that closed its connection, sent something else, or did not in time.
        """
        self._operation += 1
        host_ops().all_to_all(self._descriptors, self.rank, out, rows, send, receive, self._operation, self._timeout)

    def all_to_all_with(
        self, out: Tensor, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, list[int]]:
        """The same, and behind each part of `rows` one of `more`, send_more[k] bytes for worker k, in the same message.

        Returns:
            what came of `more`, uint8 [n], and how many bytes of it from each worker.
        """
        self._operation += 1
        arrived, sizes = host_ops().all_to_all_with(
            self._descriptors, self.rank, out, rows, send, receive, more, send_more, self._operation, self._timeout
        )
        return arrived, sizes.tolist()


def _connect_all(group: dist.ProcessGroup, rank: int, workers: int, timeout_seconds: float) -> list[socket.socket | None]:
    """A connected socket for each other worker: to lower ranks by calling them, from higher ones by being called."""
    end = time.monotonic() + timeout_seconds
    found: list[socket.socket | None] = [None] * workers
    host, word = _own_address(), secrets.token_bytes(_WORD_BYTES)
    with socket.create_server((host, 0), family=_family(host), backlog=workers) as server:
        told: list[Any] = [None] * workers
        dist.all_gather_object(told, (host, server.getsockname()[1], word), group=group)
        for peer, (its_host, its_port, its_word) in enumerate(told[:rank]):
            connected = found[peer] = socket.create_connection((its_host, its_port), timeout=timeout_seconds)
            connected.sendall(its_word + rank.to_bytes(_RANK_BYTES, "little"))
        while missing := [peer for peer in range(rank + 1, workers) if found[peer] is None]:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                raise TimeoutError(f"worker {rank}: workers {missing} have not connected within {timeout_seconds:.0f} s") from None
            its_rank = _greeted(caller, word, max(0.01, end - time.monotonic()))
            if its_rank is not None and its_rank in missing:
                found[its_rank] = caller
            else:
                caller.close()
    for each in found:
        if each is not None:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
    return found


def _greeted(caller: socket.socket, word: bytes, seconds: float) -> int | None:
    """The rank that a caller shows with our word; None for one who does not know it."""
    caller.settimeout(min(5.0, seconds))
    shown = b""
    try:
        while len(shown) < _WORD_BYTES + _RANK_BYTES:
            part = caller.recv(_WORD_BYTES + _RANK_BYTES - len(shown))
            if not part:
                return None
            shown += part
    except OSError:
        return None
    return int.from_bytes(shown[_WORD_BYTES:], "little") if hmac.compare_digest(shown[:_WORD_BYTES], word) else None


def _own_address() -> str:
    """The address by which this machine reaches the first worker; this machine's own loop where no first worker has been named."""
    master = os.environ.get("MASTER_ADDR")
    if master is None:
        return "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
