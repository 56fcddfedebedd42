"""Mismatches, misuse and departures: an error on every rank, a message that says who brought what, and no hang."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def assert_usable():
    assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [hvd.size()] * 2


def is_odd():
    return hvd.rank() == hvd.size() - 1


MISMATCHES = {
    "shape": (lambda: hvd.allreduce(torch.ones(3 + is_odd())), "Mismatched ALLREDUCE tensor shapes"),
    "dimensions": (lambda: hvd.allreduce(torch.ones(4).reshape((2, 2) if is_odd() else (4,))), "tensor shapes"),
    "dtype": (lambda: hvd.allreduce(torch.ones(3).to(torch.int64 if is_odd() else torch.float32)), "data types"),
    "op": (lambda: hvd.allreduce(torch.ones(3), op=hvd.Min if is_odd() else hvd.Sum), "reduction operation"),
    "factors": (lambda: hvd.allreduce(torch.ones(3), prescale_factor=1.0 + is_odd()), "Mismatched prescale and/or"),
    "root": (lambda: hvd.broadcast(torch.ones(3), int(is_odd())), "Mismatched BROADCAST root ranks"),
    "broadcast shape": (lambda: hvd.broadcast(torch.ones(3 + is_odd()), 0), "Mismatched BROADCAST tensor shapes"),
    "collective": (
        lambda: hvd.allgather(torch.ones(3)) if is_odd() else hvd.allreduce(torch.ones(3)),
        "Mismatched operations: One rank did an ALLREDUCE, but another rank did an ALLGATHER.",
    ),
    "allgather columns": (lambda: hvd.allgather(torch.ones(2, 3 + is_odd())), "Mismatched ALLGATHER tensor shapes"),
    "allgather dtype": (lambda: hvd.allgather(torch.ones(2).to(torch.int8 if is_odd() else torch.int16)), "types"),
    "alltoall columns": (
        lambda: hvd.alltoall(torch.ones(hvd.size(), 3 + is_odd())),
        "Mismatched ALLTOALL tensor shapes",
    ),
    "reducescatter": (lambda: hvd.reducescatter(torch.ones(3 + is_odd())), "Mismatched REDUCESCATTER tensor shapes"),
    "grouped allgather": (
        lambda: hvd.grouped_allgather([torch.ones(3), torch.ones(2, 1 + is_odd())]),
        "Mismatched ALLGATHER tensor shapes",
    ),
    "grouped reducescatter": (
        lambda: hvd.grouped_reducescatter([torch.ones(3), torch.ones(2 + is_odd())]),
        "Mismatched REDUCESCATTER tensor shapes",
    ),
    "group": (lambda: hvd.grouped_allreduce([torch.ones(3)] * (1 + is_odd())), "Mismatched group sizes"),
    "in place": (lambda: hvd.allreduce_(torch.ones(3 + is_odd())), "Mismatched ALLREDUCE tensor shapes"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_is_an_error_with_a_table_on_every_rank(case):
    call, message = MISMATCHES[case]
    with pytest.raises(hvd.HorovodInternalError) as caught:
        call()
    text = str(caught.value)
    assert message in text
    assert [line.split(":")[0] for line in text.split("\n")[1:]] == [f"  rank {rank}" for rank in range(hvd.size())]
    assert hvd.allgather_object(text) == [text] * hvd.size()
    assert_usable()


def test_mismatch_in_place_leaves_the_tensor_alone():
    mine = torch.arange(3.0 + is_odd())
    kept = mine.clone()
    with pytest.raises(hvd.HorovodInternalError):
        hvd.allreduce_(mine)
    assert torch.equal(mine, kept)


def test_mismatch_among_operations_in_flight_fails_alone():
    good = [hvd.allreduce_async(torch.ones(4), name=f"good {index}", op=hvd.Sum) for index in range(10)]
    bad = hvd.allreduce_async(torch.ones(4 + is_odd()), name="bad")
    more = [hvd.allgather_async(torch.ones(4), name=f"more {index}") for index in range(10)]
    with pytest.raises(hvd.HorovodInternalError, match=r"allreduce\.bad: Mismatched"):
        hvd.synchronize(bad)
    assert all(hvd.synchronize(handle).tolist() == [hvd.size()] * 4 for handle in good)
    assert all(hvd.synchronize(handle).numel() == 4 * hvd.size() for handle in more)
    # The name is free again, and what it does is right again.
    assert hvd.allreduce(torch.ones(4), name="bad").tolist() == [1.0] * 4


@pytest.mark.parametrize("root", [-1, 10**6])
def test_root_out_of_range_is_an_error_on_every_rank(root):
    calls = [
        lambda: hvd.broadcast(torch.ones(1), root),
        lambda: hvd.broadcast_(torch.ones(1), root),
        lambda: hvd.broadcast_object({}, root),
        lambda: hvd.broadcast_parameters({"a": torch.ones(1)}, root),
        lambda: hvd.broadcast_optimizer_state(torch.optim.SGD([torch.ones(1)], lr=0.1), root),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"broadcast received invalid root rank {root} for provided process set"):
            call()
    assert_usable()


def test_tensors_that_cannot_be_communicated():
    for tensor in (torch.eye(3).to_sparse(), torch.ones(3).to(torch.float8_e5m2)):
        for operation in (hvd.allreduce, hvd.allgather, lambda each: hvd.broadcast_(each, 0)):
            with pytest.raises(ValueError, match=r"Tensor type torch\..* is not supported"):
                operation(tensor)
    with pytest.raises(TypeError, match="allreduce: must be a tensor, got list"):
        hvd.allreduce([1.0])
    with pytest.raises(RuntimeError, match=r"Tensors in list must be on same device, got cpu, meta"):
        hvd.grouped_allreduce([torch.ones(2), torch.ones(2, device="meta")])
    with pytest.raises(ValueError, match=r"factor: must be finite"):
        hvd.allreduce(torch.ones(2, dtype=torch.int32), prescale_factor=float("inf"))
    assert_usable()


def optimizer_of(**options):
    return torch.optim.SGD([torch.ones(2)], lr=0.1, **options)


def raises(error):
    raise error


class Unwilling(hvd.Compression.none):
    @staticmethod
    def compress(tensor):
        return raises(ArithmeticError("not today")) if is_odd() else (tensor, None)


SUMS = {
    "allreduce": lambda **options: hvd.allreduce(torch.ones(4), **options),
    "allreduce_": lambda **options: hvd.allreduce_(torch.ones(4), **options),
    "allreduce_async": lambda **options: hvd.synchronize(hvd.allreduce_async(torch.ones(4), **options)),
    "allreduce_async_": lambda **options: hvd.synchronize(hvd.allreduce_async_(torch.ones(4), **options)),
    "grouped": lambda **options: hvd.grouped_allreduce([torch.ones(4)], **options),
    "grouped in place": lambda **options: hvd.grouped_allreduce_([torch.ones(4)], **options),
    "grouped async": lambda **options: hvd.synchronize(hvd.grouped_allreduce_async([torch.ones(4)], **options)),
    "grouped async in place": lambda **options: hvd.synchronize(
        hvd.grouped_allreduce_async_([torch.ones(4)], **options)
    ),
    "reducescatter": lambda **options: hvd.reducescatter(torch.ones(4), **options),
    "reducescatter async": lambda **options: hvd.synchronize(hvd.reducescatter_async(torch.ones(4), **options)),
    "grouped reducescatter": lambda **options: hvd.grouped_reducescatter([torch.ones(4)], **options),
    "grouped reducescatter async": lambda **options: hvd.synchronize(
        hvd.grouped_reducescatter_async([torch.ones(4)], **options)
    ),
    "sparse": lambda op, tensor=None: hvd.sparse_allreduce_async(
        torch.eye(3).to_sparse() if tensor is None else tensor, "a", op
    )(),
}

UNUSABLE_HERE = {
    **{
        f"op of {name}": (lambda call=call: call(op="median" if is_odd() else hvd.Sum), ValueError)
        for name, call in SUMS.items()
    },
    **{
        f"factor of {name}": (
            lambda call=call: call(op=hvd.Sum, prescale_factor="double" if is_odd() else 2.0, name="a"),
            ValueError,
        )
        for name, call in SUMS.items()
        if name != "sparse"
    },
    "op and average": (lambda: hvd.allreduce(torch.ones(2), average=is_odd() or None, op=hvd.Sum), ValueError),
    "compression": (lambda: hvd.allreduce(torch.ones(2), compression=Unwilling), ArithmeticError),
    "compression of several": (
        lambda: hvd.grouped_reducescatter([torch.ones(4)], compression=Unwilling),
        ArithmeticError,
    ),
    "layout": (
        lambda: SUMS["sparse"](hvd.Sum, tensor=torch.eye(3) if is_odd() else torch.eye(3).to_sparse()),
        ValueError,
    ),
    "splits": (lambda: hvd.alltoall(torch.ones(4 * hvd.size()), splits=[5 * is_odd()] * hvd.size()), ValueError),
    "rows": (lambda: hvd.alltoall(3 if is_odd() else torch.ones(hvd.size())), AttributeError),
    "root": (lambda: hvd.broadcast(torch.ones(2), -int(is_odd())), ValueError),
    "root in place": (lambda: hvd.broadcast_(torch.ones(2), -int(is_odd()), name="a"), ValueError),
    "root of parameters": (lambda: hvd.broadcast_parameters({"a": torch.ones(2)}, -int(is_odd())), ValueError),
    "parameters": (lambda: hvd.broadcast_parameters(3 if is_odd() else {"a": torch.ones(2)}, 0), ValueError),
    "root of optimizer state": (lambda: hvd.broadcast_optimizer_state(optimizer_of(), -int(is_odd())), ValueError),
    "optimizer of the root": (
        lambda: hvd.broadcast_optimizer_state(None if is_odd() else optimizer_of(), hvd.size() - 1),
        AttributeError,
    ),
    "root of an object": (lambda: hvd.broadcast_object({"a": 1}, -int(is_odd()), name="a"), ValueError),
    "root of an object without a name": (lambda: hvd.broadcast_object({"a": 1}, -int(is_odd())), ValueError),
    "dtype": (lambda: hvd.allreduce(torch.ones(2).to(torch.float8_e5m2 if is_odd() else torch.float32)), ValueError),
    "scalar": (lambda: hvd.reducescatter(torch.tensor(1.0) if is_odd() else torch.ones(4), name="a"), ValueError),
    "no tensor": (lambda: hvd.grouped_allreduce([torch.ones(2), 3 if is_odd() else torch.ones(1)]), TypeError),
    "no tensors": (lambda: hvd.grouped_allgather(3 if is_odd() else [torch.ones(1)]), TypeError),
    "devices": (
        lambda: hvd.grouped_allgather([torch.ones(2), torch.ones(2, device="meta" if is_odd() else "cpu")]),
        RuntimeError,
    ),
    "channels": (lambda: hvd.SyncBatchNorm(3)(torch.rand(4, 3 + is_odd())), ValueError),
    "memory": (lambda: hvd.allgather(torch.ones(2) if not is_odd() else Huge()), MemoryError),
    "an interrupt": (lambda: hvd.allgather(torch.ones(2) if not is_odd() else Interrupting()), KeyboardInterrupt),
}


class Huge(torch.Tensor):
    """Its copy is too large."""

    def detach(self):
        raise MemoryError("out of memory")


class Interrupting(torch.Tensor):
    """The user presses Ctrl-C while it is prepared."""

    def detach(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("case", UNUSABLE_HERE)
def test_unusable_arguments_of_one_rank_are_an_error_on_every_rank(case):
    call, error = UNUSABLE_HERE[case]
    for _ in range(2):
        if is_odd():
            with pytest.raises(error) as caught:
                call()
            assert not isinstance(caught.value, hvd.HorovodInternalError)
        else:
            with pytest.raises(hvd.HorovodInternalError, match="One rank has unusable arguments") as caught:
                call()
            assert f"rank {hvd.size() - 1}: " in str(caught.value)
            assert f"with unusable arguments: {error.__name__}: " in str(caught.value)
        # Operations without a name are still matched.
        assert_usable()


def test_sparse_sums_and_averages_do_not_meet():
    tensor = torch.eye(3).to_sparse()
    with pytest.raises(hvd.HorovodInternalError, match="Mismatched reduction operation"):
        hvd.sparse_allreduce_async(tensor, "a", hvd.Sum if is_odd() else hvd.Average)()
    assert_usable()


@pytest.mark.parametrize("leaver", ["first", "last"])
def test_shutdown_of_one_rank_ends_the_waiting_of_the_others(leaver):
    is_leaver = hvd.rank() == (0 if leaver == "first" else hvd.size() - 1)
    rank_of_leaver = 0 if leaver == "first" else hvd.size() - 1
    if is_leaver:
        time.sleep(0.02)
        hvd.shutdown()
    else:
        for _ in range(3):
            with pytest.raises(hvd.HorovodInternalError, match=f"rank {rank_of_leaver} has shut down"):
                hvd.allreduce(torch.ones(2))


def test_shutdown_of_one_rank_ends_the_waiting_of_the_others_for_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
    if is_odd():
        time.sleep(0.02)
        hvd.shutdown()
    else:
        parameter.sum().backward()
        with pytest.raises(hvd.HorovodInternalError, match=f"rank {hvd.size() - 1} has shut down"):
            optimizer.step()


def test_shutdown_ends_what_is_in_flight_here():
    rank = hvd.rank()
    handle = hvd.allreduce_async(torch.ones(2), name=f"nobody else starts this {rank}")
    hvd.shutdown()
    with pytest.raises(hvd.HorovodInternalError, match=r"cannot complete: .*rank .*has shut down"):
        hvd.synchronize(handle)


def test_an_optimizer_cannot_step_after_shutdown():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
    parameter.sum().backward()
    hvd.shutdown()
    optimizer.zero_grad()
    parameter.sum().backward()
    with pytest.raises(ValueError, match="not been initialized"):
        optimizer.step()


@pytest.mark.mpi(min_size=3)
def test_process_sets_leave_with_shutdown():
    pair = hvd.add_process_set([0, 1])
    if hvd.rank() == 1:
        hvd.shutdown()
    elif hvd.rank() == 0:
        with pytest.raises(hvd.HorovodInternalError, match="rank 1 has shut down"):
            hvd.allreduce(torch.ones(2), process_set=pair)
