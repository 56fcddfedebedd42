from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mpitrain.comm import ThreadTransport, ThreadWorld, run_ranks, thread
from mpitrain.errors import CollectiveMismatchError, CommError, CommTimeoutError
from tests.support.limits import HANG_S


def pair(**options):
    world = ThreadWorld(2, **options)
    return [ThreadTransport(world, (0, 1), rank) for rank in range(2)]


def data(*values):
    return np.array(values, np.uint8)


def room(count=1):
    return np.zeros(count, np.uint8)


@pytest.mark.parametrize("rendezvous", [True, False])
def test_messages_match_in_the_order_of_posting(rendezvous):
    left, right = pair(rendezvous=rendezvous)
    sends = [left.isend(data(number), 1, 5) for number in range(3)]
    buffers = [room() for _ in range(3)]
    receives = [right.irecv(buffer, 0, 5) for buffer in buffers]
    assert list(right.test_some(receives)) == [0, 1, 2]
    assert list(left.test_some(sends)) == [0, 1, 2]
    assert [int(buffer[0]) for buffer in buffers] == [0, 1, 2]


def test_receives_may_be_posted_first():
    left, right = pair()
    buffers = [room(), room()]
    receives = [right.irecv(buffer, 0, 5) for buffer in buffers]
    assert list(right.test_some(receives)) == []
    left.isend(data(7), 1, 5)
    assert list(right.test_some(receives)) == [0]
    left.isend(data(8), 1, 5)
    assert list(right.test_some(receives[1:])) == [0]
    assert [int(buffer[0]) for buffer in buffers] == [7, 8]


def test_messages_of_other_tags_do_not_match():
    left, right = pair()
    buffers = {tag: room() for tag in (1, 2)}
    receives = [right.irecv(buffers[tag], 0, tag) for tag in (1, 2)]
    left.isend(data(20), 1, 2)
    assert list(right.test_some(receives)) == [1]
    assert int(buffers[2][0]) == 20


def test_eager_send_is_done_at_once_and_has_taken_a_copy():
    left, right = pair()
    sent, got = data(1), room()
    assert list(left.test_some([left.isend(sent, 1, 0)])) == [0]
    sent[0] = 9
    right.irecv(got, 0, 0)
    assert int(got[0]) == 1


def test_rendezvous_send_waits_for_its_receive_and_takes_no_copy():
    left, right = pair(rendezvous=True)
    sent, got = data(1), room()
    send = left.isend(sent, 1, 0)
    assert list(left.test_some([send])) == []
    sent[0] = 9
    right.irecv(got, 0, 0)
    assert list(left.test_some([send])) == [0]
    assert int(got[0]) == 9


@pytest.mark.parametrize("receive_first", [True, False])
def test_message_of_another_length_is_an_error_of_the_receiver(receive_first):
    left, right = pair()
    if receive_first:
        receive = right.irecv(room(3), 0, 0)
        left.isend(room(2), 1, 0)
    else:
        left.isend(room(2), 1, 0)
        receive = right.irecv(room(3), 0, 0)
    with pytest.raises(CollectiveMismatchError, match="got 2 bytes for 3; "):
        right.test_some([receive])


def test_abandoned_messages_match_nothing_any_more():
    left, right = pair(rendezvous=True)
    stale = room()
    right.abandon([right.irecv(stale, 0, 0)])
    left.abandon([left.isend(data(1), 1, 1)])
    left.isend(data(5), 1, 0)
    left.isend(data(6), 1, 1)
    got = [room(), room()]
    receives = [right.irecv(got[tag], 0, tag) for tag in (0, 1)]
    assert len(right.test_some(receives)) == 2
    assert [int(each[0]) for each in got] == [5, 6]
    assert int(stale[0]) == 0


def test_nothing_is_kept_of_messages_that_are_through():
    left, right = pair()
    for tag in range(100):
        left.isend(data(1), 1, tag)
        right.irecv(room(), 0, tag)
        right.irecv(room(), 0, tag)
        left.isend(data(1), 1, tag)
    assert not left.world.sends
    assert not left.world.receives


