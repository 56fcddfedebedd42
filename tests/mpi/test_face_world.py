"""Life cycle, ranks and process sets."""

from __future__ import annotations

import importlib.util

import pytest
from mpi4py import MPI

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.errors import NotInitializedError  # noqa: E402

CALLS = {
    "communication_counters": hvd.communication_counters,
    "rank": hvd.rank,
    "size": hvd.size,
    "local_rank": hvd.local_rank,
    "local_size": hvd.local_size,
    "cross_rank": hvd.cross_rank,
    "cross_size": hvd.cross_size,
    "is_homogeneous": hvd.is_homogeneous,
    "mpi_threads_supported": hvd.mpi_threads_supported,
    "allreduce": lambda: hvd.allreduce(torch.ones(1)),
    "allreduce_": lambda: hvd.allreduce_(torch.ones(1)),
    "allreduce_async": lambda: hvd.allreduce_async(torch.ones(1)),
    "grouped_allreduce": lambda: hvd.grouped_allreduce([torch.ones(1)]),
    "allgather": lambda: hvd.allgather(torch.ones(1)),
    "grouped_allgather": lambda: hvd.grouped_allgather([torch.ones(1)]),
    "grouped_reducescatter": lambda: hvd.grouped_reducescatter([torch.ones(1)]),
    "sparse_allreduce_async": lambda: hvd.sparse_allreduce_async(torch.ones(1).to_sparse(), "a", hvd.Sum),
    "broadcast": lambda: hvd.broadcast(torch.ones(1), 0),
    "alltoall": lambda: hvd.alltoall(torch.ones(1)),
    "reducescatter": lambda: hvd.reducescatter(torch.ones(1)),
    "barrier": hvd.barrier,
    "broadcast_object": lambda: hvd.broadcast_object(1),
    "allgather_object": lambda: hvd.allgather_object(1),
    "broadcast_parameters": lambda: hvd.broadcast_parameters({"a": torch.ones(1)}, 0),
    "broadcast_optimizer_state": lambda: hvd.broadcast_optimizer_state(sgd(), 0),
    "DistributedOptimizer": lambda: hvd.DistributedOptimizer(sgd()),
    "add_process_set": lambda: hvd.add_process_set([0]),
    "remove_process_set": lambda: hvd.remove_process_set(hvd.ProcessSet([0])),
}


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.fixture(autouse=True)
def _ended():
    yield
    hvd.shutdown()


@pytest.fixture
def world():
    hvd.init()
    return MPI.COMM_WORLD


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("was_initialized", [False, True], ids=["before init", "after shutdown"])
def test_calls_outside_of_init_and_shutdown_are_refused(name, was_initialized):
    if was_initialized:
        hvd.init()
        hvd.shutdown()
    assert not hvd.is_initialized()
    with pytest.raises(NotInitializedError, match="has not been initialized; call") as caught:
        CALLS[name]()
    assert isinstance(caught.value, ValueError)


def test_ranks_are_those_of_mpi(world):
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size()) == (world.rank, world.size)
    assert (hvd.local_rank(), hvd.local_size()) == (node.rank, node.size)
    assert hvd.cross_size() * hvd.local_size() == hvd.size()
    assert hvd.cross_rank() == 0
    assert hvd.is_homogeneous()
    node.Free()


def test_counters_tell_what_was_communicated(world):
    before = hvd.communication_counters()
    hvd.communicator().allreduce(torch.arange(1001.0))
    blocking = hvd.communication_counters() - before
    assert (blocking.operations, blocking.nbytes) == (1, 4004)
    assert blocking.exposed_s > 0
    assert hvd.allreduce(torch.full((3,), 1.0 + hvd.rank()), op=hvd.Sum)[0] == world.size * (world.size + 1) / 2
    named = hvd.communication_counters() - before - blocking
    assert (named.operations, named.nbytes) == (1, 12)
    assert named.exposed_s > 0


def test_second_init_changes_nothing(world):
    handle = hvd.allreduce_async(torch.ones(1), op=hvd.Sum)
    hvd.init()
    hvd.init(comm=[0])
    assert hvd.synchronize(handle).item() == world.size


