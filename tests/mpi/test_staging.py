"""Collectives on device arrays against the same on host arrays, with copies and kernels that are late."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from mpi4py import MPI

from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import prepare_allgather, prepare_allreduce, prepare_alltoall, prepare_reduce_scatter
from hpcnn.comm.staging import touched
from hpcnn.errors import CommError
from hpcnn.geometry import blocks
from hpcnn.plan import schedules
from tests.device import FakeArray, FakeCopies, on_device
from tests.worlds import world

COUNT = 1003


@pytest.fixture
def engine():
    made = Engine(world().comm, segment_bytes=512)
    made.copies = FakeCopies(seed=world().rank)
    yield made
    made.free()


def bounds(size: int, count: int = COUNT) -> list[int]:
    return [block.start for block in blocks(count, size)] + [count]


def prepare(kind: str, engine: Engine, array: object, algorithm: str, wire: str) -> Collective:
    if kind == "allreduce":
        return prepare_allreduce(engine, array, algorithm, wire=wire, label=kind)
    if kind == "alltoall":
        return prepare_alltoall(engine, array, counts(engine.size), wire=wire)
    make = prepare_allgather if kind == "allgather" else prepare_reduce_scatter
    return make(engine, array, bounds(engine.size), algorithm, wire=wire)


def counts(size: int) -> list[list[int]]:
    return [[17 + 3 * source + target for target in range(size)] for source in range(size)]


def meaningful(kind: str, engine: Engine, array: np.ndarray) -> np.ndarray:
    """Return the part of the result that means anything."""
    return array[slice(*bounds(engine.size)[engine.rank :][:2])] if kind == "reduce_scatter" else array


def length(kind: str, engine: Engine) -> int:
    return schedules.alltoall_places(engine.rank, counts(engine.size))[1][-1] if kind == "alltoall" else COUNT


CASES = [
    *(("allreduce", name, wire) for name in ("butterfly", "ring", "halving-doubling") for wire in ("fp32", "bf16")),
    *((kind, name, "fp32") for kind in ("reduce_scatter", "allgather") for name in ("butterfly", "ring", "mpi")),
    ("allgather", "ring", "fp16"),
    ("reduce_scatter", "pairwise", "bf16"),
    ("allreduce", "mpi", "fp32"),
    ("alltoall", "pairwise", "fp32"),
]


@pytest.mark.parametrize(("kind", "algorithm", "wire"), CASES)
def test_a_device_array_gets_what_a_host_array_does(engine: Engine, kind: str, algorithm: str, wire: str) -> None:
    draw = np.random.default_rng(engine.rank)
    host = np.empty(length(kind, engine), np.float32)
    device = on_device(np.full(host.size, np.nan, np.float32))
    expected, staged = (prepare(kind, engine, array, algorithm, wire) for array in (host, device))
    for _ in range(3):
        numbers = draw.standard_normal(host.size).astype(np.float32)
        host[:] = numbers
        seen = np.empty(host.size, np.float32)
        engine.copies.launch(lambda numbers=numbers: device.set(numbers))
        engine.copies.launch(lambda seen=seen: np.copyto(seen, device.memory))  # reads what must not change before
        expected.start()
        staged.start()
        staged.wait()
        expected.wait()
        np.testing.assert_array_equal(meaningful(kind, engine, device.memory), meaningful(kind, engine, host))
        np.testing.assert_array_equal(seen, numbers)
    assert staged.traffic == expected.traffic


def test_the_background_thread_carries_on_what_is_staged_while_nobody_waits(engine: Engine) -> None:
    devices = [on_device(np.full(50 + k, 1.0 + engine.rank)) for k in range(4)]
    staged = [prepare_allreduce(engine, device, "ring", label=str(k)) for k, device in enumerate(devices)]
    engine.carry_on_in_background()
    order = staged if engine.rank % 2 else staged[::-1]  # ranks may start them in any order
    for one in order:
        one.start()
    total = engine.size * (engine.size + 1) / 2
    for one, device in zip(staged, devices, strict=True):
        one.wait()
        np.testing.assert_array_equal(device.memory, total)


def test_a_single_run_on_a_device_array(engine: Engine) -> None:
    device = on_device(np.arange(5.0))
    engine.run(schedules.allreduce("butterfly", engine.rank, engine.size, 5, nodes=engine.nodes), device)
    np.testing.assert_array_equal(device.memory, engine.size * np.arange(5.0))


def test_only_what_is_sent_goes_down_and_what_has_arrived_comes_up(engine: Engine) -> None:
    device, copies = on_device(np.ones(COUNT, np.float32)), engine.copies
    gather = prepare_allgather(engine, device, bounds(engine.size), "ring")
    gather.start()
    gather.wait()
    mine = blocks(COUNT, engine.size)[engine.rank].size if engine.size > 1 else 0
    others = COUNT - mine if engine.size > 1 else 0
    assert (copies.bytes_down, copies.bytes_up) == (4 * mine, 4 * others)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_a_schedule_touches_covers_it(size: int) -> None:
    """Running a schedule with everything poisoned that it does not read would give the same: checked by position."""
    for rank in range(size):
        schedule = schedules.reduce_scatter("ring", rank, size, 40, bounds(size, 40))
        parts = touched(schedule, rounds=False)
        assert parts.reads == (slice(0, 40),)  # every element is added to or sent
        gather = touched(schedules.allgather("ring", rank, size, 40, bounds(size, 40)), rounds=False)
        assert gather.reads == (slice(*bounds(size, 40)[rank : rank + 2]),)
        left = [index for part in gather.writes for index in range(part.start, part.stop)]
        assert left == [i for i in range(40) if not gather.reads[0].start <= i < gather.reads[0].stop]
        for one, other in pairwise(parts.writes):
            assert one.stop < other.start


def test_a_device_array_that_the_host_cannot_add_is_refused(engine: Engine) -> None:
    with pytest.raises(CommError, match="contiguous"):
        prepare_allreduce(engine, on_device(np.ones((4, 2)))[:, 0], "ring")
    with pytest.raises(CommError, match="integers or floats"):
        prepare_allreduce(engine, on_device(np.ones(4, bool)), "ring")


class SumByMpi:
    """Stands for NCCL's communicator: sums when its turn comes on the stream."""

    def __init__(self, size: int, number: int, key: object) -> None:
        assert (size, number, key) == (world().size, world().rank, "key of rank 0")

    @staticmethod
    def key() -> str:
        return f"key of rank {world().rank}"

    def sum(self, array: FakeArray, stream: int) -> None:
        world().comm.Allreduce(MPI.IN_PLACE, array.memory)


def test_sums_by_nccl_run_behind_the_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcnn.gpu.Nccl", SumByMpi)
    monkeypatch.setattr("hpcnn.gpu.identity", lambda: f"GPU {world().rank}")
    devices = [on_device(np.full(9, np.nan, np.float32)) for _ in range(3)]
    sums = [prepare_allreduce(engine, device, "nccl") for device in devices]
    for number, device in enumerate(devices):
        engine.copies.launch(lambda device=device, number=number: device.fill(number + engine.rank))
        sums[number].start()
    for number, device in enumerate(devices):
        sums[number].wait()
        np.testing.assert_array_equal(device.memory, number * engine.size + sum(range(engine.size)))


def test_nccl_refuses_host_arrays_and_shared_gpus(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcnn.gpu.identity", lambda: "the only GPU")
    with pytest.raises(CommError, match="float32 arrays on GPUs, not float32 of ndarray"):
        prepare_allreduce(engine, np.zeros(3, np.float32), "nccl")
    if engine.size > 1:
        with pytest.raises(CommError, match=f"{engine.size} ranks have 1"):
            prepare_allreduce(engine, on_device(np.zeros(3, np.float32)), "nccl")
