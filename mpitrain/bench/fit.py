"""Finds the cluster on which measured times are most likely: least squares of their logarithms.

Logarithms, as a time that is predicted twice too long is as wrong as one that is twice too short, whatever the size.
Parameters that the measurements say nothing about stay where they are: a weak pull keeps them near the start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpitrain.bench.model import Cluster, priced_algorithms, time_s
from mpitrain.bench.results import CollectiveRun
from mpitrain.collectives.table import Shape

__all__ = ["Observation", "error_of", "fit_cluster", "observations_of"]

# How strongly a parameter is pulled towards the start, in comparison with one measurement.
_PULL = 0.01
_MOST_STEPS = 200
_MOST_SHRUNK = 30
_STEP = 1e-4
# Parameters may be so many times more or less than the start.
_MOST_CHANGE = 1e6


class Observation(NamedTuple):
    """One measured time."""

    collective: str
    algorithm: str
    nbytes: int
    shape: Shape
    segment_nbytes: int
    measured_s: float

    def predicted_s(self, cluster: Cluster) -> float:
        """Return what the model says."""
        return time_s(
            self.collective, self.algorithm, self.nbytes, self.shape, cluster, segment_nbytes=self.segment_nbytes
        )


def observations_of(run: CollectiveRun) -> list[Observation]:
    """Return the times of a run that have a price: sums of float32 in ordinary memory are what prices are meant for."""
    priced = priced_algorithms(run.collective, run.setup.shape)
    return [
        Observation(run.collective, row.side, row.nbytes, run.setup.shape, run.setup.segment_nbytes, row.median_s)
        for row in run.rows
        if row.side in priced and row.side not in run.libraries and row.memory == "host"
        if row.dtype == "float32" and row.op in ("", "sum")
    ]


def error_of(observation: Observation, cluster: Cluster) -> float:
    """Return by how much the prediction differs from the measurement, as a part of the measurement."""
    return observation.predicted_s(cluster) / observation.measured_s - 1


def fit_cluster(observations: Sequence[Observation], start: Cluster | None = None) -> Cluster:
    """Return the cluster that predicts the observations best.

    Args:
        observations: At least one.
        start: Where to begin; the defaults if not given.

    Raises:
        ValueError: There are no observations.
    """
    if not observations:
        raise ValueError(
            "fit: no times of algorithms that have a price; measure ours with mpitrain bench, float32 sums"
        )
    begin = np.log(np.array(dataclasses.astuple(start or Cluster())))
    measured = np.log([each.measured_s for each in observations])

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        cluster = _cluster_at(point)
        predicted = np.log([each.predicted_s(cluster) for each in observations])
        return np.concatenate([predicted - measured, _PULL * (point - begin)])

    return _cluster_at(_least_squares(residuals, begin))


def _cluster_at(point: NDArray[np.float64]) -> Cluster:
    return Cluster(
        **dict(zip((field.name for field in dataclasses.fields(Cluster)), np.exp(point).tolist(), strict=True))
    )


def _least_squares(residuals: object, begin: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where the sum of squares is lowest, by the method of Levenberg and Marquardt."""
    assert callable(residuals)
    limit = math.log(_MOST_CHANGE)
    point, damping = begin, 1e-2
    here = residuals(point)
    for _ in range(_MOST_STEPS):
        slopes = np.stack([(residuals(point + step) - here) / _STEP for step in _STEP * np.eye(point.size)], axis=1)
        gradient = slopes.T @ here
        curvature = slopes.T @ slopes
        for _ in range(_MOST_SHRUNK):
            change = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature) + 1e-9), -gradient)
            candidate = np.clip(point + change, begin - limit, begin + limit)
            there = residuals(candidate)
            if there @ there < here @ here:
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        else:
            return point
        gain = here @ here - there @ there
        point, here = candidate, there
        if gain < 1e-9 * (here @ here + 1e-12):
            return point
    return point