def test_shutdown_then_init_again():
    for turn in range(5):
        hvd.init()
        assert hvd.allreduce(torch.tensor([1.0 + turn]), name="a", op=hvd.Sum).item() == hvd.size() * (1 + turn)
        hvd.shutdown()
        hvd.shutdown()
        assert not hvd.is_initialized()
        assert hvd.global_process_set.process_set_id is None


def test_init_with_a_list_of_ranks():
    world = MPI.COMM_WORLD
    odd_or_even = [rank for rank in range(world.size) if rank % 2 == world.rank % 2]
    hvd.init(comm=odd_or_even)
    assert (hvd.rank(), hvd.size()) == (odd_or_even.index(world.rank), len(odd_or_even))
    assert hvd.allreduce(torch.tensor([world.rank]), op=hvd.Sum).item() == sum(odd_or_even)


@pytest.mark.parametrize("ranks", [[0, 0], [10**6], [-1], []], ids=str)
def test_init_with_unusable_ranks(ranks):
    with pytest.raises(ValueError, match="ranks: must be different ranks of 0 to"):
        hvd.init(comm=ranks)
    assert not hvd.is_initialized()


def test_init_with_a_communicator():
    world = MPI.COMM_WORLD
    reversed_ranks = world.Split(0, key=-world.rank)
    hvd.init(comm=reversed_ranks)
    assert hvd.rank() == world.size - 1 - world.rank
    # It was duplicated: messages and the end of the one that was given do not matter.
    reversed_ranks.Free()
    assert hvd.broadcast(torch.tensor([world.rank]), 0).item() == world.size - 1


def test_queries(world):
    assert (hvd.mpi_built(), hvd.mpi_enabled(), hvd.mpi_threads_supported()) == (True, True, True)
    assert hvd.cuda_built() == (importlib.util.find_spec("cupy") is not None)
    for query in (hvd.gloo_built, hvd.gloo_enabled, hvd.rocm_built, hvd.ddl_built, hvd.ccl_built):
        assert query() is False
    # Scripts use it as a number of a version, and as a truth.
    assert hvd.nccl_built() == 0
    assert type(hvd.nccl_built()) is int


def test_process_sets_of_init():
    size = MPI.COMM_WORLD.size
    last, everybody_else = hvd.ProcessSet([size - 1]), hvd.ProcessSet(range(size - 1))
    made = [last, everybody_else] if size > 2 else [last] if size > 1 else []
    for _ in range(2):
        hvd.init(process_sets=made)
        for index, process_set in enumerate(made):
            assert process_set.process_set_id == index + 1
            if process_set.included():
                total = hvd.allreduce(torch.tensor([hvd.rank() + 1]), op=hvd.Sum, process_set=process_set).item()
                assert total == sum(rank + 1 for rank in process_set.ranks)
        hvd.shutdown()
        assert [process_set.process_set_id for process_set in made] == [None] * len(made)


def test_process_sets_of_init_may_be_dynamic():
    hvd.init(process_sets="dynamic")
    if hvd.size() > 1:
        assert hvd.add_process_set([1]).included() == (hvd.rank() == 1)


@pytest.mark.parametrize("unusable", ["static", [[0], [0]], [[-1]], [["a"]], [3]], ids=str)
def test_unusable_process_sets_of_init_leave_nothing_behind(unusable):
    with pytest.raises(ValueError, match=r"process.sets?: |ProcessSet should be initialized"):
        hvd.init(process_sets=unusable)
    assert not hvd.is_initialized()
    hvd.init()
    hvd.barrier()


@pytest.mark.mpi(min_size=2)
def test_process_sets_of_init_must_be_the_same_on_every_rank():
    for mine in ([[0]] * MPI.COMM_WORLD.rank, [[min(MPI.COMM_WORLD.rank, 1)]]):
        with pytest.raises(ValueError, match=r"process sets?: must be the same on every rank"):
            hvd.init(process_sets=mine)


