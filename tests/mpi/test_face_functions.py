"""Parameters, optimizer states and objects of the root on every rank."""

from __future__ import annotations

import copy
import decimal
import sys

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def make_model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


FORMS = {
    "state dict": lambda model: model.state_dict(),
    "generator": lambda model: model.named_parameters(),
    "list of pairs": lambda model: list(model.named_parameters()),
    "list of tensors": lambda model: list(model.parameters()),
}


@pytest.mark.parametrize("form", FORMS)
def test_broadcast_parameters(form):
    root = hvd.size() - 1
    model, reference = make_model(hvd.rank()), make_model(root)
    with torch.no_grad():
        model[1].running_mean += hvd.rank()
        reference[1].running_mean += root
    hvd.broadcast_parameters(FORMS[form](model), root_rank=root)
    for mine, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, expected)
        assert mine.requires_grad
    if form == "state dict":
        assert_same(model.state_dict(), reference.state_dict())


def test_broadcast_parameters_that_are_not_contiguous():
    model = make_model(hvd.rank()).to(memory_format=torch.channels_last)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    assert_same(dict(model.state_dict()), dict(make_model(0).state_dict()))
    transposed = torch.arange(6.0).reshape(2, 3).T * (hvd.rank() + 1)
    hvd.broadcast_parameters({"a": transposed}, 0)
    assert torch.equal(transposed, torch.arange(6.0).reshape(2, 3).T)


def test_broadcast_parameters_of_every_dtype_and_none_at_all():
    tensors = {
        str(dtype): torch.arange(5).add(hvd.rank()).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.complex64)
    }
    hvd.broadcast_parameters({**tensors, "no tensor": 3, "none": None}, 0)
    for tensor in tensors.values():
        assert torch.equal(tensor, torch.arange(5).to(tensor.dtype))
    hvd.broadcast_parameters({}, 0)
    hvd.broadcast_parameters([], 0)


