"""Offsets between clocks, against clocks whose offset is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpitrain.observe.clocks import ClockMap, Exchange, Offset, estimate_offset

SECOND_NS = 10**9


def exchange(sent_ns: int, there_ns: int, back_ns: int, reference: ClockMap) -> Exchange:
    return Exchange(sent_ns, reference.to_reference_ns(sent_ns + there_ns), sent_ns + there_ns + back_ns)


delays = st.integers(0, 10**7)


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(delays, delays), min_size=1, max_size=20))
def test_offset_is_within_its_bound_however_uneven_the_ways_are(offset_ns, ways):
    reference = ClockMap(Offset(0, offset_ns, 0), None)
    exchanges = [
        exchange(index * SECOND_NS, there_ns, back_ns, reference) for index, (there_ns, back_ns) in enumerate(ways)
    ]
    estimate = estimate_offset(exchanges)
    assert abs(estimate.offset_ns - offset_ns) <= estimate.error_ns
    fastest_ns = min(there_ns + back_ns for there_ns, back_ns in ways)
    assert estimate.error_ns <= fastest_ns // 2 + 2


@given(st.floats(-1e-4, 1e-4), st.integers(-(10**12), 10**12), st.floats(0, 1), delays, delays)
def test_times_in_between_are_corrected_for_even_drift(drift, offset_ns, when, there_ns, back_ns):
    end_ns = 3600 * SECOND_NS
    truth = ClockMap(Offset(0, offset_ns, 0), Offset(end_ns, offset_ns + round(drift * end_ns), 0))
    clocks = ClockMap(*(estimate_offset([exchange(at_ns, there_ns, back_ns, truth)]) for at_ns in (0, end_ns)))
    local_ns = round(when * end_ns)
    # Half a nanosecond of each rounding is beyond the bound.
    assert abs(clocks.to_reference_ns(local_ns) - truth.to_reference_ns(local_ns)) <= clocks.error_ns + 3 + 1e-4 * 10**7
    assert abs(clocks.drift - truth.drift) < 1e-8


def test_one_offset_is_used_as_it_is_and_none_leaves_times_alone():
    only = Offset(100, 50, 7)
    for clocks in (ClockMap(only, None), ClockMap(None, only)):
        assert clocks.to_reference_ns(1000) == 1050
        assert (clocks.drift, clocks.error_ns) == (None, 7)
    unknown = ClockMap(None, estimate_offset([]))
    assert unknown.to_reference_ns(1000) == 1000
    assert unknown.error_ns is None
    assert not unknown.is_aligned
