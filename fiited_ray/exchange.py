"""What workers tell each other in a step: all-to-all of rows of tensors, and sums; for one worker, over nothing."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fiited_ray.sockets import Peers

_FEW = 16384  # values to be summed that a worker gets to see, of all workers together: more go on their way in parts


class Exchange(Protocol):
    """The collective operations an embedding needs. Every worker calls each of them in the same order."""

    rank: int
    workers: int
    bytes_sent: int  # to other workers, since the exchange was made

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send rows[0:send[0]] to worker 0, the next send[1] rows to worker 1, ...; returns receive[0] rows of worker 0, ..."""

    def all_to_all_with(
        self, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """The same, and behind each part of `rows` one of `more`, of which only the sender knows how much there is.

        Between CPUs both go in one message. Returns what came of both, and how many rows of `more` each worker has sent.
        """

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all workers."""

    def another(self) -> Exchange:
        """A second way between the same workers, for another thread: its operations cannot cross those of this one."""


class Solo:
    """One worker: nothing to exchange."""

    rank = 0
    workers = 1
    bytes_sent = 0

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return rows

    def all_to_all_with(
        self, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        return rows, more, send_more

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def another(self) -> Solo:
        return Solo()


class Group:
    """Workers of a torch.distributed process group: CUDA tensors go by it (NCCL), those on CPUs by sockets of our own.

    Args:
        group: a group of its own, so that its operations cannot cross those of the dense parameters.
        timeout: an operation that takes longer is an error; None: half an hour, which is torch's own.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        self.group = group
        self._timeout = timeout
        self.rank = dist.get_rank(group)
        self.workers = dist.get_world_size(group)
        self.bytes_sent = 0
        self._peers = Peers(group, (timeout or dist.default_pg_timeout).total_seconds())

    def all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out, row = rows.new_empty((sum(receive), *rows.shape[1:])), _row_bytes(rows)
        if self._by_sockets(rows):
            self._peers.all_to_all(out, rows.contiguous(), [row * each for each in send], [row * each for each in receive])
        elif row:
            dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        self._count(row, send)
        return out

    def all_to_all_with(
        self, rows: Tensor, send: list[int], receive: list[int], more: Tensor, send_more: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        if not self._by_sockets(more):
            ones = [1] * self.workers
            receive_more: list[int] = self.all_to_all(torch.tensor(send_more), ones, ones).tolist()
            return self.all_to_all(rows, send, receive), self.all_to_all(more, send_more, receive_more), receive_more
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        row, more_row = _row_bytes(rows), _row_bytes(more)
        arrived, sizes = self._peers.all_to_all_with(
            out,
            rows.contiguous(),
            [row * each for each in send],
            [row * each for each in receive],
            more.contiguous(),
            [more_row * each for each in send_more],
        )
        self._count(row, send)
        self._count(more_row, send_more)
        return out, arrived.view(more.dtype).view(-1, *more.shape[1:]), [each // more_row for each in sizes]

    def _by_sockets(self, values: Tensor) -> bool:
        return values.device.type == "cpu"

    def _count(self, row_bytes: int, send: list[int]) -> None:
        self.bytes_sent += (sum(send) - send[self.rank]) * row_bytes

    def all_reduce(self, values: Tensor) -> Tensor:
        if not self._by_sockets(values):
            out = values.clone()
            dist.all_reduce(out, group=self.group)
            return out
        flat = values.reshape(-1)
        if flat.numel() * self.workers <= _FEW:  # all send all
            return self._sum(flat.expand(self.workers, -1), [flat.numel()] * self.workers).view_as(values)
        # Each sums a part of them, and tells all others.
        parts = [len(part) for part in flat.tensor_split(self.workers)]
        mine, all_values = self._sum(flat, parts), torch.empty_like(flat)
        sizes = [values.element_size() * part for part in parts]
        self._peers.all_to_all(all_values, mine.repeat(self.workers), [sizes[self.rank]] * self.workers, sizes)
        return all_values.view_as(values)

    def _sum(self, values: Tensor, parts: list[int]) -> Tensor:
        """Send the first parts[0] of the values to worker 0, and so on; what came from all workers, added in the order of ranks."""
        arrived = values.new_empty((self.workers, parts[self.rank]))
        size = values.element_size()
        self._peers.all_to_all(arrived, values.contiguous(), [size * part for part in parts], [size * arrived.shape[1]] * self.workers)
        return arrived.sum(0, dtype=values.dtype)

    def another(self) -> Group:
        return Group(dist.new_group(dist.get_process_group_ranks(self.group), self._timeout), self._timeout)


def _row_bytes(rows: Tensor) -> int:
    return rows.element_size() * math.prod(rows.shape[1:])


def make_exchange(timeout_seconds: float | None = None) -> Exchange:
    """The exchange of this process: `Group` over a new process group where torch.distributed runs, `Solo` elsewhere.

    Args:
        timeout_seconds: an operation that takes longer is an error; None: torch's own, half an hour.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        return Group(dist.new_group(timeout=timeout), timeout)
    return Solo()


def splits(sizes: Tensor, counts: list[int]) -> list[int]:
    """Sum `sizes` (int64 [sum of counts]) over consecutive groups of `counts` members."""
    ends = torch.cumsum(torch.tensor(counts, device=sizes.device), 0)
    nothing = sizes.new_zeros(1)
    sums = torch.cat([nothing, torch.cumsum(sizes, 0)])[ends]
    return torch.diff(sums, prepend=nothing).tolist()
