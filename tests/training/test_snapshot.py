"""Snapshots and rollback, against deep copies made by plain torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
import toy
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import equal

from gradmon import snapshot
from gradmon.snapshot import GENERATIONS, SnapshotError, Snapshots


def snapshots_of(model: nn.Module, *optimizers: Optimizer) -> Snapshots:
    return Snapshots(model, lambda: dict(model.named_parameters()), optimizers)


def restore_oldest(snapshots: Snapshots) -> int:
    step = snapshots.steps[0]
    snapshots.restore(step)
    return step


class Net(nn.Module):
    """With BatchNorm, a buffer that is not persistent, one that is made anew at every step, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.last = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("average", torch.zeros(8), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(self.first(inputs))
        if self.training:
            self.seen += 1
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.last(torch.tanh(self.tied(torch.tanh(self.second(x)))))


class ScheduleFree(Optimizer):
    """Counts in its groups, as schedule-free optimizers do, and starts those counts in `defaults`, as they do."""

    def __init__(self, params: Any, lr: float = 0.01, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "train_mode": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            weight = group["lr"] ** 2 * group["k"]
            group["weight_sum"] += weight
            group["norms"] = [*group.get("norms", [])[-2:], torch.tensor(float(group["k"]))]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, weight / group["weight_sum"])


MAKERS: dict[str, Any] = {
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adamw_tensor_rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=4),
    "schedule_free": ScheduleFree,
}