@pytest.mark.mpi(min_size=2)
def test_process_sets_of_communicators():
    world = MPI.COMM_WORLD
    halves = world.Split(world.rank % 2, key=-world.rank)
    pair = world.Split(0 if world.rank < 2 else MPI.UNDEFINED)
    mine = hvd.ProcessSet(halves)
    assert mine.ranks is None
    hvd.init(world, process_sets=[mine])
    assert hvd.global_process_set.mpi_comm is world
    assert mine.mpi_comm is halves
    assert mine.process_set_id == 1 + world.rank % 2
    assert mine.ranks == list(range(world.rank % 2, world.size, 2))
    gathered = hvd.allgather(torch.tensor([world.rank]), process_set=mine)
    assert gathered.tolist() == mine.ranks
    # Known where it has no members, so that it is not made twice, and its number is used once.
    with pytest.raises(ValueError, match="process set: exists already"):
        hvd.add_process_set([0] if world.size == 2 else list(range(0, world.size, 2)))
    if world.size > 2:
        added = hvd.add_process_set(pair)
        assert added.process_set_id == (3 if pair else None)
        assert added.included() == bool(pair)
        if added.included():
            assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=added).item() == 2
        assert hvd.remove_process_set(added) == bool(pair)
    assert hvd.remove_process_set(mine)
    halves.Free()
    if pair:
        pair.Free()


@pytest.mark.mpi(min_size=3)
def test_process_sets_are_removed_by_all_or_none(world):
    pair, others = hvd.add_process_set([0, 1]), hvd.add_process_set([1, 2])
    with pytest.raises(ValueError, match="process set: must be removed by all its ranks"):
        hvd.remove_process_set(pair if world.rank == 0 else others)
    for each in (pair, others):
        if each.included():
            hvd.barrier(each)
        assert hvd.remove_process_set(each)


def test_global_process_set(world):
    everybody = hvd.global_process_set
    assert everybody.process_set_id == 0
    assert everybody.ranks == list(range(world.size))
    assert (everybody.size(), everybody.rank(), everybody.included()) == (world.size, world.rank, True)
    assert not hvd.remove_process_set(everybody)
    assert hvd.allreduce(torch.ones(1), process_set=everybody, op=hvd.Sum).item() == world.size


@pytest.mark.mpi(min_size=3)
def test_operations_of_a_process_set_are_for_its_members(world):
    members = [world.size - 1, 0]
    made = hvd.ProcessSet(members)
    assert (made.size(), made.rank(), made.included(), made.process_set_id) == (None, None, False, None)
    assert hvd.add_process_set(made) is made
    assert made.ranks == sorted(members)
    assert made.process_set_id == 1
    tensor = torch.tensor([float(world.rank)])
    if world.rank in members:
        assert (made.size(), made.rank(), made.included()) == (2, members[::-1].index(world.rank), True)
        assert hvd.allreduce(tensor, op=hvd.Sum, process_set=made).item() == world.size - 1
        assert hvd.allgather(tensor, process_set=made).tolist() == [0.0, world.size - 1]
        # Roots are global ranks.
        assert hvd.broadcast(tensor, world.size - 1, process_set=made).item() == world.size - 1
        assert hvd.reducescatter(torch.ones(2), op=hvd.Sum, process_set=made).tolist() == [2.0]
        assert hvd.alltoall(torch.arange(2), process_set=made).tolist() == [made.rank()] * 2
        assert hvd.allgather_object(world.rank, process_set=made) == [0, world.size - 1]
        assert hvd.broadcast_object(world.rank, world.size - 1, process_set=made) == world.size - 1
        hvd.barrier(process_set=made)
        if world.size > 2:
            with pytest.raises(ValueError, match="invalid root rank 1 for provided process set"):
                hvd.broadcast(tensor, 1, process_set=made)
    else:
        assert (made.size(), made.rank(), made.included()) == (2, None, False)
        for call in (
            lambda: hvd.allreduce(tensor, process_set=made),
            lambda: hvd.allgather(tensor, process_set=made),
            lambda: hvd.broadcast(tensor, 0, process_set=made),
            lambda: hvd.barrier(process_set=made),
        ):
            with pytest.raises(ValueError, match=f"Rank {world.rank} is not a member of the provided process set"):
                call()
    assert hvd.remove_process_set(made)
    assert not hvd.remove_process_set(made)
    assert made.process_set_id is None
    with pytest.raises(ValueError, match="does not exist, or has not been registered"):
        hvd.allreduce(tensor, process_set=made)
    # Its ranks may be used again.
    again = hvd.add_process_set(members)
    if again.included():
        assert hvd.allreduce(tensor, op=hvd.Sum, process_set=again).item() == world.size - 1


