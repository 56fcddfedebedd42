"""Every kernel compiles for the GPUs of a cluster, on a machine without any, and keeps its numbers in registers."""

from __future__ import annotations

import itertools
import re

import pytest

from mpitrain.memory.device.kernels import all_variants, source_text
from tests.support.nvrtc import compile_for, find_nvrtc

pytestmark = pytest.mark.skipif(find_nvrtc() is None, reason="needs the wheel nvidia-cuda-nvrtc")

_RESOURCES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def cases():
    """Yield all variants for both architectures, but of reduce_peers one number of peers for each type and operation.

    The number goes round, so that each type and each operation has every number of peers on one of the architectures.
    """
    variants = list(all_variants())
    reductions = [variant for variant in variants if variant.source == "reduce_peers"]
    groups = itertools.groupby(reductions, lambda variant: variant.macros[:2])
    for position, (_, group) in enumerate(groups):
        numbers = list(group)
        # Types have four operations, but for the last ones, so this is the sum of the places of both.
        turn = position + position // 4
        yield "sm_80", numbers[turn % 4]
        yield "sm_90", numbers[(turn + 2) % 4]
    yield from itertools.product(["sm_80", "sm_90"], [each for each in variants if each.source != "reduce_peers"])


CASES = list(cases())


@pytest.mark.parametrize(("architecture", "variant"), CASES, ids=str)
def test_kernel_compiles_without_a_warning(architecture, variant):
    code, log = compile_for(architecture, source_text(variant.source), [*variant.options, "--ptxas-options=-v"])
    assert code, log
    assert "warning" not in log
    resources = _RESOURCES.findall(log)
    assert resources, log
    # A stack frame or a spilled register is traffic to memory that the kernel was not meant to have.
    assert set(resources) == {("0", "0", "0")}, log
    assert variant.source.encode() in code


def test_cases_have_every_type_operation_and_number_of_peers():
    reductions = [dict(variant.macros) for _, variant in CASES if variant.source == "reduce_peers"]
    for macro in ("ELEMENT", "COMBINE"):
        for value in {each[macro] for each in reductions}:
            peers = {each["PEERS"] for each in reductions if each[macro] == value}
            assert peers == {0, 2, 4, 8}, value


def test_errors_of_the_compiler_are_seen():
    code, log = compile_for("sm_90", 'extern "C" __global__ void broken() { missing(); }', [])
    assert code == b""
    assert "missing" in log
    code, log = compile_for("sm_90", 'extern "C" __global__ void unclean() { int unused; }', [])
    assert code
    assert "warning" in log
