"""update_momentum and update_adam beside their twins, and both beside torch.optim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, twins
from mpitrain.memory.device.kernels import update_adam, update_momentum
from mpitrain.memory.twins import AdamStep, MomentumStep
from tests.support.placed import Placed, random_elements, same_numbers

torch = pytest.importorskip("torch")

FLOATS = ["float16", "bfloat16", "float32", "float64"]
# Groups of the same size, of half of it and of a quarter, on either side.
PAIRS = [(name, name) for name in FLOATS] + [
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "float32"),
    ("float64", "float32"),
    ("float16", "float64"),
]
COUNTS = st.one_of(st.integers(0, 40), st.integers(500, 3000))
KERNELS = {"momentum": (update_momentum, twins.update_momentum), "adam": (update_adam, twins.update_adam)}

momentum_steps = st.builds(
    MomentumStep,
    lr=st.sampled_from([0.1, 1e-3]),
    momentum=st.sampled_from([0.9, 0.5]),
    dampening=st.sampled_from([0.0, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    nesterov=st.booleans(),
    is_first=st.booleans(),
    gradient_scale=st.sampled_from([1.0, 1 / 3]),
)
adam_steps = st.builds(
    AdamStep,
    lr=st.sampled_from([0.1, 1e-3]),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.7)]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    is_decoupled=st.booleans(),
    step=st.integers(1, 1000),
    gradient_scale=st.sampled_from([1.0, 1 / 3]),
)
STEPS = {"momentum": momentum_steps, "adam": adam_steps}


def wide_of(*dtypes):
    return "float64" if "float64" in dtypes else "float32"


@pytest.mark.parametrize(("parameter", "gradient"), PAIRS)
@pytest.mark.parametrize("optimizer", KERNELS)
@settings(max_examples=8)
@given(data=st.data())
def test_kernel_and_twin_agree(cupy, optimizer, parameter, gradient, data):
    launch, twin = KERNELS[optimizer]
    step = data.draw(STEPS[optimizer], label="step")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    count = data.draw(COUNTS, label="count")
    shifts = data.draw(st.sampled_from([[0] * 4, [1] * 4, [0, 1, 2, 3]]), label="shifts")
    wide = wide_of(parameter, gradient)
    names = [parameter, gradient, wide] if optimizer == "momentum" else [parameter, gradient, wide, wide]
    arrays = [random_elements(rng, name, count, special=False) for name in names]
    if optimizer == "adam":
        np.abs(arrays[3], out=arrays[3])
    placed = [Placed(cupy, array, shift) for array, shift in zip(arrays, shifts, strict=False)]
    addresses = [each.address for each in placed]
    is_plain = optimizer == "momentum" and data.draw(st.booleans(), label="plain")
    if is_plain:
        addresses[2] = arrays[2] = None
    options = {"parameter_dtype": DTYPES[parameter], "gradient_dtype": DTYPES[gradient], "step": step}
    launch(*addresses, count=count, **options)
    twin(*arrays, **options)
    cupy.cuda.get_current_stream().synchronize()
    for each, name, expected in zip(placed, names, arrays, strict=True):
        each.check_surroundings()
        assert expected is None or same_numbers(each.array, expected, name)


def train(optimizer, parameters, gradients):
    """Return the parameters after torch's steps with these gradients."""
    optimizer = optimizer([parameters])
    for gradient in gradients:
        parameters.grad = torch.from_numpy(gradient)
        optimizer.step()
    return parameters.detach().numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_momentum_is_that_of_torch(cupy, options, dtype):
    rng = np.random.default_rng(1)
    start, *gradients = (rng.standard_normal(1001).astype(dtype) for _ in range(9))
    tensor = torch.from_numpy(start.copy()).requires_grad_()
    expected = train(lambda parameters: torch.optim.SGD(parameters, lr=0.05, **options), tensor, gradients)
    parameters = Placed(cupy, start)
    momentum = Placed(cupy, np.full(1001, np.nan, dtype)) if "momentum" in options else None
    kept = [Placed(cupy, gradient) for gradient in gradients]
    for index, gradient in enumerate(kept):
        update_momentum(
            parameters.address,
            gradient.address,
            momentum and momentum.address,
            count=1001,
            parameter_dtype=DTYPES[dtype],
            gradient_dtype=DTYPES[dtype],
            step=MomentumStep(lr=0.05, is_first=index == 0, **options),
        )
    cupy.cuda.get_current_stream().synchronize()
    assert np.allclose(parameters.array, expected, rtol=0, atol=40 * np.finfo(dtype).eps)
    assert np.abs(parameters.array - start).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("is_decoupled", "weight_decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_adam_is_that_of_torch(cupy, is_decoupled, weight_decay, dtype):
    rng = np.random.default_rng(2)
    start, *gradients = (rng.standard_normal(1001).astype(dtype) for _ in range(9))
    tensor = torch.from_numpy(start.copy()).requires_grad_()
    factory = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    expected = train(lambda parameters: factory(parameters, **options), tensor, gradients)
    parameters, mean, square = (Placed(cupy, array) for array in (start, np.zeros_like(start), np.zeros_like(start)))
    kept = [Placed(cupy, gradient) for gradient in gradients]
    for index, gradient in enumerate(kept):
        update_adam(
            *(each.address for each in (parameters, gradient, mean, square)),
            count=1001,
            parameter_dtype=DTYPES[dtype],
            gradient_dtype=DTYPES[dtype],
            step=AdamStep(step=index + 1, is_decoupled=is_decoupled, **options),
        )
    cupy.cuda.get_current_stream().synchronize()
    assert np.allclose(parameters.array, expected, rtol=0, atol=40 * np.finfo(dtype).eps)
    assert np.abs(parameters.array - start).max() > 0.1


@pytest.mark.parametrize("gradient", ["float16", "float32"])
def test_gradient_scale_comes_before_everything_else(cupy, gradient):
    rng = np.random.default_rng(3)
    start = rng.standard_normal(100).astype(np.float32)
    # Multiples of 4 in a small range, so that dividing by 4 is exact in float16, too.
    gradients = (4 * rng.integers(-100, 100, 100)).astype(gradient)
    results = []
    for scaled, scale in ((gradients, 0.25), ((gradients / 4).astype(gradient), 1.0)):
        parameters, given = Placed(cupy, start), Placed(cupy, scaled)
        update_momentum(
            parameters.address,
            given.address,
            None,
            count=100,
            parameter_dtype=DTYPES["float32"],
            gradient_dtype=DTYPES[gradient],
            step=MomentumStep(lr=0.1, weight_decay=0.5, gradient_scale=scale),
        )
        cupy.cuda.get_current_stream().synchronize()
        results.append(parameters.array)
    assert np.array_equal(*results)


def test_types_are_checked(cupy):
    with pytest.raises(TypeError, match=r"^dtype: must be a floating-point type, got int32; convert to float32"):
        update_momentum(
            0,
            0,
            None,
            count=1,
            parameter_dtype=DTYPES["float32"],
            gradient_dtype=DTYPES["int32"],
            step=MomentumStep(lr=1),
        )
