from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.collectives.executor import execute
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.program import compile_program, touched_chunks
from mpitrain.memory import ReduceOp, ScratchPool, dtype_named
from mpitrain.schedules import ALGORITHMS, Algorithm, Receive, Round, Send, find_algorithm
from tests.support.cases import ALL_ALGORITHMS
from tests.support.random_network import RandomNetwork, run_at_random

INT64 = dtype_named("int64")
LOST = -(10**12)


def contribution(rank, chunk, index):
    """Different for every rank, chunk and element, and so are all sums over sets of ranks."""
    return 10_000 * chunk + index + (1 << (rank + 24))


def chunk_values(rank, chunk, count):
    return np.array([contribution(rank, chunk, index) for index in range(count)], np.int64)


def prepare(collective, rank, size, root, counts):
    """Return the chunks of `rank` at the start and at the end; None where the end is undefined."""
    numbers = range(len(counts))
    own = [chunk_values(rank, chunk, count) for chunk, count in enumerate(counts)]
    sums = [sum(chunk_values(each, chunk, count) for each in range(size)) for chunk, count in enumerate(counts)]
    of_root = [chunk_values(root, chunk, count) for chunk, count in enumerate(counts)]
    of_each = [chunk_values(chunk, chunk, count) for chunk, count in enumerate(counts)]
    lost = [np.full(count, LOST) for count in counts]
    undefined = [None] * len(counts)

    def only(chunks, others):
        return [chunks[chunk] if chunk == rank else others[chunk] for chunk in numbers]

    is_root = rank == root
    starts_and_ends = {
        "allreduce": (own, sums),
        "reduce": (own, sums if is_root else undefined),
        "reduce_scatter": (own, only(sums, undefined)),
        "allgather": (only(of_each, lost), of_each),
        "gather": (only(of_each, lost), of_each if is_root else undefined),
        "broadcast": (of_root if is_root else lost, of_root),
        "scatter": (of_root if is_root else lost, only(of_root, undefined)),
    }
    return starts_and_ends[collective]


def concatenated(chunks):
    return np.concatenate([np.empty(0, np.int64), *chunks])


def run_collective(collective, name, size, root, num_segments, draw_count, segment_count, window, network):
    algorithm = find_algorithm(collective, name)
    scratch = ScratchPool()
    ends = []
    tasks = []
    matrix = [[draw_count(source * size + dest) for dest in range(size)] for source in range(size)]
    counts = [draw_count(chunk) for chunk in range(algorithm.num_chunks(size, num_segments))]
    if collective == "reduce":
        counts = [draw_count(0)]
    for rank in range(size):
        if collective == "barrier":
            arrays, layout, expected = [], Layout.packed(()), []
        elif collective == "alltoall":
            sent = [chunk_values(rank, dest, matrix[rank][dest]) for dest in range(size)]
            received = [chunk_values(source, rank, matrix[source][rank]) for source in range(size)]
            target = [part if source == rank else np.full_like(part, LOST) for source, part in enumerate(received)]
            arrays = [concatenated(sent), concatenated(target)]
            layout = Layout.packed(matrix[rank], [matrix[source][rank] for source in range(size)])
            expected = [*sent, *received]
        else:
            start, expected = prepare(collective, rank, size, root, counts)
            arrays = [concatenated(start)]
            layout = Layout.packed(counts)
        program = compile_program(algorithm, rank, size, layout, segment_count, root=root, num_segments=num_segments)
        ends.append((rank, arrays, layout, expected))
        tasks.append(
            execute(
                network.transport(rank),
                program,
                arrays,
                INT64,
                tag=3,
                op=ReduceOp.SUM,
                scratch=scratch,
                receive_window=window,
            )
        )
    run_at_random(network, tasks)
    for rank, arrays, layout, expected in ends:
        for chunk, values in enumerate(expected):
            if values is not None and values.size:
                array, offset, count = layout.span(chunk, chunk + 1)
                got = arrays[array][offset : offset + count]
                np.testing.assert_array_equal(got, values, err_msg=f"rank {rank}, chunk {chunk}")


