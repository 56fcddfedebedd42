"""Lets an operation work on the parts of an array that have arrived, and give away those that are final.

An array on a device has an image on the host (`memory.device.Image`), which is copied in pieces. An operation need not
wait for all of them: a *gate* tells it how far the image is, and takes back what the operation has done with.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.program import Program
from mpitrain.memory.device import Image

__all__ = ["Finish", "Gate", "Gates", "Gating"]

Finish = Callable[[NDArray[Any]], None]
"""What is done, in place, to a part of an array when it is final."""


class Gate:
    """One run's way in and out of an image.

    Args:
        image: Of the array.
        writes: Whether what is final goes back to the device.
    """

    def __init__(self, image: Image, *, writes: bool) -> None:
        self.data = image.host.flat
        self.piece_count = image.piece_count
        self._image = image
        self._writes = writes
        self._given: list[tuple[int, int]] = []

    @property
    def num_arrived(self) -> int:
        """Elements, from the first on, that may be read and written."""
        return self._image.num_arrived

    def until(self, last: int) -> Generator[bool, None, None]:
        """Return the task that waits until all elements before `last` have arrived."""
        while self.num_arrived < last:
            yield False

    def give(self, first: int, last: int) -> None:
        """Elements `first` to `last` are final: they have arrived, and nobody touches them any more."""
        if self._writes:
            self._image.give(first, last)
            self._given.append((first, last))

    def give_rest(self) -> None:
        """Everything is final."""
        begin = 0
        for first, last in [*sorted(self._given), (self.data.size, self.data.size)]:
            self.give(begin, first)
            begin = last


class Gates:
    """The gates of one run.

    Args:
        gates: Of the arrays that are there.
        adopt: Returns the gate of a result that is allocated in the run.
    """

    def __init__(self, gates: Sequence[Gate], adopt: Callable[[Any], Gate]) -> None:
        self._gates = list(gates)
        self._adopt = adopt

    def of(self, data: NDArray[Any] | None) -> Gate | None:
        """Return the gate of a flat array; None if it has none."""
        return next((gate for gate in self._gates if gate.data is data), None)

    def add(self, result: Any) -> None:
        """A result has been allocated, parts of which may be given away before the end."""
        self._gates.append(self._adopt(result))


class Gating:
    """Holds the transfers of a program back until their memory has arrived, and gives away what no other one touches.

    Args:
        gate: Of one of the arrays.
        program: Whose transfers.
        waits: How much each transfer waits for, to which this one adds.
        array: Number of the array in the program's layout.
        finish: See `Finish`.
    """

    def __init__(self, gate: Gate, program: Program, waits: list[int], array: int, finish: Finish | None) -> None:
        self._gate = gate
        self._finish = finish
        self._program = program
        self._array = array
        transfers = program.transfers
        arrived = gate.num_arrived
        # Those that wait, the first to go last.
        self._held: list[tuple[int, int]] = []
        self._users = [0] * -(-gate.data.size // gate.piece_count)
        for index, transfer in enumerate(transfers):
            if transfer.array != array:
                continue
            end = transfer.offset + transfer.count
            if end > arrived:
                waits[index] += 1
                self._held.append((end, index))
            for piece in self._pieces(index):
                self._users[piece] += 1
        self._held.sort(reverse=True)
        self._unused = [piece for piece, users in enumerate(self._users) if not users]

    def admit(self) -> Sequence[int]:
        """Return the transfers whose memory has arrived since the last time."""
        if not self._held or self._gate.num_arrived < self._held[-1][0]:
            return ()
        arrived = self._gate.num_arrived
        admitted = []
        while self._held and self._held[-1][0] <= arrived:
            admitted.append(self._held.pop()[1])
        return admitted

    def done(self, index: int) -> None:
        """A transfer is done."""
        for piece in self._pieces(index):
            self._users[piece] -= 1
            if not self._users[piece]:
                self._give(piece)

    def end(self) -> Generator[bool, None, None]:
        """Return the task that gives away what no transfer touches."""
        if self._unused:
            yield from self._gate.until(self._gate.data.size)
        for piece in self._unused:
            self._give(piece)

    def _pieces(self, index: int) -> range:
        transfer = self._program.transfers[index]
        if transfer.array != self._array or not transfer.count:
            return range(0)
        size = self._gate.piece_count
        return range(transfer.offset // size, -(-(transfer.offset + transfer.count) // size))

    def _give(self, piece: int) -> None:
        first = piece * self._gate.piece_count
        part = self._gate.data[first : first + self._gate.piece_count]
        # A piece arrives as a whole, so what transfers have touched has.
        if self._finish is not None:
            self._finish(part)
        self._gate.give(first, first + part.size)
