from __future__ import annotations

import datetime as dt
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.bench.stopwatch import Times
from mpitrain.cli import tuning
from mpitrain.cli.tuning import COLLECTIVES, Effort, Measurement, keys_of, measure, steps_of
from mpitrain.collectives.table import Key, Shape, Table
from tests.support.ranks import SETTINGS, run_communicators

KEY = Key("allreduce", Shape(1, 2, 2, 2), True)
UNCHECKED = SETTINGS.replace(check=False)
MIB = 1 << 20


def measurements(*rows: tuple[int, dict[str, float]], noise: float = 0.0) -> list[Measurement]:
    return [Measurement(KEY, nbytes, times_s, noise) for nbytes, times_s in rows]


def test_steps_change_between_sizes_of_different_winners():
    rows = measurements(
        (8, {"native": 1.0, "ring": 5.0}),
        (32, {"native": 1.0, "ring": 2.0}),
        (128, {"native": 3.0, "ring": 2.0}),
        (512, {"native": 9.0, "ring": 2.0}),
    )
    assert steps_of(rows) == ((64, "native"), (512, "ring"))


@pytest.mark.parametrize(("lead", "takes_over"), [(0.01, False), (0.04, False), (0.3, True)])
def test_small_lead_makes_no_step(lead, takes_over):
    rows = measurements(
        (8, {"native": 1.0, "ring": 2.0}),
        *((8 << power, {"native": 1.0 + lead, "ring": 1.0}) for power in range(1, 8)),
    )
    assert steps_of(rows) == (((11, "native"), (1024, "ring")) if takes_over else ((1024, "native"),))


def test_one_disturbed_size_makes_no_step():
    quiet = {"native": 1.0, "ring": 1.2}
    rows = measurements((8, quiet), (16, quiet), (32, {"native": 1.1, "ring": 1.0}), (64, quiet), (128, quiet))
    assert steps_of(rows) == ((128, "native"),)


def test_noise_raises_what_a_step_must_gain():
    rows = [(8, {"native": 1.0, "ring": 2.0}), (16, {"native": 1.3, "ring": 1.0})]
    assert len(steps_of(measurements(*rows, noise=0.01))) == 2
    assert steps_of(measurements(*rows, noise=0.5)) == ((16, "native"),)


def test_largest_size_speaks_for_all_above_only_if_it_is_large():
    winner = {"ring": 1.0}
    assert steps_of(measurements((8, winner), (MIB, winner))) == ((MIB, "ring"),)
    assert steps_of(measurements((8, winner), (16 * MIB, winner))) == ((None, "ring"),)


def test_algorithm_that_was_dropped_is_not_taken_where_it_is_missing():
    rows = measurements((8, {"native": 1.0, "ring": 9.0}), (64, {"ring": 9.0}), (512, {"native": 1.0, "ring": 9.0}))
    assert steps_of(rows) == ((22, "native"), (181, "ring"), (512, "native"))


@given(
    times=st.lists(
        st.dictionaries(st.sampled_from(["native", "ring", "double_tree"]), st.floats(1e-6, 1.0), min_size=1),
        min_size=1,
        max_size=6,
    ),
    noise=st.floats(0, 0.5),
)
def test_no_other_sequence_loses_less(times, noise):
    sizes = [8 << index for index in range(len(times))]
    rows = measurements(*zip(sizes, times, strict=True), noise=noise)

    def loss(names: tuple[str, ...]) -> float:
        lost = sum(
            lag if (lag := math.log(row[name] / min(row.values()))) > math.log(1.05) else 0
            for name, row in zip(names, times, strict=True)
        )
        changes = sum(one != other for one, other in itertools.pairwise(names))
        return lost + changes * math.log1p(max(0.1, noise))

    taken = tuple(tuning._cheapest_sequence(rows))
    assert loss(taken) <= min(map(loss, itertools.product(*times))) + 1e-9
    # Whatever was measured, the table accepts it.
    table = Table("", {}, dt.date(2026, 1, 1), {KEY: steps_of(rows)})
    assert [table.lookup("allreduce", nbytes, KEY.shape, blocking=True) for nbytes in sizes] == list(taken)