def build(kind: str = "adamw_fused", seed: int = 0) -> tuple[Net, Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, MAKERS[kind](model.parameters())


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 6, generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for number in range(first, last + 1):
        step(model, optimizer, number)


def deep_copy(model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    if isinstance(optimizer, torch.optim.LBFGS):  # attributes that a copied optimizer loses
        twin_optimizer._params, twin_optimizer._numel_cache = twin_optimizer.param_groups[0]["params"], None
    return twin, twin_optimizer


def everything(model: nn.Module, optimizer: Optimizer, *, rate: bool = False) -> dict[str, Any]:
    """All that a generation is of. With `rate`, settings too."""
    parameters = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    numbers = {id(p): n for n, p in reversed(list(enumerate(parameters)))}
    settings = {"params"} if rate else {"params", "lr"}
    return {
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
        "state": {numbers.get(id(key), key): value for key, value in optimizer.state.items() if value},
        "groups": [{k: v for k, v in group.items() if k not in settings} for group in optimizer.param_groups],
    }


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tensors_in(item)


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


@pytest.mark.parametrize("kind", MAKERS)
def test_everything_comes_back_and_training_goes_on_as_it_would_have(kind: str) -> None:
    """Bit for bit, twice; the schedule goes on."""
    model, optimizer = build(kind)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    snapshots = snapshots_of(model, optimizer)
    train(model, optimizer, 1, 3)
    snapshots.take(3)
    then, then_optimizer = deep_copy(model, optimizer)
    for _ in range(2):
        train(model, optimizer, 4, 9)
        scheduler.step()
        rate = copy.deepcopy(optimizer.param_groups[0]["lr"])
        assert not equal(everything(model, optimizer), everything(then, then_optimizer))
        spoil(model)
        gradients = [p.grad for p in model.parameters()]
        parameters = [(p, p.data_ptr(), p._version) for p in model.parameters()]
        assert restore_oldest(snapshots) == 3
        assert equal(everything(model, optimizer), everything(then, then_optimizer))
        assert optimizer.param_groups[0]["lr"] == rate, "the scheduler's"
        assert rate != then_optimizer.param_groups[0]["lr"]
        for p, (same, address, version) in zip(model.parameters(), parameters, strict=True):
            assert p is same and p.data_ptr() == address and p._version > version
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    twin, twin_optimizer = deep_copy(then, then_optimizer)
    twin_optimizer.param_groups[0]["lr"] = copy.deepcopy(rate)
    train(model, optimizer, 10, 15)
    train(twin, twin_optimizer, 10, 15)
    assert equal(everything(model, optimizer, rate=True), everything(twin, twin_optimizer, rate=True))


@pytest.mark.parametrize("kind", ["adamw_fused", "adamw_foreach", "sgd", "adagrad", "rmsprop", "nadam"])
def test_state_and_buffers_are_written_where_they_are(kind: str) -> None:
    """Graphs, compiled steps and fused kernels hold on to addresses, dicts to their keys."""
    model, optimizer = build(kind)
    train(model, optimizer, 1, 2)
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(2)
    train(model, optimizer, 3, 4)
    held = list(tensors_in(everything(model, optimizer)))
    dicts = list(optimizer.state.values())
    restore_oldest(snapshots)
    now = list(tensors_in(everything(model, optimizer)))
    count = len(list(model.parameters()))
    assert len(now) > count + len(list(model.buffers()))
    assert [t.data_ptr() for t in now] == [t.data_ptr() for t in held]
    assert all(a is b for a, b in zip(now[count:], held[count:], strict=True))
    assert all(a is b for a, b in zip(optimizer.state.values(), dicts, strict=True))


@pytest.mark.parametrize("name", [n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)])
def test_no_setting_of_torchs_optimizers_is_taken_for_a_count(name: str) -> None:
    kind = getattr(torch.optim, name)
    if not issubclass(kind, Optimizer) or kind is Optimizer:
        return
    layer = nn.Linear(3, 3, bias=False)
    optimizer = kind(layer.parameters(), lr=0.01)
    if "momentum" in optimizer.defaults or "betas" in optimizer.defaults:
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
        assert "initial_lr" in optimizer.param_groups[0] and cycle is not None
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    assert list(snapshot._own_entries(optimizer, optimizer.param_groups[0])) == []


def test_what_a_scheduler_cycles_is_its_own() -> None:
    model, optimizer = build("adamw_foreach")
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(0)
    for number in range(1, 6):
        step(model, optimizer, number)
        cycle.step()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    restore_oldest(snapshots)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before
    assert before["betas"] != (0.95, 0.999) and before["lr"] != before["initial_lr"]


def test_an_optimizers_own_counts_come_back_through_subclasses() -> None:
    class Child(ScheduleFree):
        def __init__(self, params: Any, **rest: Any) -> None:
            super().__init__(params, **rest)

    model, _ = build()
    optimizer = Child(model.parameters(), lr=0.01, beta=0.8)
    assert list(snapshot._own_entries(optimizer, optimizer.param_groups[0])) == ["k", "weight_sum", "train_mode"]


def test_the_oldest_of_three() -> None:
    model, optimizer = build()
    snapshots = snapshots_of(model, optimizer)
    assert snapshots.steps == ()
    copies = {}
    for number in range(1, 8):
        step(model, optimizer, number)
        snapshots.take(number)
        copies[number] = copy.deepcopy(everything(model, optimizer))
        assert snapshots.steps == tuple(range(max(1, number - GENERATIONS + 1), number + 1))
    held = snapshots.bytes_held()
    assert restore_oldest(snapshots) == 5
    assert equal(everything(model, optimizer), copies[5])
    assert snapshots.steps == (5,), "the newer ones are suspect"
    for number in range(8, 10):  # into the memory of those that were dropped, and then of the oldest
        step(model, optimizer, number)
        snapshots.take(number)
        copies[number] = copy.deepcopy(everything(model, optimizer))
    assert snapshots.steps == (5, 8, 9)
    spoil(model)
    assert restore_oldest(snapshots) == 5
    assert equal(everything(model, optimizer), copies[5])
    snapshots.take(20)
    snapshots.take(21)
    snapshots.take(22)
    spoil(model)
    assert restore_oldest(snapshots) == 20
    assert equal(everything(model, optimizer), copies[5])
    assert snapshots.bytes_held() == held, "memory is used again"


@pytest.mark.parametrize("chunk", [64, 1024, 1 << 26])
def test_tensors_span_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_CHUNK_BYTES", chunk)
    model, optimizer = build("lbfgs")
    snapshots = snapshots_of(model, optimizer)
    for number in range(1, 6):
        step(model, optimizer, number)
        snapshots.take(number)
        if number == 3:
            third = copy.deepcopy(everything(model, optimizer))
    spoil(model)
    assert restore_oldest(snapshots) == 3
    assert equal(everything(model, optimizer), third)


class NoMemory:
    """Lets so many allocations of host memory succeed."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.empty = torch.empty

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.empty(*args, **kwargs)


def test_running_out_of_memory_leaves_the_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_CHUNK_BYTES", 1024)
    model, optimizer = build("lbfgs")
    snapshots = snapshots_of(model, optimizer)
    for number in range(1, 4):
        step(model, optimizer, number)
        snapshots.take(number)
        if number == 1:
            first = copy.deepcopy(everything(model, optimizer))
        held = snapshots.bytes_held()
    step(model, optimizer, 4)  # larger by now than the oldest
    for left in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", NoMemory(left))
            with pytest.raises(RuntimeError, match="can't allocate"):
                snapshots.take(4)
        assert snapshots.steps == (1, 2, 3)
        assert snapshots.bytes_held() == held
    assert restore_oldest(snapshots) == 1
    assert equal(everything(model, optimizer), first)
    snapshots.take(5)
    assert snapshots.steps == (1, 5)


def own(value: Any) -> Any:
    """A copy of this rank's part."""
    return value.to_local().clone() if isinstance(value, DTensor) else value.clone()


def roll_back(task: sharded.Task, evaluate: bool) -> dict[str, Any]:
    """Train, take, train, roll back, train; and what a run that never went astray has at the same places."""
    world, rank = dist.get_world_size(), dist.get_rank()

    def made() -> tuple[nn.Module, Optimizer]:
        model = sharded.spread(sharded.build(), task.kind)
        return model, toy.optimizer_for(task.optimizer, model.parameters())

    def run(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
        for number in range(first, last + 1):
            optimizer.zero_grad()
            sharded.loss_of(model, task, sharded.data_rank(task.kind, rank, world), number, 1).backward()
            optimizer.step()

    def look(model: nn.Module, optimizer: Optimizer) -> Any:
        states = [{k: own(v) for k, v in optimizer.state[p].items()} for p in model.parameters()]
        return [own(p.detach()) for p in model.parameters()], states

    def evaluated(model: nn.Module) -> None:
        if evaluate:
            with torch.no_grad():
                model(torch.ones(2, toy.FEATURES))

    model, optimizer = made()
    run(model, optimizer, 1, 3)
    snapshots = snapshots_of(model, optimizer)
    evaluated(model)
    snapshots.take(3)
    then = look(model, optimizer)
    run(model, optimizer, 4, 6)
    assert not equal(look(model, optimizer), then)
    evaluated(model)
    restore_oldest(snapshots)
    back = look(model, optimizer)
    run(model, optimizer, 7, 9)
    twin, twin_optimizer = made()
    run(twin, twin_optimizer, 1, 3)
    run(twin, twin_optimizer, 7, 9)
    return {
        "same": equal(back, then),
        "goes_on": equal(look(model, optimizer), look(twin, twin_optimizer)),
        "whole": [sharded.whole(p) for p in model.parameters()],
    }


@pytest.mark.parametrize("evaluate", [False, True], ids=["", "evaluated"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "sequence_parallel"])
@pytest.mark.parametrize("optimizer", ["fused_adamw", "sgd"])
def test_two_ranks(two_ranks: Ranks, kind: str, optimizer: str, evaluate: bool) -> None:
    """Each its own part; FSDP2's root shows gathered copies after an evaluation, which must not be what is kept."""
    results = two_ranks.run(roll_back, sharded.Task("", kind, optimizer=optimizer), evaluate)
    for result in results:
        assert result["same"] and result["goes_on"]
    assert equal(results[0]["whole"], results[1]["whole"])


@pytest.mark.parametrize("kind", ["hsdp", "fsdp2+tp"])
def test_four_ranks(four_ranks: Ranks, kind: str) -> None:
    results = four_ranks.run(roll_back, sharded.Task("", kind), True)
    assert all(result["same"] and result["goes_on"] for result in results)
    assert all(equal(result["whole"], results[0]["whole"]) for result in results)


def test_what_is_registered_comes_back_too() -> None:
    model, optimizer = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    snapshots = snapshots_of(model, optimizer)
    snapshots.register("average", average)
    snapshots.register("scaler", scaler)
    train(model, optimizer, 1, 3)
    average.update_parameters(model)
    scaler.scale(torch.ones(()))
    snapshots.take(3)
    then = copy.deepcopy((average.state_dict(), scaler.state_dict()))
    train(model, optimizer, 4, 6)
    average.update_parameters(model)
    scaler.update(3.0)
    assert not equal(average.state_dict(), then[0])
    for _ in range(2):
        restore_oldest(snapshots)
        assert equal((average.state_dict(), scaler.state_dict()), then)
        spoil(average)


def test_register_says_what_is_wrong() -> None:
    model, optimizer = build()
    snapshots = snapshots_of(model, optimizer)
    with pytest.raises(TypeError, match=r"average must have state_dict\(\) and load_state_dict\(\) \(got a list\)"):
        snapshots.register("average", [])
    snapshots.register("average", model)
    with pytest.raises(ValueError, match="average is registered already"):
        snapshots.register("average", model)


@pytest.mark.parametrize("what", ["shape", "type", "gone", "expanded"])
def test_what_cannot_be_put_back_changes_nothing(what: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 1, 2)
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(2)
    train(model, optimizer, 3, 4)
    if what == "shape":
        model.average = torch.zeros(9)
    elif what == "type":
        model.average = torch.zeros(8, dtype=torch.float64)
    elif what == "expanded":
        model.average = torch.zeros(1).expand(8)
    else:
        del model.average
    before = copy.deepcopy(everything(model, optimizer))
    with pytest.raises(SnapshotError, match="buffer average is gone or has another shape"):
        restore_oldest(snapshots)
    assert equal(everything(model, optimizer), before)
    assert snapshots.steps == (2,)


def test_a_step_that_is_not_held_is_named() -> None:
    model, optimizer = build()
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(2)
    with pytest.raises(ValueError, match=r"no snapshot of step 3; those held are of \[2\]"):
        snapshots.restore(3)
    snapshots.clear()
    assert snapshots.steps == ()


def test_state_that_was_not_there_goes_and_state_that_has_gone_comes_back() -> None:
    model, optimizer = build("sgd")
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(0)
    train(model, optimizer, 1, 2)
    assert optimizer.state
    restore_oldest(snapshots)
    assert not optimizer.state
    train(model, optimizer, 1, 2)
    snapshots.clear()
    snapshots.take(2)
    then = copy.deepcopy(everything(model, optimizer))
    optimizer.state.clear()
    restore_oldest(snapshots)
    assert equal(everything(model, optimizer), then)
    new = nn.Linear(2, 2)
    optimizer.add_param_group({"params": list(new.parameters())})
    optimizer.state[new.weight]["momentum_buffer"] = torch.ones(2, 2)
    restore_oldest(snapshots)
    assert torch.equal(optimizer.state[new.weight]["momentum_buffer"], torch.ones(2, 2)), "not of that time"


def test_the_memory_is_known_before() -> None:
    model, optimizer = build()
    snapshots = snapshots_of(model, optimizer)
    said = snapshots.bytes_needed()
    assert snapshots.bytes_held() == 0
    for number in range(1, 5):
        step(model, optimizer, number)
        snapshots.take(number)
    assert snapshots.bytes_held() == said
    least = sum(t.numel() * t.element_size() for t in tensors_in(everything(model, optimizer)))
    assert 3 * least <= said <= 2 * 3 * least, "a chunk is a power of two"


def shards_made_anew(_: Any) -> bool:
    model = sharded.spread(sharded.build(), "fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, toy.FEATURES)).sum().backward()
    optimizer.step()
    snapshots = snapshots_of(model, optimizer)
    snapshots.take(1)
    then = [{k: own(v) for k, v in state.items()} for state in optimizer.state.values()]
    optimizer.state.clear()
    restore_oldest(snapshots)
    now = list(optimizer.state.values())
    made = [state["exp_avg"] for state in now]
    assert all(isinstance(t, DTensor) and t.shape == p.shape for t, p in zip(made, model.parameters(), strict=True))
    assert equal([{k: own(v) for k, v in state.items()} for state in now], then)
    model(torch.ones(2, toy.FEATURES)).sum().backward()
    optimizer.step()
    return True


def test_sharded_state_is_made_anew(two_ranks: Ranks) -> None:
    assert two_ranks.run(shards_made_anew, None) == [True, True]