@pytest.mark.parametrize(("collective", "name"), ALL_ALGORITHMS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_order_the_dependencies_allow_gives_the_result(collective, name, data):
    size = data.draw(st.integers(1, 9), label="size")
    counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=7), label="counts")
    network = RandomNetwork(
        data.draw(st.integers(0, 2**32), label="seed"),
        eager_nbytes=data.draw(st.sampled_from([-1, 0, 24, 10**6]), label="eager_nbytes"),
    )
    run_collective(
        collective,
        name,
        size,
        data.draw(st.integers(0, size - 1), label="root"),
        data.draw(st.integers(1, 4), label="num_segments"),
        lambda chunk: counts[chunk % len(counts)],
        data.draw(st.integers(1, 8), label="segment_count"),
        data.draw(st.integers(1, 4), label="window"),
        network,
    )


@pytest.mark.parametrize(("collective", "name"), ALL_ALGORITHMS)
@pytest.mark.parametrize("size", [11, 16])
def test_one_slot_and_rendezvous_do_not_deadlock_many_ranks(size, collective, name):
    network = RandomNetwork(size)
    run_collective(collective, name, size, size - 2, 3, lambda chunk: 3 + chunk % 2, 1, 1, network)


def made_of(*rounds_by_rank):
    """Return an algorithm whose ranks do the given rounds."""
    return Algorithm(
        collective="allreduce",
        name="test",
        schedule=lambda rank, size: iter(rounds_by_rank[rank]),
        num_chunks=lambda size, _: 2,
        rounds=lambda size, _: len(rounds_by_rank[0]),
        volume=lambda size, _: 0,
        rounds_formula="",
        volume_formula="",
        restrictions="none",
        source="",
    )


def exchange_of_all_with_all(rank, size):
    others = [(rank + distance) % size for distance in range(1, size)]
    return (Round(tuple(Send(peer, 0, 2) for peer in others), tuple(Receive(peer, 0, 2, True) for peer in others)),)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("segment_count", [1, 3, 100])
def test_reductions_exchanged_with_several_peers_in_one_round_do_not_deadlock(segment_count, seed):
    # With room for one segment each, every rank would wait for a peer to make room.
    size = 4
    algorithm = made_of(*(exchange_of_all_with_all(rank, size) for rank in range(size)))
    network = RandomNetwork(seed)
    arrays = [np.full(5, 10**rank) for rank in range(size)]
    layout = Layout.packed((3, 2))
    programs = [compile_program(algorithm, rank, size, layout, segment_count) for rank in range(size)]
    run_at_random(
        network,
        [
            execute(
                network.transport(rank),
                programs[rank],
                [arrays[rank]],
                INT64,
                tag=0,
                scratch=ScratchPool(),
                receive_window=1,
            )
            for rank in range(size)
        ],
    )
    assert [array.tolist() for array in arrays] == [[1111] * 5] * size


@pytest.mark.parametrize(("collective", "name"), ALL_ALGORITHMS)
def test_algorithms_of_the_registry_need_one_slot_only(collective, name):
    algorithm = find_algorithm(collective, name)
    for size in (2, 5, 8):
        layout = Layout.packed((2,) * algorithm.num_chunks(size, 2))
        programs = [compile_program(algorithm, rank, size, layout, 1, num_segments=2) for rank in range(size)]
        assert {program.least_slots for program in programs} == {0}


def compiled(rounds, *, counts=(4, 4), segment_count=100, layout=None):
    return compile_program(made_of(rounds), 0, 3, layout or Layout.packed(counts), segment_count)


def waits_of(program):
    """Return for each transfer the indices of those it waits for."""
    before = [[] for _ in program.transfers]
    for index, transfer in enumerate(program.transfers):
        for later in transfer.releases:
            before[later].append(index)
    assert [len(each) for each in before] == list(program.waits)
    return before


