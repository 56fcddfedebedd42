"""Every collective once: what each rank brings, and what it must get, in closed form.

The same cases run among threads (tests/unit) and among processes (tests/mpi). What a rank brings depends on
its rank and on the index, and is small enough that every dtype holds the results exactly, in whatever order
they are reduced.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives import Communicator
from mpitrain.collectives.layout import even_counts
from mpitrain.schedules import ALGORITHMS

DTYPES = ("float32", "bfloat16", "int64", "bool", "complex64", "float16", "float64", "uint8")
OPS = ("sum", "average", "min", "max", "product")


@dataclasses.dataclass(frozen=True)
class Case:
    """What all ranks bring.

    Attributes:
        count: Elements of each rank's array, or rows where `row_shape` is given.
        library: "numpy", "torch" or "cupy"; bfloat16 is torch's on the host in any case. With "mixed" even ranks bring
            CuPy's and odd ones NumPy's.
        form: "new", "in place", "async" or "async in place".
    """

    count: int = 10
    dtype: str = "float32"
    op: str = "sum"
    root: int = 0
    library: str = "numpy"
    form: str = "new"
    row_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.row_shape)


def has_meaning(op: str, dtype: str) -> bool:
    if dtype == "bool":
        return op != "average"
    return not (dtype.startswith("complex") and op in ("min", "max"))


def brought(rank: int, shape: Sequence[int], dtype: str, op: str = "sum") -> NDArray[Any]:
    """Return what `rank` brings, in a dtype that NumPy has and that is wide enough to compute with."""
    index = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    if dtype == "bool":
        return (index + rank) % 3 == 0
    # For products powers of two, few enough at each index to be exact in bfloat16, without overflow in uint8.
    doubles = np.where((index + rank) % 5 == 0, 2, 1)
    values = doubles if op == "product" else (7 * index + 3 * rank) % 13
    if dtype.startswith("complex"):
        return values * (1j if op == "product" else 1 + 2j)
    return values.astype(np.int64 if "int" in dtype else np.float64)


def make(values: NDArray[Any], dtype: str, library: str = "numpy") -> Any:
    """Return `values` as an array of the library."""
    if library == "cupy":
        import cupy

        return cupy.asarray(values.astype(dtype))
    if library == "numpy" and dtype != "bfloat16":
        return values.astype(dtype)
    import torch

    return torch.from_numpy(np.array(values)).to(getattr(torch, dtype))


def read(array: Any) -> NDArray[Any]:
    """Return the elements of an array of any library as NumPy's, whatever its dtype."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get"):
        return array.get()
    return array.float().numpy() if str(array.dtype) == "torch.bfloat16" else array.numpy()


def bits(array: Any) -> bytes:
    """Return the memory of an array."""
    if hasattr(array, "get"):
        array = array.get()
    if not isinstance(array, np.ndarray):
        import torch

        array = array.reshape(-1).view(torch.uint8).numpy() if array.numel() else np.empty(0)
    return array.tobytes()


def reduced(size: int, case: Case) -> NDArray[Any]:
    """Return the reduction of what all ranks bring."""
    parts = np.stack([brought(rank, case.shape, case.dtype, case.op) for rank in range(size)])
    if case.dtype == "bool":
        return parts.any(axis=0) if case.op in ("sum", "max") else parts.all(axis=0)
    if case.op == "average":
        total = parts.sum(axis=0)
        if case.dtype.startswith("complex"):
            # NumPy would multiply by the reciprocal, which rounds twice.
            return total.real / size + 1j * (total.imag / size)
        return total // size if "int" in case.dtype else total / size
    functions: dict[str, Callable[..., Any]] = {
        "sum": np.sum,
        "min": np.min,
        "max": np.max,
        "product": np.prod,
    }
    return np.asarray(functions[case.op](parts, axis=0))


def assert_is(comm: Communicator, got: Any, expected: NDArray[Any], case: Case) -> None:
    """`got` is an array of the case's kind that holds `expected`, to the bit."""
    wanted = make(expected, case.dtype, library_of(comm, case))
    assert type(got) is type(wanted)
    assert got.dtype == wanted.dtype
    assert tuple(got.shape) == tuple(wanted.shape)
    np.testing.assert_array_equal(read(got), read(wanted))


def own_array(comm: Communicator, case: Case) -> Any:
    return make(brought(comm.rank, case.shape, case.dtype, case.op), case.dtype, library_of(comm, case))