def test_hopeless_algorithms_are_dropped_where_bandwidth_decides():
    field = tuning._Field(["native", "ring", "chain"])
    slow = {"native": 1.0, "ring": 3.5, "chain": 4.0}
    for nbytes in (8, 16, 64 << 10):
        field.drop_hopeless(nbytes, slow)
    assert field.algorithms == ["native", "ring", "chain"]
    field.drop_hopeless(512 << 10, {"native": 1.0, "ring": 3.2, "chain": 4.1})
    # The ring catches up; the chain does not.
    assert field.algorithms == ["native", "ring"]
    field.drop_hopeless(MIB, {"native": 1.0, "ring": 2.9})
    field.drop_hopeless(2 * MIB, {"native": 1.0, "ring": 3.1})
    assert field.algorithms == ["native", "ring"]
    field.drop_hopeless(4 * MIB, {"native": 1.0, "ring": 3.1})
    assert field.algorithms == ["native"]


def test_every_combination_is_measured_at_every_size_alike_on_all_ranks():
    sizes = [8, 4096]

    def body(comm):
        keys = keys_of(comm, COLLECTIVES)
        told = []
        rows = list(
            measure(comm, keys, sizes, Effort(2, 2, (1, 2)), limit_s=100, on_item=lambda *item: told.append(item))
        )
        known = {key: comm.known_algorithms(key.collective)[1:] for key in keys}
        return keys, told, rows, known

    results = run_communicators(2, body, settings=UNCHECKED)
    keys, told, rows, known = results[0]
    assert {(key.collective, key.blocking) for key in keys} == set(itertools.product(COLLECTIVES, (True, False)))
    assert {key.collective for key in keys if key.in_window} == {"allreduce"}
    assert [(row.key, row.nbytes) for row in rows] == list(itertools.product(keys, sizes))
    assert told == [(key, nbytes) for key in keys for _ in range(2) for nbytes in sizes]
    assert all(list(row.times_s) == known[row.key] for row in rows)
    assert all(seconds > 0 for row in rows for seconds in row.times_s.values())
    assert results[1][2] == rows


def steady(medians_s: dict[str, float], noise: float) -> Times:
    samples_s = {name: (median * (1 - noise), median, median * (1 + noise)) for name, median in medians_s.items()}
    return Times(samples_s, dict.fromkeys(medians_s, 1), 1.0)


def test_best_pass_counts_and_passes_that_differ_are_noise():
    passes = [
        steady({"native": 1.0, "ring": 3.0, "chain": 9.0}, noise=0.01),
        steady({"native": 5.0, "ring": 2.0}, noise=0.03),
    ]
    best = tuning._best_of(KEY, 8, passes)
    assert best.times_s == {"native": 1.0, "ring": 2.0, "chain": 9.0}
    assert best.noise == pytest.approx(0.5)
    assert tuning._best_of(KEY, 8, passes[:1]).noise == pytest.approx(0.01)


def test_time_limit_ends_the_measurements_alike_on_all_ranks():
    def body(comm):
        keys = keys_of(comm, ["allreduce"])
        return list(measure(comm, keys, [8, 16, 32], Effort(2, 1, (1, 1)), limit_s=1e-9))

    first, second = run_communicators(2, body, settings=UNCHECKED)
    assert first == second
    assert [(row.key.blocking, row.nbytes) for row in first] == [(True, 8)]


def test_shared_arrays_are_left_out_where_there_are_none():
    def body(comm):
        keys = keys_of(comm, ["allreduce"])
        return keys, list(
            measure(comm, [*keys, Key("allreduce", keys[0].shape, True, True)], [8], Effort(2, 1, (1, 1)), limit_s=9)
        )

    (keys, rows), _ = run_communicators(2, body, settings=UNCHECKED.replace(shared_memory=False))
    assert not any(key.in_window for key in keys)
    assert [row.key for row in rows] == keys
