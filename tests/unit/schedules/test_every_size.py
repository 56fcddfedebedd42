"""Every algorithm is proved for each size from 1 to 64, each root and several numbers of segments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.schedules import ALGORITHMS, Algorithm, prove

ALL = [algorithm for row in ALGORITHMS.values() for algorithm in row.values()]
NAMES = [algorithm.qualified_name for algorithm in ALL]
NUM_SEGMENTS = (1, 2, 3, 5, 8)


@pytest.mark.parametrize("algorithm", ALL, ids=NAMES)
@pytest.mark.parametrize("sizes", [range(1, 17), range(17, 33), range(33, 49), range(49, 65)], ids=str)
def test_proof_holds(algorithm: Algorithm, sizes: range) -> None:
    for size in sizes:
        for root, num_segments in roots_and_segments(algorithm, size):
            proof = prove(algorithm, size, root=root, num_segments=num_segments)
            assert proof.num_rounds == algorithm.rounds(size, num_segments)
            assert proof.volume == algorithm.volume(size, num_segments)
            # Each rank but one must send something, or nothing could depend on it.
            assert proof.num_messages >= size - 1


def roots_and_segments(algorithm: Algorithm, size: int) -> Iterator[tuple[int, int]]:
    """Yield every root and every number of segments, in all combinations where ranks are few.

    Where they are many, the numbers take turns over the roots, and the first root and one in the middle have all.
    """
    numbers = NUM_SEGMENTS if algorithm.takes_segments else (1,)
    for root in range(size) if algorithm.takes_root else (0,):
        if size <= 16 or root in {0, size // 2}:
            yield from ((root, number) for number in numbers)
        else:
            yield root, numbers[root % len(numbers)]


@pytest.mark.parametrize("algorithm", ALL, ids=NAMES)
def test_size_1_has_no_messages(algorithm: Algorithm) -> None:
    for num_segments in NUM_SEGMENTS:
        proof = prove(algorithm, 1, num_segments=num_segments)
        assert proof.num_rounds == 0
        assert proof.num_messages == 0


@pytest.mark.parametrize("algorithm", ALL, ids=NAMES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_proof_holds_for_larger_sizes(algorithm: Algorithm, data: st.DataObject) -> None:
    size = data.draw(st.integers(65, 130), label="size")
    root = data.draw(st.integers(0, size - 1), label="root")
    num_segments = data.draw(st.integers(1, 40), label="num_segments")
    prove(algorithm, size, root=root, num_segments=num_segments)


IN_FEW_ROUNDS = [each for each in ALL if each.rounds(1000, 1) < 50]
# Many ranks with as many chunks of symbols each would take long.
OF_FEW_CHUNKS = [each for each in IN_FEW_ROUNDS if each.num_chunks(1000, 1) <= 2]


@pytest.mark.parametrize(
    ("algorithm", "size"),
    [(each, size) for each in IN_FEW_ROUNDS for size in (255, 256, 257)] + [(each, 1000) for each in OF_FEW_CHUNKS],
    ids=lambda each: each.qualified_name if isinstance(each, Algorithm) else None,
)
def test_proof_holds_for_many_ranks(algorithm: Algorithm, size: int) -> None:
    prove(algorithm, size, root=size // 3, num_segments=2)