def library_of(comm: Communicator, case: Case) -> str:
    return case.library if case.library != "mixed" else ("cupy", "numpy")[comm.rank % 2]


def call(comm: Communicator, verb: str, form: str, *arguments: Any, **options: Any) -> Any:
    """Call the blocking, in-place or asynchronous form of a collective and return its result."""
    name = verb + ("_async" if "async" in form else "") + ("_" if "in place" in form else "")
    answer = getattr(comm, name)(*arguments, **options)
    return answer.wait() if "async" in form else answer


def check_allreduce(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "allreduce", case.form, array, op=case.op, algorithm=algorithm)
    assert_is(comm, got, reduced(comm.size, case), case)
    assert (got is array) == ("in place" in case.form)
    assert "in place" in case.form or bits(array) == before


def check_reduce(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "reduce", _new(case), array, root=case.root, op=case.op, algorithm=algorithm)
    if comm.rank == case.root:
        assert_is(comm, got, reduced(comm.size, case), case)
    else:
        assert got is None
    assert bits(array) == before


def check_reduce_scatter(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "reduce_scatter", _new(case), array, op=case.op, algorithm=algorithm)
    rows = even_counts(case.count, comm.size)
    begin = sum(rows[: comm.rank])
    assert_is(comm, got, reduced(comm.size, case)[begin : begin + rows[comm.rank]], case)
    assert bits(array) == before


def check_allgather(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "allgather", _new(case), array, algorithm=algorithm)
    expected = [brought(rank, case.shape, case.dtype, case.op) for rank in range(comm.size)]
    assert_is(comm, got, np.concatenate(expected), case)
    assert bits(array) == before


def check_uneven_allgather(comm: Communicator, algorithm: str, case: Case) -> None:
    rows = [(case.count * (rank + 2)) % (2 * case.count + 1) for rank in range(comm.size)]
    parts = [brought(rank, (rows[rank], *case.row_shape), case.dtype) for rank in range(comm.size)]
    array = make(parts[comm.rank], case.dtype, library_of(comm, case))
    got = call(comm, "allgather", _new(case), array, rows=rows, algorithm=algorithm)
    assert_is(comm, got, np.concatenate(parts), case)


def check_broadcast(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "broadcast", case.form, array, root=case.root, algorithm=algorithm)
    assert_is(comm, got, brought(case.root, case.shape, case.dtype, case.op), case)
    assert (got is array) == ("in place" in case.form)
    if "in place" not in case.form or comm.rank == case.root:
        assert bits(array) == before


def check_gather(comm: Communicator, algorithm: str, case: Case) -> None:
    array = own_array(comm, case)
    before = bits(array)
    got = call(comm, "gather", _new(case), array, root=case.root, algorithm=algorithm)
    if comm.rank == case.root:
        expected = [brought(rank, case.shape, case.dtype, case.op) for rank in range(comm.size)]
        assert_is(comm, got, np.concatenate(expected), case)
    else:
        assert got is None
    assert bits(array) == before


def check_scatter(comm: Communicator, algorithm: str, case: Case) -> None:
    parts = [brought(rank, case.shape, case.dtype, case.op) for rank in range(comm.size)]
    whole = make(np.concatenate(parts), case.dtype, library_of(comm, case)) if comm.rank == case.root else None
    before = b"" if whole is None else bits(whole)
    out = make(np.zeros_like(parts[0]), case.dtype, library_of(comm, case))
    got = call(comm, "scatter", _new(case), whole, out, root=case.root, algorithm=algorithm)
    assert got is out
    assert_is(comm, got, parts[comm.rank], case)
    assert whole is None or bits(whole) == before


def check_alltoall(comm: Communicator, algorithm: str, case: Case) -> None:
    # Rank r sends to d what `brought` says for rank r * size + d.
    size, rank = comm.size, comm.rank

    def part(source: int, dest: int) -> NDArray[Any]:
        return brought(source * size + dest, case.shape, case.dtype)

    sent = make(np.concatenate([part(rank, dest) for dest in range(size)]), case.dtype, library_of(comm, case))
    before = bits(sent)
    got, rows = call(comm, "alltoall", _new(case), sent, algorithm=algorithm)
    assert rows == [case.count] * size
    assert_is(comm, got, np.concatenate([part(source, rank) for source in range(size)]), case)
    assert bits(sent) == before


