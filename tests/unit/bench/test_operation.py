from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.bench.bandwidth import COLLECTIVES
from mpitrain.bench.operation import IN_PLACE, Operation, Use
from mpitrain.bench.pattern import Pattern, count_wrong, fill
from mpitrain.errors import UnavailableError
from mpitrain.memory import ReduceOp, as_dtype, check_op
from tests.support.ranks import run_communicators

DTYPES = ("float32", "bfloat16", "int8", "bool", "complex64", "float16", "uint8", "int64")
OPS = ("sum", "average", "min", "max", "product")


def meaningful(op: str, dtype: str) -> bool:
    try:
        check_op(ReduceOp[op.upper()], as_dtype(dtype))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_algorithm_is_right_for_every_dtype_and_op(collective):
    def body(comm):
        wrong = {}
        for turn, dtype in enumerate(DTYPES):
            ops = OPS if collective in ("allreduce", "reduce_scatter") else ("sum",)
            op = next(op for op in ops[turn % len(ops) :] + ops if meaningful(op, dtype))
            operation = Operation(comm, Use(collective, dtype, op), 1000 + turn)
            for name in comm.known_algorithms(collective):
                wrong[dtype, op, name] = operation.count_wrong(operation.call(name))
        return wrong

    for wrong in run_communicators(3, body):
        assert wrong
        assert not any(wrong.values())


@pytest.mark.parametrize(
    "options",
    [
        {"in_place": True},
        {"in_place": True, "memory": "window"},
        {"in_place": True, "persistent": True},
        {"in_place": True, "memory": "window", "persistent": True},
        {"blocking": False},
        {"in_place": True, "blocking": False},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_form_is_right(options):
    def body(comm):
        operation = Operation(comm, Use("allreduce", **options), 4096)
        call = operation.call("auto")
        wrong = [operation.count_wrong(call), operation.count_wrong(call)]
        operation.clear()
        call()
        return wrong, np.asarray(operation.array.numpy() if options.get("memory") else operation.array).any()

    assert run_communicators(2, body) == [([0, 0], False)] * 2


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_algorithm_is_right_on_shared_memory(collective):
    def body(comm):
        wrong = {}
        for dtype in ("float32", "bfloat16"):
            operation = Operation(comm, Use(collective, dtype, memory="window", in_place=collective in IN_PLACE), 999)
            for name in comm.known_algorithms(collective):
                wrong[dtype, name] = operation.count_wrong(operation.call(name))
        return wrong

    for wrong in run_communicators(3, body):
        assert wrong
        assert not any(wrong.values())


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_wrong_element_on_one_rank_is_seen_by_all(collective):
    def body(comm):
        operation = Operation(comm, Use(collective, in_place=collective in IN_PLACE), 480)
        call = operation.call("auto")

        def broken():
            result = call()
            if comm.rank == 2:
                result[-1] += 1
            return result

        return operation.count_wrong(broken)

    assert run_communicators(3, body) == [1, 1, 1]


@pytest.mark.parametrize("collective", ["allreduce", "allgather", "alltoall"])
def test_swapped_chunks_are_seen(collective):
    # 64 elements: chunks of 16 change places, or a whole part comes from a wrong rank.
    def body(comm):
        operation = Operation(comm, Use(collective), 4 * 64)
        call = operation.call("auto")

        def swapped():
            result = call()
            result[:16], result[16:32] = result[16:32].copy(), result[:16].copy()
            return result

        return operation.count_wrong(swapped)

    assert all(wrong > 8 for wrong in run_communicators(4, body))


@pytest.mark.parametrize(
    ("collective", "nbytes", "dtype", "rounded", "counts"),
    [
        ("allreduce", 1, "float32", 4, (1, 1)),
        ("allreduce", 10, "float32", 8, (2, 2)),
        ("broadcast", 64, "float64", 64, (8, 8)),
        ("allgather", 8, "float64", 16, (2, 1)),
        ("allgather", 100, "float32", 96, (24, 12)),
        ("reduce_scatter", 30, "int8", 30, (30, 30)),
        ("alltoall", 7, "float32", 8, (2, 2)),
    ],
)
def test_sizes_are_rounded_to_equal_parts(collective, nbytes, dtype, rounded, counts):
    def body(comm):
        operation = Operation(comm, Use(collective, dtype), nbytes)
        return operation.nbytes, (operation.count, len(operation.array))

    assert run_communicators(2, body) == [(rounded, counts)] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"collective": "alltoall", "in_place": True},
        {"collective": "allreduce", "memory": "window"},
        {"collective": "broadcast", "memory": "window"},
        {"collective": "broadcast", "persistent": True, "in_place": True},
    ],
)
def test_uses_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match=r"only .*, got " + options["collective"]):
        Use(**options)


def test_memory_that_is_not_there_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def body(comm):
        with pytest.raises(UnavailableError, match="device memory: needs a CUDA device"):
            Operation(comm, Use("allreduce", memory="device"), 8)
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(UnavailableError, match=r"bfloat16: needs torch, .*pip install mpitrain\[torch\]"):
            Operation(comm, Use("allreduce", "bfloat16"), 8)

    run_communicators(1, body)


@given(
    size=st.integers(1, 300), dtype=st.sampled_from(DTYPES), op=st.sampled_from(OPS), shift=st.sampled_from([1, 2, 64])
)
def test_pattern_is_exact_whatever_the_order_and_differs_by_place(size, dtype, op, shift):
    if not meaningful(op, dtype):
        return
    pattern = Pattern(as_dtype(dtype), ReduceOp[op.upper()], size)
    reduced = pattern.reduced()
    data = np.empty(3 * reduced.size + 5, reduced.dtype)
    fill(data, reduced)
    assert count_wrong(data, reduced) == 0
    assert count_wrong(data[7:], reduced, 7) == 0
    # Fewer ranks than there are different patterns: everything that is brought depends on place and rank.
    first = pattern.brought(0)
    fill(data := np.empty(4 * first.size, first.dtype), first)
    assert count_wrong(data[shift:], first) > 0
    if op == "sum" and dtype != "bool":
        wide = sum(pattern._values(rank) for rank in range(size))
        assert np.abs(np.asarray(wide)).max() < 128 * (3 if dtype == "complex64" else 1)
