"""All-to-all over sockets: threads of this process as workers, each with a connection to every other."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fiited_ray import sockets
from fiited_ray.exchange import Group
from fiited_ray.sockets import Peers
from fiited_ray.store.ops import ops


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """Sockets are the CPU's alone."""


class Mesh:
    """Connected sockets between all of some workers."""

    def __init__(self, workers: int) -> None:
        self.sockets: list[list[socket.socket | None]] = [[None] * workers for _ in range(workers)]
        for left in range(workers):
            for right in range(left):
                self.sockets[left][right], self.sockets[right][left] = socket.socketpair()

    def exchange(
        self,
        rank: int,
        rows: torch.Tensor,
        send: list[int],
        receive: list[int],
        operation: int = 1,
        timeout: float = 20.0,
    ) -> torch.Tensor:
        out = torch.empty(sum(receive), dtype=torch.uint8)
        ops("cpu").all_to_all(self.files(rank), rank, out, rows, send, receive, operation, timeout)
        return out

    def exchange_with(
        self,
        rank: int,
        rows: torch.Tensor,
        send: list[int],
        receive: list[int],
        more: torch.Tensor,
        send_more: list[int],
        operation: int = 1,
        timeout: float = 20.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = torch.empty(sum(receive), dtype=torch.uint8)
        return out, *ops("cpu").all_to_all_with(self.files(rank), rank, out, rows, send, receive, more, send_more, operation, timeout)

    def files(self, rank: int) -> list[int]:
        return [-1 if each is None else each.fileno() for each in self.sockets[rank]]

    def close(self, rank: int) -> None:
        for each in self.sockets[rank]:
            if each is not None:
                each.close()


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [0, 7, 300_000])  # bytes of a part: none, few, more than a socket holds
def test_each_part_arrives_at_its_worker_in_the_order_of_ranks(workers: int, most: int) -> None:
    generator = torch.Generator().manual_seed(workers)
    mesh = Mesh(workers)
    with ThreadPoolExecutor(workers) as pool:
        for operation in range(3):
            sizes = torch.randint(0, most + 1, (workers, workers), generator=generator)
            parts = [[torch.randint(0, 256, (size,), generator=generator).to(torch.uint8) for size in row] for row in sizes.tolist()]

            def work(rank: int, sizes: Any = sizes, parts: Any = parts, operation: int = operation) -> torch.Tensor:
                send, receive = sizes[rank].tolist(), sizes[:, rank].tolist()
                return mesh.exchange(rank, torch.cat(parts[rank]), send, receive, operation)

            for rank, out in enumerate(pool.map(work, range(workers))):
                assert torch.equal(out, torch.cat([parts[other][rank] for other in range(workers)]))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("most", [0, 7, 300_000])
def test_parts_of_a_size_that_only_the_sender_knows_come_behind_the_others(workers: int, most: int) -> None:
    generator = torch.Generator().manual_seed(workers)
    mesh = Mesh(workers)

    def drawn(sizes: torch.Tensor) -> list[list[torch.Tensor]]:
        return [[torch.randint(0, 256, (size,), generator=generator).to(torch.uint8) for size in row] for row in sizes.tolist()]

    with ThreadPoolExecutor(workers) as pool:
        for operation in range(3):
            sizes, more_sizes = torch.randint(0, most + 1, (2, workers, workers), generator=generator)
            more_sizes[0, -1] = 0
            parts, more = drawn(sizes), drawn(more_sizes)

            def work(rank: int, known: Any = (sizes, parts), told: Any = (more_sizes, more), operation: int = operation) -> Any:
                time.sleep(0.01 * rank)  # messages wait for the header of the last one
                send, receive = known[0][rank].tolist(), known[0][:, rank].tolist()
                return mesh.exchange_with(
                    rank, torch.cat(known[1][rank]), send, receive, torch.cat(told[1][rank]), told[0][rank].tolist(), operation
                )

            for rank, (out, more_out, told) in enumerate(pool.map(work, range(workers))):
                assert torch.equal(out, torch.cat([parts[other][rank] for other in range(workers)]))
                assert torch.equal(more_out, torch.cat([more[other][rank] for other in range(workers)]))
                assert told.tolist() == more_sizes[:, rank].tolist()