@pytest.mark.mpi(min_size=3)
def test_process_sets_do_not_wait_for_each_other(world):
    pair = hvd.add_process_set([0, 1])
    others = hvd.add_process_set(list(range(1, world.size)))
    ones = torch.ones(2)
    if world.rank == 0:
        # Rank 1 starts its part of the pair's operation only after the others have done all of theirs.
        assert hvd.allreduce(ones, op=hvd.Sum, process_set=pair).tolist() == [2.0] * 2
    else:
        for _ in range(10):
            assert hvd.allreduce(ones, op=hvd.Sum, process_set=others).tolist() == [world.size - 1.0] * 2
        if world.rank == 1:
            assert hvd.allreduce(ones, op=hvd.Sum, process_set=pair).tolist() == [2.0] * 2


@pytest.mark.mpi(min_size=3)
def test_same_names_in_two_sets_and_opposite_orders(world):
    first = hvd.add_process_set([0, 1])
    if world.rank < 2:
        sets = [first, hvd.global_process_set][:: 1 if world.rank else -1]
        handles = {
            id(each): hvd.allreduce_async(torch.ones(1), name="a", op=hvd.Sum, process_set=each) for each in sets
        }
        assert hvd.synchronize(handles[id(first)]).item() == 2
        assert hvd.synchronize(handles[id(hvd.global_process_set)]).item() == world.size
    else:
        assert hvd.allreduce(torch.ones(1), name="a", op=hvd.Sum).item() == world.size


def test_unusable_process_sets_are_errors_on_every_rank(world):
    for ranks in ([], [0, 0], [-1], [world.size]):
        with pytest.raises(ValueError, match="process set: must have different ranks"):
            hvd.add_process_set(ranks)
    with pytest.raises(ValueError, match="process set: exists already"):
        hvd.add_process_set(range(world.size))
    if world.size > 1:
        with pytest.raises(ValueError, match=r"process set: must be the same on every rank, got \[\[0\], \[1\]"):
            hvd.add_process_set([min(world.rank, 1)])
        hvd.add_process_set([1])
        with pytest.raises(ValueError, match="process set: exists already"):
            hvd.add_process_set([1])
    with pytest.raises(ValueError, match="Process set provided does not exist"):
        hvd.allreduce(torch.ones(1), process_set=hvd.ProcessSet([0]))


@pytest.mark.mpi(min_size=2)
def test_process_sets_that_are_unusable_on_one_rank_are_an_error_on_every_rank(world):
    for unusable in ("ab", 3):
        with pytest.raises(ValueError, match="ProcessSet should be initialized with a list"):
            hvd.add_process_set(unusable if world.rank == 1 else [0])
    assert hvd.add_process_set([0]).process_set_id == 1


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("unusable", ["static", [3.5], 7])
def test_process_sets_of_init_that_are_unusable_on_one_rank_are_an_error_on_every_rank(unusable):
    rank = MPI.COMM_WORLD.rank
    with pytest.raises((ValueError, TypeError)) as caught:
        hvd.init(process_sets=unusable if rank == 1 else [[0]])
    assert rank == 1 or "got an error on rank 1: " in str(caught.value)
    assert not hvd.is_initialized()


@pytest.mark.mpi(min_size=2)
def test_an_environment_that_is_unusable_on_one_rank_is_an_error_on_every_rank(monkeypatch):
    rank = MPI.COMM_WORLD.rank
    if rank == 1:
        monkeypatch.setenv("MPITRAIN_TIMEOUT_S", "soon")
    with pytest.raises(ValueError if rank == 1 else hvd.HorovodInternalError, match="MPITRAIN_TIMEOUT_S"):
        hvd.init()
    monkeypatch.undo()
    hvd.init()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    hvd.shutdown()


@pytest.mark.mpi(min_size=2)
def test_process_sets_end_with_shutdown(world):
    made = hvd.add_process_set([0])
    hvd.shutdown()
    assert made.process_set_id is None
    hvd.init()
    with pytest.raises(ValueError, match="does not exist"):
        hvd.allreduce(torch.ones(1), process_set=made)
    assert hvd.add_process_set(made) is made


def test_many_process_sets_can_be_made_in_turn(world):
    # An MPI library has room for some thousand communicators: what is removed must be given back.
    ranks = list(range(world.size - 1)) or None
    if ranks is None:
        pytest.skip("one rank has no set besides the global one")
    for _ in range(400):
        assert hvd.remove_process_set(hvd.add_process_set(ranks))
