from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpitrain.collectives.context import CallOrder, Context
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call
from mpitrain.comm import Topology, run_ranks
from mpitrain.config import Settings
from mpitrain.memory import ReduceOp, dtype_named


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_native_collectives_start_in_the_order_of_their_tickets(order):
    turns = CallOrder()
    assert [turns.take_ticket() for _ in range(4)] == [0, 1, 2, 3]
    left = set()
    for ticket in order:
        turns.give_back(ticket)
        left.add(ticket)
        first_open = next(number for number in range(5) if number not in left)
        assert [turns.may_start(number) for number in range(5)] == [number <= first_open for number in range(5)]
    assert turns._left == set()


def test_ticket_may_be_given_back_twice():
    turns = CallOrder()
    for _ in range(3):
        turns.take_ticket()
    turns.give_back(0)
    turns.give_back(0)
    assert turns.may_start(1)
    assert not turns.may_start(2)


class Native:
    """Collectives that are done after some polls."""

    def __init__(self):
        self.started = []

    def collective(self, name, *, blocking):
        self.started.append((name, blocking))
        return [] if blocking else [name]


def context_with_native(**settings):
    (transport,) = run_ranks(1, lambda transport: transport)
    transport.native = Native()
    context = Context(transport, Topology.discover(transport), Settings(**settings))
    polls = []

    def test_some(requests):
        polls.append(list(requests))
        return [0] if len(polls) % 3 == 0 else []

    transport.test_some = test_some
    return context, transport.native


def finish(task):
    return sum(1 for _ in task)


def test_native_collective_waits_for_its_turn():
    context, native = context_with_native()
    tickets = [context.native_order.take_ticket() for _ in range(2)]
    second = context.run_native(Call(1, False, ticket=tickets[1]), native.collective, "second")
    assert [next(second) for _ in range(3)] == [False] * 3
    assert native.started == []
    first = context.run_native(Call(0, True, ticket=tickets[0]), native.collective, "first")
    assert finish(first) == 0
    assert finish(second) > 0
    assert native.started == [("first", True), ("second", False)]


def test_native_collective_can_keep_its_turn_for_another():
    context, native = context_with_native()
    tickets = [context.native_order.take_ticket() for _ in range(2)]
    finish(context.run_native(Call(0, False, ticket=tickets[0]), native.collective, "asked", keep_turn=True))
    assert not context.native_order.may_start(tickets[1])
    finish(context.run_native(Call(0, True, ticket=tickets[0]), native.collective, "done"))
    assert context.native_order.may_start(tickets[1])


def test_native_collective_does_not_block_where_there_is_a_time_limit():
    context, native = context_with_native(timeout_s=1.0)
    finish(context.run_native(Call(0, True, context.native_order.take_ticket()), native.collective, "only"))
    assert native.started == [("only", False)]


def test_native_collective_that_fails_is_abandoned():
    context, native = context_with_native()
    abandoned = []
    context.transport.abandon = abandoned.extend

    def fail(_requests):
        raise OSError("lost")

    context.transport.test_some = fail
    task = context.run_native(Call(0, False, context.native_order.take_ticket()), native.collective, "only")
    with pytest.raises(OSError, match="lost"):
        finish(task)
    assert abandoned == ["only"]


def test_reductions_that_make_no_sense_are_refused():
    float32, boolean = dtype_named("float32"), dtype_named("bool")
    assert Context.check_reduction("reduce", "max", float32) is ReduceOp.MAX
    assert Context.check_reduction("reduce", ReduceOp.SUM, boolean) is ReduceOp.SUM
    with pytest.raises(ValueError, match="reduce: op must work element by element, got adasum; "):
        Context.check_reduction("reduce", "adasum", float32)
    with pytest.raises(ValueError, match="median"):
        Context.check_reduction("reduce", "median", float32)
    with pytest.raises(TypeError, match="average"):
        Context.check_reduction("reduce", "average", boolean)


def test_program_is_made_once_for_equal_arguments():
    def programs(transport):
        context = Context(transport, Topology.discover(transport), Settings())

        def make(dtype):
            return context.program("allreduce", "ring", Layout.packed((4, 4)), dtype_named(dtype), nbytes=32)

        return make("float32") is make("float32"), make("float32") is make("float64")

    # Equal layouts give one program; segments are counted in elements, so another item size gives another.
    assert run_ranks(2, programs) == [(True, False)] * 2


def test_failed_execution_loses_its_scratch_memory_to_the_pool():
    def body(transport):
        context = Context(transport, Topology.discover(transport), Settings())
        dtype = dtype_named("float32")
        program = context.program("allreduce", "ring", Layout.packed((4, 4)), dtype, nbytes=32)
        if transport.rank:
            return 0
        task = context.execute(program, [np.zeros(8, np.float32)], dtype, Call(0, True, ticket=-1))
        next(task)
        task.close()
        return context.scratch.idle_nbytes

    assert run_ranks(2, body) == [0, 0]