def test_who_sends_more_where_nothing_more_is_expected_is_named() -> None:
    mesh, some = Mesh(2), torch.zeros(4, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(mesh.exchange_with, 1, some, [4, 0], [4, 0], some, [4, 0], 1, 1.0)
        with pytest.raises(RuntimeError, match="exchange with worker 1: it sends 4 bytes more than are expected"):
            mesh.exchange(0, some, [0, 4], [0, 4])
        sent.result()


def test_one_that_has_all_waits_for_the_worker_that_has_said_nothing_and_names_it() -> None:
    mesh, some = Mesh(3), torch.zeros(4, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(mesh.exchange_with, 1, some, [2, 0, 2], [2, 0, 2], some, [4, 0, 0], 1, 1.0)
        with pytest.raises(RuntimeError, match="exchange with worker 2: not done within 1 s"):
            mesh.exchange_with(0, some, [0, 2, 2], [0, 2, 2], some, [0, 0, 4], 1, 1.0)
        with pytest.raises(RuntimeError, match="exchange with worker 2: not done within 1 s"):
            told.result()


def test_large_parts_both_ways_wait_for_nobody() -> None:
    mesh, size = Mesh(2), 32 << 20
    rows = [torch.full((size,), 1 + rank, dtype=torch.uint8) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda rank: mesh.exchange(rank, rows[rank], [0, size][:: 1 - 2 * rank], [0, size][:: 1 - 2 * rank]), range(2)
        )
    assert bool((first == 2).all())
    assert bool((second == 1).all())


def test_who_sends_another_number_of_bytes_is_named() -> None:
    mesh = Mesh(2)
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(mesh.exchange, 1, torch.zeros(3, dtype=torch.uint8), [3, 0], [0, 0], 1, 0.5)
        with pytest.raises(
            RuntimeError, match="exchange with worker 1: it sends 3 bytes in operation 1, but 5 are expected in operation 1"
        ):
            mesh.exchange(0, torch.zeros(0, dtype=torch.uint8), [0, 0], [0, 5])
        sent.result()


def test_who_is_at_another_operation_is_named() -> None:
    mesh = Mesh(2)
    nothing = torch.zeros(0, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(mesh.exchange, 1, nothing, [0, 0], [0, 0], 8)
        with pytest.raises(RuntimeError, match="worker 1: it sends 0 bytes in operation 8, but 0 are expected in operation 7"):
            mesh.exchange(0, nothing, [0, 0], [0, 0], 7)
        with pytest.raises(RuntimeError, match="worker 0: it sends 0 bytes in operation 7"):
            other.result()


@pytest.mark.parametrize("size", [0, 5, 32 << 20])
def test_a_worker_that_has_gone_is_named(size: int) -> None:
    mesh = Mesh(3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mesh.exchange, 0, torch.zeros(2 * size, dtype=torch.uint8), [0, size, size], [0, size, size])
        time.sleep(0.05)
        mesh.close(2)
        with pytest.raises(RuntimeError, match=r"exchange with worker 2: (connection closed by it|Broken pipe|Connection reset by peer)"):
            waiting.result()


def test_a_worker_that_says_nothing_is_waited_for_no_longer_than_agreed() -> None:
    mesh, start = Mesh(2), time.monotonic()
    with pytest.raises(RuntimeError, match="exchange with worker 1: not done within 1 s"):
        mesh.exchange(0, torch.zeros(0, dtype=torch.uint8), [0, 0], [0, 1], timeout=1.0)
    assert 0.9 < time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("send", "receive", "message"),
    [
        ([1, 1], [1, 2], "the parts of an exchange are not all of what is exchanged"),
        ([1, 2], [2, 1], "what a worker keeps of an exchange changes its size"),
        ([4, -1], [4, -1], "a part of an exchange has -1 bytes"),
        ([3], [3], "an exchange needs a socket and the sizes of what goes and comes"),
    ],
)
def test_parts_that_cannot_be_are_refused(send: list[int], receive: list[int], message: str) -> None:
    mesh = Mesh(2)
    with pytest.raises(RuntimeError, match=message):
        mesh.exchange(0, torch.zeros(3, dtype=torch.uint8), send, receive)


class Gathering:
    """Stands for torch.distributed among threads; a stranger calls rank 0 before any worker does."""

    def __init__(self, workers: int, monkeypatch: pytest.MonkeyPatch, stranger: bytes | None = None) -> None:
        self.workers, self.stranger = workers, stranger
        self._rank, self._told = threading.local(), [None] * workers
        self._barrier = threading.Barrier(workers)
        monkeypatch.setattr(dist, "get_rank", lambda group: self._rank.value)
        monkeypatch.setattr(dist, "get_world_size", lambda group: workers)
        monkeypatch.setattr(dist, "all_gather_object", self._gather)

    def _gather(self, out: list[Any], mine: Any, group: Any) -> None:
        self._told[self._rank.value] = mine
        self._barrier.wait()
        out[:] = self._told
        if self.stranger is not None and self._rank.value == 0:
            self.caller = socket.create_connection(mine[:2])
            self.caller.sendall(self.stranger)
            self.caller.shutdown(socket.SHUT_WR)
        self._barrier.wait()

    def enter(self, rank: int) -> None:
        """Be this worker, in this thread."""
        self._rank.value = rank

    def peers(self, rank: int, seconds: float = 20.0) -> Peers:
        self.enter(rank)
        return Peers(None, seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stranger", [None, b"", b"GET / HTTP/1.1\r\n\r\n", bytes(16) + (1).to_bytes(4, "little")], ids=["none", "mute", "http", "guess"]
)
def test_all_workers_are_connected_and_strangers_are_not(stranger: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = 4
    gathering = Gathering(workers, monkeypatch, stranger)
    ones = [8] * workers

    def work(rank: int) -> list[int]:
        peers = gathering.peers(rank)
        out = torch.empty(workers, dtype=torch.int64)
        for _ in range(2):
            peers.all_to_all(out, 10 * rank + torch.arange(workers), ones, ones)
        return out.tolist()

    with ThreadPoolExecutor(workers) as pool:
        for rank, out in enumerate(pool.map(work, range(workers))):
            assert out == [10 * other + rank for other in range(workers)]
    if stranger is not None:
        gathering.caller.settimeout(5.0)
        assert gathering.caller.recv(1) == b""  # it was hung up on


def test_rows_of_two_kinds_go_together_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gathering = Gathering(3, monkeypatch)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor, list[int], int]:
        gathering.enter(rank)
        group = Group(None)  # type: ignore[arg-type]
        rows, more = torch.full((3, 2), rank, dtype=torch.int64), torch.full((3 * rank, 5), float(rank))
        return *group.all_to_all_with(rows, [1, 1, 1], [1, 1, 1], more, [rank] * 3), group.bytes_sent

    with ThreadPoolExecutor(3) as pool:
        for rank, (rows, more, counts, sent) in enumerate(pool.map(work, range(3))):
            assert rows.tolist() == [[0, 0], [1, 1], [2, 2]]
            assert more.tolist() == [[1.0] * 5, [2.0] * 5, [2.0] * 5]
            assert counts == [0, 1, 2]
            assert sent == 2 * (2 * 8 + rank * 5 * 4)


def test_rows_and_sums_keep_shape_and_dtype_and_the_bytes_that_leave_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gathering = Gathering(3, monkeypatch)

    def work(rank: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        gathering.enter(rank)
        group = Group(None)  # type: ignore[arg-type]
        rows = group.all_to_all(torch.full((3, 2), rank, dtype=torch.int32), [0, 1, 2], [rank, rank, rank])
        numbers = (
            torch.tensor([1, 2**40]),
            torch.full((2, 3), 0.25, dtype=torch.float64),
            torch.zeros(0),
            torch.tensor(1, dtype=torch.int32),
            rank + torch.arange(4000, dtype=torch.int32).reshape(40, 100).t(),  # many: by parts, which are not equal
        )
        return rows, [group.all_reduce(each) for each in numbers], group.bytes_sent

    with ThreadPoolExecutor(3) as pool:
        for rank, (rows, sums, sent) in enumerate(pool.map(work, range(3))):
            assert rows.dtype == torch.int32
            assert rows.tolist() == [[other, other] for other in range(3) for _ in range(rank)]
            assert [each.dtype for each in sums] == [torch.int64, torch.float64, torch.float32, torch.int32, torch.int32]
            assert [each.tolist() for each in sums[:4]] == [[3, 3 * 2**40], [[0.75] * 3] * 2, [], 3]
            assert sums[4].equal((3 + 3 * torch.arange(4000, dtype=torch.int32)).reshape(40, 100).t())
            assert sent == (3 - rank) * 2 * 4


def test_workers_that_do_not_connect_in_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gathering = Gathering(3, monkeypatch)
    real = sockets._connect_all

    def connect(group: Any, rank: int, workers: int, seconds: float) -> Any:
        if rank == 2:  # tells its address, and is then slow
            gathering._gather([], ("127.0.0.1", 9, b""), group)
            return [None] * workers
        return real(group, rank, workers, seconds)

    monkeypatch.setattr(sockets, "_connect_all", connect)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(gathering.peers, rank, 1.0) for rank in range(3)]
        with pytest.raises(TimeoutError, match=r"worker 0: workers \[2\] have not connected within 1 s"):
            found[0].result()


def test_a_machine_takes_the_address_by_which_it_reaches_the_first_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert sockets._own_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert sockets._own_address() in ("127.0.0.1", "::1")
