from __future__ import annotations

import pytest

from mpitrain.bench.bandwidth import algbw_bytes_per_s, busbw_bytes_per_s
from mpitrain.bench.units import format_nbytes, format_s, parse_nbytes


@pytest.mark.parametrize(
    ("text", "expected"), [("4096", 4096), ("64K", 64 << 10), ("1m", 1 << 20), ("128M", 128 << 20), ("2G", 2 << 30)]
)
def test_sizes_have_units(text, expected):
    assert parse_nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "0", "0K", "-1", "1.5M", "12X", "12KB", "1 M", "٣"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"must be a number of bytes, got .*; write 4096"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(8, "8 B"), (1024, "1 KiB"), (92681, "90.51 KiB"), (128 << 20, "128 MiB"), (3 << 30, "3 GiB")],
)
def test_sizes_are_written_with_units(nbytes, text):
    assert format_nbytes(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0125, "12.5 ms"), (3.2e-6, "3.2 us"), (0, "0 us")])
def test_times_are_written_with_units(seconds, text):
    assert format_s(seconds) == text


@pytest.mark.parametrize(
    ("collective", "factor"),
    [("allreduce", 1.5), ("broadcast", 1.0), ("reduce_scatter", 0.75), ("allgather", 0.75), ("alltoall", 0.75)],
)
def test_bandwidths_are_those_of_nccl_tests(collective, factor):
    # 4 ranks, 8 GB in 2 s.
    assert algbw_bytes_per_s(8_000_000_000, 2.0) == 4e9
    assert busbw_bytes_per_s(collective, 8_000_000_000, 2.0, 4) == pytest.approx(4e9 * factor)


def test_barrier_has_no_bandwidth():
    with pytest.raises(ValueError, match="collective: has no bandwidth, got 'barrier'"):
        busbw_bytes_per_s("barrier", 1, 1.0, 2)