def test_send_waits_for_what_it_passes_on_and_for_nothing_else():
    program = compiled(
        [
            Round(receives=(Receive(1, 0, 1),)),
            Round(receives=(Receive(2, 1, 2),)),
            Round(sends=(Send(2, 0, 1),)),
        ]
    )
    assert waits_of(program) == [[], [], [0]]


def test_receive_waits_for_sends_that_still_read():
    program = compiled([Round(sends=(Send(1, 0, 2),)), Round(receives=(Receive(2, 1, 2),))])
    assert waits_of(program) == [[], [0]]


def test_two_sends_of_the_same_memory_do_not_wait_for_each_other():
    program = compiled([Round(sends=(Send(1, 0, 2), Send(2, 0, 1)))])
    assert waits_of(program) == [[], []]


def test_reductions_of_the_same_memory_keep_their_order():
    program = compiled(
        [Round(receives=(Receive(1, 0, 1, reduce=True),)), Round(receives=(Receive(2, 0, 1, reduce=True),))]
    )
    assert waits_of(program) == [[], [0]]


def test_segments_of_a_chunk_wait_for_their_own_segment_only():
    program = compiled([Round(receives=(Receive(1, 0, 1),)), Round(sends=(Send(2, 0, 1),))], segment_count=3)
    assert [(each.offset, each.count) for each in program.transfers] == [(0, 3), (3, 1), (0, 3), (3, 1)]
    assert waits_of(program) == [[], [], [0], [1]]


def test_overlapping_messages_are_cut_apart():
    # A send of both chunks, in segments that straddle their boundary, after a receive of the second.
    program = compiled(
        [Round(receives=(Receive(1, 1, 2),)), Round(sends=(Send(2, 0, 2),))], counts=(3, 3), segment_count=2
    )
    sent = [(each.offset, each.count) for each in program.transfers if each.is_send]
    assert sent == [(0, 2), (2, 2), (4, 2)]
    assert waits_of(program) == [[], [], [], [0], [0, 1]]


def test_empty_chunks_are_not_sent():
    program = compiled([Round(sends=(Send(1, 0, 1),), receives=(Receive(1, 1, 2),))], counts=(0, 0))
    assert program.transfers == ()


def test_signals_wait_for_all_signals_before_them():
    program = compiled(
        [
            Round(sends=(Send(1, 0, 0),), receives=(Receive(2, 0, 0),)),
            Round(sends=(Send(2, 0, 0),), receives=(Receive(1, 0, 0),)),
        ],
        counts=(),
    )
    before = waits_of(program)
    assert before[0] == []
    assert before[2] == [1]
    assert all(transfer.count == 0 and transfer.array == -1 for transfer in program.transfers)


def test_program_is_made_once():
    assert compiled_ring() is compiled_ring()


def compiled_ring():
    return compile_program(find_algorithm("allreduce", "ring"), 1, 3, Layout.packed((2, 2, 1)), 8)


def test_properties_of_a_program():
    program = compiled_ring()
    assert program.writes
    assert program.num_rounds == 4
    assert program.largest_reduce_count == 2
    alone = compile_program(find_algorithm("allreduce", "ring"), 0, 1, Layout.packed((5,)), 8)
    assert not alone.writes
    assert alone.largest_reduce_count == 0


@pytest.mark.parametrize("collective", ["gather", "scatter"])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_touched_chunks_are_those_of_the_subtree(collective, size):
    for name in ALGORITHMS[collective]:
        for root in range(size):
            touched = [touched_chunks(find_algorithm(collective, name), rank, size, root) for rank in range(size)]
            if size > 1:
                # The root moves the chunks of all others; its own stays where it is.
                assert touched[root] | {root} == set(range(size))
            for rank in range(size):
                assert size == 1 or rank == root or rank in touched[rank]
