"""Process sets: some of the ranks, and how all ranks agree on them."""

from __future__ import annotations

import itertools
import operator
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mpitrain.collectives import Communicator
from mpitrain.negotiation import Negotiator

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ProcessSet", "Proposal", "World", "agreed_ranks", "agreed_removals", "global_process_set"]


class ProcessSet:
    """Some of the ranks, which run collectives of their own without the others.

    Args:
        ranks_or_comm: Global ranks, different from each other; or an mpi4py communicator of them.

    Attributes:
        process_set_id: Number of the set, 0 for all ranks; None until it is added.
        ranks: Global ranks of the set, ascending; None until it is added if made from a communicator.
        mpi_comm: The communicator it was made from, or None.

    Raises:
        ValueError: Neither ranks nor a communicator.
    """

    def __init__(self, ranks_or_comm: Iterable[int] | MPI.Comm) -> None:
        self.process_set_id: int | None = None
        self.ranks: list[int] | None = None
        self.mpi_comm: MPI.Comm | None = None
        self.negotiator: Negotiator | None = None
        if not isinstance(ranks_or_comm, Iterable) and hasattr(ranks_or_comm, "Get_group"):
            self.mpi_comm = ranks_or_comm
            return
        try:
            self.ranks = sorted(operator.index(rank) for rank in ranks_or_comm)  # type: ignore[union-attr]
        except TypeError:
            raise ValueError(
                "ProcessSet should be initialized with a list of process ranks or an mpi4py Comm object, "
                f"got {ranks_or_comm!r}"
            ) from None

    def size(self) -> int | None:
        """Number of ranks in the set; None until it is added."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def rank(self) -> int | None:
        """Rank of this process within the set; None if it is not included or the set not added."""
        return self.negotiator.comm.rank if self.negotiator is not None else None

    def included(self) -> bool:
        """Whether this process belongs to the set, which has been added."""
        return self.negotiator is not None

    def __deepcopy__(self, memo: object) -> ProcessSet:
        # What a copied model refers to are the same ranks.
        return self

    def __reduce__(self) -> str | tuple[type[ProcessSet], tuple[list[int]]]:
        # Of what is loaded elsewhere, only all ranks are a set without being added.
        return "global_process_set" if self is global_process_set else (ProcessSet, (self.ranks or [],))

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"


global_process_set = ProcessSet([])
"""All ranks."""
global_process_set.ranks = None


class Proposal(NamedTuple):
    """What one rank means by a process set.

    Attributes:
        ranks: Global ranks, ascending; None if the rank has no set, as it is outside of the communicators.
        of_communicator: Whether they are those of a communicator, which may be another one on other ranks.
    """

    ranks: list[int] | None
    of_communicator: bool = False


def agreed_ranks(proposals: Sequence[Proposal], existing: Iterable[ProcessSet]) -> list[list[int]]:
    """Return the ranks of each set that the ranks mean: one, or for communicators as many as there are.

    Args:
        proposals: By rank.
        existing: Sets that there are.

    Raises:
        ValueError: They mean different sets, unusable ranks, or a set that exists; for the same on every rank.
    """
    size = len(proposals)
    proposed = [proposal.ranks for proposal in proposals]
    found = sorted({tuple(ranks) for ranks in proposed if ranks is not None})
    if any(proposal.of_communicator for proposal in proposals):
        # Each rank brings the communicator that it belongs to.
        meant = [next((ranks for ranks in found if rank in ranks), None) for rank in range(size)]
        is_same = all(proposal.of_communicator for proposal in proposals)
    else:
        meant = [found[0] if found else None] * size
        is_same = True
    if not is_same or meant != [None if ranks is None else tuple(ranks) for ranks in proposed]:
        raise ValueError(f"process set: must be the same on every rank, got {proposed} by rank; pass equal ranks")
    for ranks in found or [()]:
        if not ranks or len(set(ranks)) != len(ranks) or ranks[0] < 0 or ranks[-1] >= size:
            raise ValueError(
                f"process set: must have different ranks of 0 to {size - 1}, got {list(ranks)}; correct the ranks"
            )
        for other in existing:
            if other.ranks == list(ranks):
                raise ValueError(f"process set: exists already, got {list(ranks)}; use {other}")
    return [list(ranks) for ranks in found]


def agreed_removals(numbers: Sequence[int | None], existing: Mapping[int, ProcessSet]) -> list[int]:
    """Return the numbers of the sets that the ranks want removed.

    Args:
        numbers: By rank, of the set that it wants removed; None for none.
        existing: Sets that there are, by number.

    Raises:
        ValueError: Some ranks of a set, but not all, want it removed; for the same on every rank.
    """
    removed = sorted({number for number in numbers if number is not None})
    for number in removed:
        members = existing[number].ranks or []
        if any(numbers[rank] != number for rank in members):
            raise ValueError(
                f"process set: must be removed by all its ranks {members}, got sets {list(numbers)} by rank; "
                "remove the same set on every rank"
            )
    return removed


def _made(arguments: Iterable[ProcessSet | Iterable[int] | MPI.Comm] | str) -> list[ProcessSet]:
    if isinstance(arguments, str):
        raise ValueError(f'process_sets: must be process sets or "dynamic", got {arguments!r}')  # noqa: TRY004  (a bad word)
    return [each if isinstance(each, ProcessSet) else ProcessSet(each) for each in arguments]


class World:
    """What exists between `init` and `shutdown`."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.process_sets: dict[int, ProcessSet] = {}
        self.ids = itertools.count()
        # What all ranks know this world by.
        self.identity = ""
        self.register(global_process_set, list(range(comm.size)), comm)

    def succeed(self, predecessor: World | None) -> None:
        """Give back what the world before has left: MPI frees with all ranks only, and `shutdown` waits for nobody.

        Every rank must call, if it has a predecessor or not.
        """
        identity = ""
        if predecessor is not None and predecessor.comm.size == self.comm.size:
            # What has its result may have a last step to make.
            predecessor.comm.engine.advance_all()
            identity = predecessor.identity if predecessor.comm.engine.is_idle else ""
        everybodys = self.comm.allgather_obj((uuid.uuid4().hex, identity))
        self.identity = everybodys[0][0]
        # A world of other ranks, or with operations that were given up, stays as it is until the process ends.
        if predecessor is not None and identity and all(theirs == identity for _, theirs in everybodys):
            self.comm.adopt(predecessor.comm)

    def add(self, arguments: Iterable[ProcessSet | Iterable[int] | MPI.Comm] | str) -> list[ProcessSet]:
        """Agree on process sets with all ranks, make them usable one after another, and return them.

        Raises:
            ValueError, TypeError: Unusable arguments, on the rank that brought them; ValueError on the others.
            ValueError: See `agreed_ranks`.
        """
        try:
            process_sets = _made(arguments)
            proposals = [self._proposal(process_set) for process_set in process_sets]
        except Exception as error:
            self.comm.allgather_obj(([], f"{type(error).__name__}: {error}"))
            raise
        everybodys, problems = zip(*self.comm.allgather_obj((proposals, "")), strict=True)
        for rank, problem in enumerate(problems):
            if problem:
                raise ValueError(f"process set: must be the same on every rank, got an error on rank {rank}: {problem}")
        counts = [len(proposals) for proposals in everybodys]
        if len(set(counts)) > 1:
            raise ValueError(
                f"process sets: must be the same on every rank, got {counts} sets by rank; pass equal ones"
            )
        for index, process_set in enumerate(process_sets):
            proposals = [of_rank[index] for of_rank in everybodys]
            self._add_agreed(process_set, agreed_ranks(proposals, self.process_sets.values()))
        return process_sets

    def _proposal(self, process_set: ProcessSet) -> Proposal:
        if process_set.mpi_comm is None:
            return Proposal(process_set.ranks)
        ranks = self.comm.transport.ranks_of(process_set.mpi_comm)
        return Proposal(None if ranks is None else sorted(ranks), of_communicator=True)

    def _add_agreed(self, process_set: ProcessSet, found: list[list[int]]) -> None:
        own = next((index for index, ranks in enumerate(found) if self.comm.rank in ranks), None)
        part = self.comm.split(own)
        for index, ranks in enumerate(found):
            # A set of other ranks only is known, so that its number is the same everywhere.
            is_meant = index == own or (own is None and len(found) == 1 and process_set.mpi_comm is None)
            made = process_set if is_meant else ProcessSet(ranks)
            self.register(made, ranks, part if index == own else None)

    def register(self, process_set: ProcessSet, ranks: list[int], comm: Communicator | None) -> None:
        process_set.process_set_id = next(self.ids)
        process_set.ranks = ranks
        process_set.negotiator = None if comm is None else Negotiator(comm)
        self.process_sets[process_set.process_set_id] = process_set

    def free(self, process_set: ProcessSet) -> None:
        """Forget a set and release what it holds; every rank must call."""
        if process_set.negotiator is not None:
            process_set.negotiator.free()
            process_set.negotiator.group.free()
        self.forget(process_set)

    def forget(self, process_set: ProcessSet) -> None:
        assert process_set.process_set_id is not None
        del self.process_sets[process_set.process_set_id]
        process_set.process_set_id = None
        process_set.negotiator = None
