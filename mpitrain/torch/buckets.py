"""Which gradients share a bucket. Pure: sizes in, positions out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = ["bucket_layout"]


def bucket_layout(
    sizes: Sequence[tuple[int, Hashable]],
    order: Sequence[int],
    *,
    bucket_nbytes: int,
    first_bucket_nbytes: int,
    groups: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Fuse gradients into buckets, in the order in which the backward pass makes them.

    Args:
        sizes: For each gradient its bytes, and what must be equal within a bucket (such as the dtype).
        order: Positions in `sizes`, earliest gradient first; each exactly once.
        bucket_nbytes: A bucket is closed once it holds so much; a larger gradient has a bucket of its own.
        first_bucket_nbytes: The same for the bucket that is full first, so that communication starts early.
        groups: Positions that share a bucket, whatever its size, one for each different key. Positions that are in no
            group are laid out as if there were none.

    Returns:
        Positions per bucket. Buckets are in the order in which they are complete.
    """
    group_of = {position: index for index, members in enumerate(groups) for position in members}
    grouped: dict[tuple[int, Hashable], list[int]] = {}
    closed: list[list[int]] = []
    open_buckets: dict[Hashable, tuple[list[int], int]] = {}
    for position in order:
        nbytes, key = sizes[position]
        if position in group_of:
            grouped.setdefault((group_of[position], key), []).append(position)
            continue
        members, filled_nbytes = open_buckets.get(key, ([], 0))
        limit_nbytes = bucket_nbytes if closed else min(first_bucket_nbytes, bucket_nbytes)
        if members and filled_nbytes + nbytes > limit_nbytes:
            closed.append(members)
            members, filled_nbytes = [], 0
        members.append(position)
        open_buckets[key] = (members, filled_nbytes + nbytes)
    closed += [members for members, _ in open_buckets.values()]
    closed += grouped.values()
    place = {position: index for index, position in enumerate(order)}
    return sorted(closed, key=lambda members: place[members[-1]])
