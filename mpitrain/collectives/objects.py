"""Objects: how they are pickled, and their way over all-gathers of bytes.

Ranks of one job trust each other, as they run one program of one user: unpickling what a peer sends runs code that the
peer chooses. Nothing that comes from elsewhere is unpickled: `training.checkpoint_file` reads files without that.
"""

from __future__ import annotations

import abc
import pickle
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.plan import Plan, empty_plan
from mpitrain.collectives.verbs import Collectives

__all__ = ["ObjectCollectives", "try_pickle"]


def try_pickle(value: Any) -> tuple[bytes, str]:
    """Return the pickled value, or nothing and what is wrong.

    What `pickle` refuses, functions without a name for example, is left to cloudpickle if that is installed.
    """
    try:
        return pickle.dumps(value), ""
    except Exception as problem:  # noqa: BLE001  (whatever a class's own pickling raises)
        try:
            import cloudpickle

            return cloudpickle.dumps(value), ""
        except ImportError:
            return b"", f"{type(value).__qualname__} cannot be pickled ({problem}); cloudpickle is not installed"
        except Exception:  # noqa: BLE001  (see above)
            return b"", f"{type(value).__qualname__} cannot be pickled ({problem})"


class ObjectCollectives(Collectives):
    """The collectives, also of objects."""

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """This rank, from 0 to `size - 1`."""

    def allgather_obj(self, value: Any) -> list[Any]:
        """Collect one picklable value of each rank; every rank returns all, in rank order.

        Ranks of one job trust each other: unpickling runs code that a peer chooses.

        Raises:
            ValueError: A rank's value cannot be pickled; on every rank.
        """
        return [pickle.loads(data) for data in self._exchange_pickled(value)]

    def broadcast_obj(self, value: Any = None, *, root: int = 0) -> Any:
        """Copy the root's picklable `value`, which is ignored elsewhere; every rank returns it, the root its own.

        Raises:
            ValueError: The root's value cannot be pickled, on every rank; or the root is out of range.
        """
        self._run(_plan_root, root)
        is_root = self.rank == root
        values = self._exchange_pickled(value if is_root else None)
        return value if is_root else pickle.loads(values[root])

    def _exchange_pickled(self, value: Any) -> list[bytes]:
        """Return the pickled values of all ranks, in rank order."""
        data, problem = try_pickle(value)
        error = problem and f"rank {self.rank}: {problem}"
        header = np.array([[len(data), len(error.encode())]], np.int64)
        lengths = self.allgather(header)
        if lengths[:, 1].any():
            texts = _allgather_bytes(self, error.encode(), lengths[:, 1])
            raise ValueError("object: " + "; ".join(text.decode() for text in texts if text))
        return _allgather_bytes(self, data, lengths[:, 0])


def _allgather_bytes(comm: Collectives, data: bytes, lengths: NDArray[np.int64]) -> list[bytes]:
    rows = [int(length) for length in lengths]
    everything = comm.allgather(np.frombuffer(data, np.uint8), rows=rows)
    ends = list(accumulate(rows))
    return [everything[end - length : end].tobytes() for end, length in zip(ends, rows, strict=True)]


def _plan_root(context: Context, root: int) -> Plan[None]:
    """Prepare nothing but the check of a root, which is the same on all ranks."""
    context.check_root("broadcast_obj", root)
    return empty_plan(f"broadcast_obj from root {root}")
