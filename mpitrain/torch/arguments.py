"""Arguments of `DistributedOptimizer`: checked, and in the form in which the reducers use them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mpitrain.memory import ReduceOp
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.world import ProcessSet

__all__ = ["Reduction", "check_passes", "groups_of_arguments", "names_of"]

Tensor = torch.Tensor

# Their casts are done on the way into a bucket; methods of any other compressor are called.
_CASTS = (Compression.none, Compression.fp16, Compression.bf16)


@dataclasses.dataclass(frozen=True, slots=True)
class Reduction:
    """How the gradients of an optimizer are reduced.

    Attributes:
        op: How gradients of different ranks are combined.
        process_set: Whose ranks take part.
        compression: How gradients travel.
        predivide: Part of the division of an average that is done before the sum.
        groups: How many groups, or which gradients are one; see `DistributedOptimizer`.
        sparse_as_dense: Whether sparse gradients travel as dense ones.
        scale_local: Whether gradients that are not reduced are divided by the number of ranks.
    """

    op: ReduceOp
    process_set: ProcessSet
    compression: type[Compressor] = Compression.none
    predivide: float = 1.0
    groups: int | Sequence[Sequence[Tensor]] = 0
    sparse_as_dense: bool = False
    scale_local: bool = True

    def __post_init__(self) -> None:
        if self.predivide != 1.0 and self.op is not ReduceOp.AVERAGE:
            raise ValueError(
                "gradient_predivide_factor not supported with op != Average, "
                f"got {self.predivide} with {self.op.name.lower()}; leave one out"
            )
        if not all(callable(getattr(self.compression, name, None)) for name in ("compress", "decompress")):
            raise ValueError(
                "compression: must be Compression.none, .fp16, .bf16 or a class with compress and decompress, "
                f"got {self.compression!r}; see hvd.Compression"
            )

    @property
    def is_in_buckets(self) -> bool:
        """Whether dense gradients travel in buckets, in which they are cast at most."""
        return self.compression in _CASTS

    @property
    def op_in_buckets(self) -> str:
        """Name of the reduction of buckets: averages are sums of what was scaled."""
        return "sum" if self.op is ReduceOp.AVERAGE else self.op.name.lower()

    def factors(self, size: int) -> tuple[float, float]:
        """Return by what gradients of `size` ranks are multiplied on their way into a bucket, and after the sum."""
        if self.op is not ReduceOp.AVERAGE:
            return 1.0, 1.0
        if self.predivide == 1.0:
            # Dividing before the sum keeps small dtypes from overflowing, and costs nothing on the way into the bucket.
            return 1.0 / size, 1.0
        return 1.0 / self.predivide, self.predivide / size

    def wire_dtype(self, param: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter's gradient lies in a bucket."""
        wire_dtype = self.compression.wire_dtype if self.is_in_buckets else None
        return wire_dtype if wire_dtype is not None and param.dtype.is_floating_point else param.dtype

    @property
    def keeps_sparse(self) -> bool:
        """Whether sparse gradients travel as such."""
        # What a rank has no entry for is zero, which only sums can leave out.
        return not self.sparse_as_dense and self.op in (ReduceOp.SUM, ReduceOp.AVERAGE)

    def travels_by_name(self, *, is_sparse: bool) -> bool:
        """Whether a gradient is reduced by itself, as a named operation."""
        return not self.is_in_buckets or (is_sparse and self.keeps_sparse)

    def groups_among(self, params: Sequence[Tensor]) -> list[list[int]]:
        """Return the groups as positions in `params`; what is not among these is left out."""
        if isinstance(self.groups, int):
            bounds = [len(params) * index // self.groups for index in range(self.groups + 1)] if self.groups else []
            return [list(range(first, last)) for first, last in itertools.pairwise(bounds)]
        position_of = {param: position for position, param in enumerate(params)}
        return [[position_of[param] for param in group if param in position_of] for group in self.groups]

    def describe(self, size: int) -> str:
        """Return what must be the same on every rank."""
        before, after = self.factors(size)
        return (
            f"op={self.op_in_buckets!r}, factors {before:g} and {after:g}, compression {self.compression.__name__}, "
            f"sparse_as_dense={self.sparse_as_dense}"
        )


def groups_of_arguments(groups: Any, num_groups: int) -> int | list[list[Tensor]]:
    """Return the groups that the two arguments of `DistributedOptimizer` mean.

    Raises:
        ValueError: Neither a number nor lists of different tensors.
    """
    if num_groups:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if groups is None:
        return 0
    if isinstance(groups, int) and groups >= 0:
        return groups
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in groups):
        raise ValueError(
            f"groups should be a non-negative integer or a list of list of torch.Tensor, got {groups!r}; "
            "pass lists of parameters"
        )
    lists = [list(group) for group in groups]
    members = [member for group in lists for member in group]
    if not all(isinstance(member, torch.Tensor) for member in members):
        kinds = sorted({type(member).__name__ for member in members if not isinstance(member, torch.Tensor)})
        raise ValueError(f"groups must consist of torch.Tensor, got {', '.join(kinds)}; pass parameters")
    if len(set(members)) < len(members):
        repeated = next(member for member, count in collections.Counter(members).items() if count > 1)
        raise ValueError(
            f"A parameter can only appear once in groups, got one of shape {list(repeated.shape)} again; remove it"
        )
    return lists


def names_of(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    """Return the name of each parameter that has one.

    Raises:
        ValueError: Names that are missing, repeated, or no pairs with a parameter.
    """
    if named_parameters is None:
        return {}
    pairs = list(named_parameters)
    if not all(_is_named(pair) for pair in pairs):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            f"model.named_parameters(), got {pairs[:1]}"
        )
    counts = collections.Counter(name for name, _ in pairs)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(repeated)}")
    name_of = {param: name for name, param in pairs}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    unnamed = [param for param in params if param not in name_of]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: "
            f"{len(unnamed)} of {len(params)}, the first of shape {list(unnamed[0].shape)}; name all or none"
        )
    return name_of


def check_passes(passes: int) -> None:
    """Refuse a number of backward passes per step that is none.

    Raises:
        ValueError: Below 1.
    """
    if passes < 1:
        raise ValueError(f"backward_passes_per_step: must be at least 1, got {passes}; 1 steps after every pass")


def _is_named(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