def test_broadcast_parameters_is_seen_by_autograd():
    weight, saved = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    product = (weight * saved).sum()
    hvd.broadcast_parameters({"a": saved}, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.mpi(min_size=2)
def test_different_parameters_are_an_error_on_every_rank():
    is_odd = hvd.rank() == hvd.size() - 1
    names = {"a": torch.ones(2), "c" if is_odd else "b": torch.ones(2)}
    kept = {name: tensor.clone() for name, tensor in names.items()}
    with pytest.raises(hvd.HorovodInternalError, match=r"ranks have different parameters; .* differ in \['b', 'c'\]"):
        hvd.broadcast_parameters(names, 0)
    assert_same(names, kept)
    with pytest.raises(hvd.HorovodInternalError, match="Mismatched BROADCAST tensor shapes"):
        hvd.broadcast_parameters({"a": torch.ones(2 + is_odd)}, 0)
    with pytest.raises(hvd.HorovodInternalError, match="ranks have different parameters"):
        hvd.broadcast_parameters([torch.ones(2)] * (1 + is_odd), 0)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.parametrize("params", [3, "abc", torch.ones(3)], ids=["int", "str", "tensor"])
def test_broadcast_parameters_of_another_type(params):
    with pytest.raises(ValueError, match="invalid params of type"):
        hvd.broadcast_parameters(params, 0)


OPTIMIZERS = {
    "sgd": lambda params, rank: torch.optim.SGD(params, lr=0.1 * (rank + 1)),
    "momentum": lambda params, rank: torch.optim.SGD(params, lr=0.1, momentum=0.9 - 0.1 * rank, nesterov=True),
    "adam": lambda params, rank: torch.optim.Adam(params, lr=1e-3 * (rank + 1), betas=(0.9, 0.99 - 0.01 * rank)),
    "adamw": lambda params, rank: torch.optim.AdamW(params, lr=1e-3, amsgrad=rank == 0),
    "rmsprop": lambda params, rank: torch.optim.RMSprop(params, lr=1e-2, centered=rank == 0, momentum=0.9),
    "adagrad": lambda params, rank: torch.optim.Adagrad(params, lr=1e-2 * (rank + 1)),
    "lbfgs": lambda params, rank: torch.optim.LBFGS(params, lr=0.1 * (rank + 1), max_iter=2),
    "tensor lr": lambda params, rank: torch.optim.Adam(params, lr=torch.tensor(1e-3 * (rank + 1))),
}
USED = {"none": [], "all": range(64), "root": [0], "others": range(1, 64)}


def use(optimizer, model, seed):
    torch.manual_seed(seed)
    inputs = torch.randn(4, 1, 4, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_broadcast_optimizer_state(kind, used):
    rank = hvd.rank()
    model, reference_model = make_model(0), make_model(0)
    optimizer = OPTIMIZERS[kind](model.parameters(), rank)
    reference = OPTIMIZERS[kind](reference_model.parameters(), 0)
    if rank in USED[used]:
        use(optimizer, model, seed=rank)
    if 0 in USED[used]:
        use(reference, reference_model, seed=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_same(optimizer.state_dict(), reference.state_dict())
    # And it goes on as the root's.
    model.load_state_dict(reference_model.state_dict())
    use(optimizer, model, seed=9)
    use(reference, reference_model, seed=9)
    assert_same(dict(model.state_dict()), dict(reference_model.state_dict()))


def test_values_of_optimizer_state_keep_their_types():
    model = make_model(0)
    groups = [
        {"params": model[0].parameters(), "lr": 1, "tag": "conv"},
        {"params": model[3].parameters(), "lr": decimal.Decimal("0.5"), "tag": None},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    if hvd.rank() > 0:
        optimizer.param_groups[0].update(lr=0.7, tag="other")
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    first, second = optimizer.param_groups
    assert (first["lr"], first["tag"]) == (1, "conv")
    assert type(first["lr"]) is int
    assert type(second["lr"]) is decimal.Decimal
    assert second["tag"] is None


OBJECTS = [None, 0, "text", b"\0bytes", {"a": [1, (2.0, None)]}, torch.arange(4), list(range(100_000)), object]


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: type(obj).__name__)
def test_broadcast_object(obj):
    for root in range(hvd.size()):
        mine = copy.copy(obj) if hvd.rank() == root else "ignored"
        received = hvd.broadcast_object(mine, root_rank=root)
        assert_same(received, obj)
        assert (received is mine) == (hvd.rank() == root)
    assert_same(hvd.broadcast_object(obj, name="state"), obj)


def test_objects_of_the_ranks_that_ignore_them_need_no_pickling():
    mine = {"epoch": 3} if hvd.rank() == 0 else (lambda: None)
    assert hvd.broadcast_object(mine) == {"epoch": 3}


def test_allgather_object():
    mine = {"rank": hvd.rank(), "padding": "x" * 1000 * hvd.rank()}
    expected = [{"rank": rank, "padding": "x" * 1000 * rank} for rank in range(hvd.size())]
    assert hvd.allgather_object(mine) == expected
    assert hvd.allgather_object(mine, name="metrics") == expected


def test_functions_without_a_name_go_where_cloudpickle_is_installed():
    pytest.importorskip("cloudpickle")
    rank = hvd.rank()
    assert hvd.broadcast_object({"scale": lambda epoch: 10 * epoch + rank})["scale"](3) == 30
    assert [function(1) for function in hvd.allgather_object(lambda step: step + rank)] == [
        1 + other for other in range(hvd.size())
    ]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["warm_up"] = lambda step: step * 2 + rank
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.param_groups[0]["warm_up"](4) == 8


def test_without_cloudpickle_they_are_an_error_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ValueError, match=r"function cannot be pickled \(.*\); cloudpickle is not installed"):
        hvd.broadcast_object(lambda: None)


class Stubborn:
    def __reduce__(self):
        raise RuntimeError("not today")


def test_object_that_cannot_be_pickled_is_an_error_on_every_rank():
    mine = Stubborn() if hvd.rank() == 0 else None
    with pytest.raises(ValueError, match=r"broadcast_object: Stubborn cannot be pickled \(not today\)"):
        hvd.broadcast_object(mine, 0)
    with pytest.raises(ValueError, match=r"allgather_object: rank 0: Stubborn cannot be pickled \(not today\)"):
        hvd.allgather_object(mine)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["hook"] = mine
    with pytest.raises(ValueError, match="cannot be pickled"):
        hvd.broadcast_optimizer_state(optimizer, 0)
    assert hvd.allgather_object(hvd.rank()) == list(range(hvd.size()))