def test_notices_need_no_receive_and_arrive_in_order():
    left, right = pair()
    assert right.notices() == []
    for number in range(3):
        left.notify(1, b"%d" % number)
    assert right.notices() == [(0, b"0"), (0, b"1"), (0, b"2")]
    assert right.notices() == []


def test_gather_everywhere_collects_by_rank_and_clears_up():
    def body(transport):
        first = transport.gather_everywhere(transport.rank * 10)
        second = transport.gather_everywhere("x" * transport.rank)
        return first, second, transport

    results = run_ranks(4, body)
    for first, second, _ in results:
        assert first == [0, 10, 20, 30]
        assert second == ["", "x", "xx", "xxx"]
    assert not results[0][2].world.values


def test_split_orders_by_key_and_then_rank():
    def body(transport):
        part = transport.split(transport.rank % 2, -(transport.rank // 2))
        return part.rank, part.gather_everywhere(transport.rank)

    results = run_ranks(5, body)
    assert results[4] == (0, [4, 2, 0])
    assert results[0] == (2, [4, 2, 0])
    assert results[1] == (1, [3, 1])


def test_split_of_a_split_keeps_messages_apart():
    def body(transport):
        first = transport.duplicate()
        second = first.duplicate()
        peer = 1 - transport.rank
        got = {name: room() for name in "abc"}
        receives = []
        for name, each in zip("abc", (transport, first, second), strict=True):
            receives.append(each.irecv(got[name], peer, 0))
        for value, each in ((3, second), (2, first), (1, transport)):
            each.isend(data(value), peer, 0)
        transport.gather_everywhere(None)
        return [int(got[name][0]) for name in "abc"]

    assert run_ranks(2, body) == [[1, 2, 3]] * 2


def test_no_color_is_no_part():
    results = run_ranks(3, lambda transport: transport.split(None if transport.rank else 0, 0))
    assert results[1] is None
    assert results[0].size == 1


def test_nodes_are_pretended():
    leaders = run_ranks(5, lambda transport: transport.node_leader(), ranks_per_node=2)
    assert leaders == [0, 0, 2, 2, 4]
    # Among the odd ranks 1, 3, 5 each is on a node of its own.
    parts = run_ranks(6, lambda transport: transport.split(transport.rank % 2, 0).node_leader(), ranks_per_node=2)
    assert parts == [0, 0, 1, 1, 2, 2]


def test_run_ranks_returns_results_by_rank():
    assert run_ranks(3, lambda transport: (transport.rank, transport.size)) == [(0, 3), (1, 3), (2, 3)]


def test_run_ranks_raises_what_the_first_failing_rank_raised(monkeypatch):
    # The other one waits for ever.
    monkeypatch.setattr(thread, "_PATIENCE_S", 0.1)

    def body(transport):
        if transport.rank == 1:
            raise ZeroDivisionError("mine")
        return transport.gather_everywhere(1)

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_ranks(2, body)


def test_run_ranks_gives_up_on_ranks_that_hang_and_ends_their_waiting():
    ended = threading.Event()

    def body(transport):
        if transport.rank == 0:
            return
        buffer = room()
        request = transport.irecv(buffer, 0, 0)
        try:
            while not transport.test_some([request]):
                time.sleep(0.001)
        except CommError:
            ended.set()

    # Where threads are slow to start, the other one may be late as well.
    with pytest.raises(CommTimeoutError, match=r"ranks \[(0, )?1\]"):
        run_ranks(2, body, timeout_s=0.1)
    assert ended.wait(HANG_S)


def test_abort_ends_the_waiting_of_all():
    def body(transport):
        if transport.rank == 0:
            transport.abort()
            return None
        with pytest.raises(CommError, match="has ended"):
            transport.gather_everywhere(1)
        return "ended"

    assert run_ranks(2, body) == [None, "ended"]