def check_uneven_alltoall(comm: Communicator, algorithm: str, case: Case) -> None:
    size, rank = comm.size, comm.rank

    def splits(source: int) -> list[int]:
        return [(case.count * (source + 2 * dest)) % (case.count + 3) for dest in range(size)]

    def part(source: int, dest: int) -> NDArray[Any]:
        return brought(source * size + dest, (splits(source)[dest], *case.row_shape), case.dtype)

    sent = make(np.concatenate([part(rank, dest) for dest in range(size)]), case.dtype, library_of(comm, case))
    got, rows = call(comm, "alltoall", _new(case), sent, splits=splits(rank), algorithm=algorithm)
    assert rows == [splits(source)[rank] for source in range(size)]
    assert_is(comm, got, np.concatenate([part(source, rank) for source in range(size)]), case)


def check_barrier(comm: Communicator, algorithm: str, case: Case) -> None:
    assert call(comm, "barrier", _new(case), algorithm=algorithm) is None


def _new(case: Case) -> str:
    return case.form.replace("in place", "").strip() or "new"


CHECKS: dict[str, tuple[Callable[[Communicator, str, Case], None], ...]] = {
    "allreduce": (check_allreduce,),
    "reduce": (check_reduce,),
    "reduce_scatter": (check_reduce_scatter,),
    "allgather": (check_allgather, check_uneven_allgather),
    "broadcast": (check_broadcast,),
    "gather": (check_gather,),
    "scatter": (check_scatter,),
    "alltoall": (check_alltoall, check_uneven_alltoall),
    "barrier": (check_barrier,),
}
REDUCING = ("allreduce", "reduce", "reduce_scatter")
ROOTED = ("reduce", "broadcast", "gather", "scatter")

ALL_ALGORITHMS = [(collective, name) for collective, row in ALGORITHMS.items() for name in row]


def counts_for(size: int) -> list[int]:
    """Return the counts around which mistakes in cutting show."""
    return sorted({0, 1, size - 1, size, size + 1, 1000})


def grid(collective: str, size: int, dtypes: Sequence[str] = DTYPES) -> Iterator[Case]:
    """Yield cases in which every value of every property occurs; counts meet all dtypes as sizes go by."""
    counts = counts_for(size)
    libraries = itertools.cycle(("numpy", "torch", "numpy"))
    forms = itertools.cycle(("new", "in place", "async", "async in place"))
    ops = itertools.cycle(OPS if collective in REDUCING else ("sum",))
    row_shapes = itertools.cycle(((), (3,), (), (2, 1)))
    for turn, dtype in enumerate(dtypes):
        op = next(ops)
        while not has_meaning(op, dtype):
            op = next(ops)
        count = counts[(turn + size) % len(counts)]
        yield Case(
            count=count,
            dtype=dtype,
            op=op,
            root=turn % size,
            library=next(libraries),
            form=next(forms),
            row_shape=next(row_shapes) if count < 100 else (),
        )


def device_grid(collective: str, size: int, library: str = "cupy") -> Iterator[Case]:
    """Yield `grid` for device arrays, and counts of several pieces in every form."""
    for case in thorough_grid(collective, size):
        if case.dtype != "bfloat16":
            yield dataclasses.replace(case, library=library)
    for form in ("new", "in place", "async", "async in place"):
        yield Case(count=777, library=library, form=form, root=size - 1)


def thorough_grid(collective: str, size: int) -> Iterator[Case]:
    """Yield `grid`, each count once more, every op, and every root."""
    yield from grid(collective, size)
    for turn, count in enumerate(counts_for(size)):
        yield Case(count=count, dtype=DTYPES[(turn + size) % 4])
    if collective in REDUCING:
        for turn, (op, dtype) in enumerate(itertools.product(OPS, DTYPES[:5])):
            if has_meaning(op, dtype) and turn % 3 == size % 3:
                yield Case(count=size + 2, dtype=dtype, op=op)
    if collective in ROOTED:
        for root in range(size):
            yield Case(count=size + root, root=root)
            yield Case(count=0, root=root)


def run_cases(comm: Communicator, collective: str, algorithm: str, cases: Iterator[Case]) -> int:
    """Run all cases; return how many."""
    number = 0
    for case in cases:
        for check in CHECKS[collective]:
            try:
                check(comm, algorithm, case)
            except AssertionError as error:
                raise AssertionError(f"rank {comm.rank}/{comm.size}, {algorithm}, {case}: {error}") from error
            number += 1
    return number
