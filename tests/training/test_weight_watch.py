"""What is told of weights, gradients and moments, from real steps."""

from __future__ import annotations

import array
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from gradmon import stats
from gradmon.config import Config, WeightsConfig
from gradmon.record import DETAIL_COLUMNS, STATISTICS, Finding
from gradmon.updates import UpdateSample
from gradmon.weight_watch import RULES, MomentSample, WeightWatch

NAN = math.nan


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(*, width: int = 16) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


class Trained:
    """A model whose every step is measured, and judged."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: WeightsConfig | None = None, features: int = 8
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        self.watch = WeightWatch(config or WeightsConfig(), names, [p.shape for p in self.parameters])
        self.found: list[Finding] = []
        self.step, self._features = 0, features

    def steps(self, count: int, change: Callable[[], Any] = lambda: None) -> list[Finding]:
        """Findings of so many steps; `change` is called between backward and step."""
        generator, before = torch.Generator().manual_seed(self.step), len(self.found)
        for _ in range(count):
            self.step += 1
            self.optimizer.zero_grad()
            weight = next(self.model.parameters())
            inputs = torch.randn(32, self._features, generator=generator).to(weight.dtype)
            self.model(inputs).square().mean().backward()
            change()
            sample = UpdateSample(self.parameters)
            table = torch.full((len(self.parameters), len(DETAIL_COLUMNS)), NAN, dtype=torch.float64)
            there = [i for i, p in enumerate(self.parameters) if p.grad is not None]
            gradients = [self.parameters[i].grad for i in there]
            table[there, : len(STATISTICS)] = stats.measure(gradients, extremes=True, zeros=True)  # type: ignore[arg-type]
            self.optimizer.step()
            table[:, -1] = sample.ratios()[0]
            moments = MomentSample([self.optimizer], self.parameters).norms().tolist()
            detail = array.array("d", table.flatten().tolist()).tobytes()  # as the journal has it
            self.found += self.watch.update(self.step, detail, moments)
        return self.found[before:]


def told(found: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(finding.rule, finding.where) for finding in found]


# --- moments ---------------------------------------------------------------------------------------------------------


def exact(optimizer: Optimizer, parameters: Sequence[Tensor], key: str) -> list[float]:
    return [float(optimizer.state[p][key].double().norm()) if p in optimizer.state else -1.0 for p in parameters]


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda p: Adam(p, 1e-2), "exp_avg", "exp_avg_sq"),
        (lambda p: AdamW(p, 1e-2, amsgrad=True), "exp_avg", "exp_avg_sq"),
        (lambda p: SGD(p, 1e-2, momentum=0.9), "momentum_buffer", None),
        (lambda p: RMSprop(p, 1e-2, momentum=0.5), "momentum_buffer", "square_avg"),
        (lambda p: SGD(p, 1e-2), None, None),
    ],
)
def test_moments_are_those_of_the_optimizer(
    make: Callable[[Any], Optimizer], first: str | None, second: str | None
) -> None:
    model = net()
    trained = Trained(model, make(list(model.parameters())[:3]))  # one parameter in none
    nothing = [[-1.0, -1.0]] * 4
    assert MomentSample([trained.optimizer], trained.parameters).norms().tolist() == nothing, "before the first step"
    trained.steps(3)
    norms_PM = MomentSample([trained.optimizer], trained.parameters).norms()
    for column, key in enumerate((first, second)):
        expected = [-1.0] * 4 if key is None else exact(trained.optimizer, trained.parameters, key)
        assert norms_PM[:, column].tolist() == pytest.approx(expected)
    samples = trained.watch.samples()
    for name, key in (("first_moment_norm", first), ("second_moment_norm", second)):
        if key is None:
            assert name not in samples
        else:
            whole = math.hypot(*[n for n in exact(trained.optimizer, trained.parameters, key) if n >= 0])
            assert samples[name] == pytest.approx(whole)


def test_large_moments_are_sampled() -> None:
    weight = nn.Parameter(torch.zeros(1000, 1000))
    weight.grad = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    optimizer = Adam([weight])
    optimizer.step()
    norms = MomentSample([optimizer], [weight]).norms()[0]
    state = optimizer.state[weight]
    assert float(norms[0]) == pytest.approx(float(state["exp_avg"].norm()), rel=0.02)
    assert float(norms[1]) == pytest.approx(float(state["exp_avg_sq"].norm()), rel=0.05)


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


def test_moments_read_nothing_back_and_change_nothing() -> None:
    model = net()
    trained = Trained(model, Adam(model.parameters()))
    trained.steps(2)
    state = [(value, value.clone(), value._version) for s in trained.optimizer.state.values() for value in s.values()]
    with NoReads():
        MomentSample([trained.optimizer], trained.parameters).norms()
    assert len(state) == 12
    assert all(torch.equal(value, copy) and value._version == version for value, copy, version in state)


def test_several_optimizers() -> None:
    model = net()
    one, two = Adam(model[0].parameters()), SGD(model[2].parameters(), 1e-2, momentum=0.9)
    model(torch.ones(2, 8)).square().mean().backward()
    one.step()
    two.step()
    norms = MomentSample([one, two], list(model.parameters())).norms().tolist()
    assert [min(row) for row in norms] == [norms[0][1], norms[1][1], -1.0, -1.0]
    assert all(max(row) > 0 for row in norms)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_healthy_training_is_left_alone() -> None:
    model = net()
    assert Trained(model, AdamW(model.parameters(), 1e-3)).steps(60) == []


def test_steps_that_are_too_large_and_too_small() -> None:
    model = net()
    trained = Trained(model, SGD(model.parameters(), 0.1))
    assert trained.steps(3) == []
    trained.optimizer.param_groups[0]["lr"] = 100.0
    found = trained.steps(2)
    assert found == [], "not in three measurements"
    trained.optimizer.param_groups[0]["lr"] = 1e3
    assert [f.rule for f in trained.steps(1)] == ["update_large"]
    model = net()
    trained = Trained(model, SGD(model.parameters(), 0.1))
    trained.optimizer.param_groups[0]["lr"] = 1e-8
    model.double()
    trained = Trained(model, SGD(model.parameters(), 1e-8))
    (small,) = trained.steps(10)
    assert small.rule == "update_small"
    assert small.measured is not None and 0 < small.measured < 1e-8


def test_weights_that_do_not_change() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    trained = Trained(model, Adam(groups, lr=1e-3))
    assert trained.steps(2) == []
    found = trained.steps(1)
    assert [f.rule for f in found] == ["weights_unchanged"]
    assert {"0.weight", "0.bias"} == set(found[0].where.split(", "))
    assert trained.steps(10) == [], "told once"
    trained.optimizer.param_groups[0]["lr"] = 1e-2
    assert trained.steps(5) == []
    trained.optimizer.param_groups[0]["lr"] = 0.0
    assert [f.rule for f in trained.steps(3)] == ["weights_unchanged"], "and again after it was over"


def test_updates_that_bfloat16_rounds_away() -> None:
    model = net().bfloat16()
    before = [p.clone() for p in model.parameters()]
    found = Trained(model, SGD(model.parameters(), 1e-5)).steps(3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "weights_unchanged" in [f.rule for f in found]


def test_parameters_without_a_gradient_are_no_matter() -> None:
    model = net()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert Trained(model, Adam(model.parameters(), 1e-3)).steps(6) == []


def test_gradients_that_are_zero_and_that_vanish() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].bias.fill_(-1000.0)  # no unit is ever active
    found = Trained(model, SGD(model.parameters(), 0.1)).steps(6)
    assert [f.rule for f in found] == ["gradients_zero"]
    assert found[0].where == "0.weight, 2.weight"
    model = net()
    model.register_forward_hook(lambda module, args, output: output * 1e-9)
    (tiny,) = Trained(model, Adam(model.parameters(), 1e-3)).steps(6)
    assert (tiny.rule, tiny.threshold) == ("gradients_tiny", 1e-8)
    expected = min(float(p.grad.square().mean().sqrt()) for p in (model[0].weight, model[2].weight))
    assert tiny.measured == pytest.approx(expected, rel=1)
    assert tiny.measured is not None and tiny.measured < 1e-8


def test_bias_before_a_normalisation_is_no_matter() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    trained = Trained(model, SGD(model.parameters(), 0.01))
    assert trained.steps(20) == []
    bias = model[0].bias.grad
    assert bias is not None
    assert bias.abs().max() < 1e-7


def test_matrices_that_begin_at_zero() -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    nn.init.ones_(model[2].bias)
    trained = Trained(model, Adam(model.parameters(), 1e-3))
    assert trained.steps(20) == []


def test_rare_rows_of_an_embedding() -> None:
    """Of a large embedding a step touches some rows, and the sample may hold none of them."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100_000, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.embed(torch.full((4,), 77_776))

    model = Words()
    trained = Trained(model, SGD(model.parameters(), 1.0))
    assert trained.steps(6) == []
    sample = UpdateSample(trained.parameters)
    trained.steps(1)
    assert float(sample.ratios()[1]) == 0, "the sample sees no change"


def test_moments_that_are_not_finite() -> None:
    model = net()
    trained = Trained(model, Adam(model.parameters(), 1e-3))
    trained.steps(2)

    def poison() -> None:
        assert model[2].weight.grad is not None
        model[2].weight.grad[0, 0] = NAN

    found = trained.steps(1, poison)
    assert told(found) == [("moments_nonfinite", "2.weight")]
    assert found[0].severity == "error"
    assert not [f for f in trained.steps(3) if f.rule == "moments_nonfinite"], "told once"
    model = net()
    silent = Trained(model, Adam(model.parameters()), WeightsConfig(moments=False))
    assert not [f for f in silent.steps(2, lambda: model[2].weight.grad.fill_(NAN)) if f.rule == "moments_nonfinite"]


def row(square: float, *, zeros: float = 0, ratio: float = 1e-3) -> list[float]:
    values = dict.fromkeys(DETAIL_COLUMNS, 0.0)
    values |= {"sum_of_squares": square, "abs_max": math.sqrt(square), "zero_count": zeros, "update_ratio": ratio}
    return list(values.values())


def test_many_parameters_are_named_in_short() -> None:
    watch = WeightWatch(WeightsConfig(), [f"layer{n}" for n in range(40)], [(4, 4)] * 40)
    table = [value for n in range(40) for value in row(16.0, ratio=0.5 + n / 100 if n >= 24 else 1e-3)]
    found = [f for step in range(4) for f in watch.update(step, table)]
    assert told(found) == [("update_large", "layer39, layer24, layer25, layer26 and 12 more")]
    assert found[0].measured == pytest.approx(0.89)


def test_looks_without_a_measurement_go_on() -> None:
    """Details come more often than updates; what is not measured neither counts nor ends a run."""
    watch = WeightWatch(WeightsConfig(), ["w"], [(4, 4)])
    steps = [0.0, NAN, NAN, 0.0, NAN, 0.0]
    found = [(n, f.rule) for n, ratio in enumerate(steps) for f in watch.update(n, row(16.0, ratio=ratio))]
    assert found == [(5, "weights_unchanged")]
    assert watch.update(6, row(NAN, ratio=NAN)) == []
    assert watch.update(7, None) == []


def test_parameters_added_later() -> None:
    names, shapes = ["w"], [(4, 4)]
    watch = WeightWatch(WeightsConfig(), names, shapes)
    table = row(16.0) + row(0.0)
    assert [f for step in range(5) for f in watch.update(step, table)] == [], "not known yet"
    names.append("new")
    shapes.append((2, 2))
    assert told(f for step in range(5) for f in watch.update(step, table)) == [("gradients_zero", "new")]


OFF = WeightsConfig(update_large=0, update_small=0, unchanged_looks=0, zero_looks=0, tiny_gradient=0, moments=False)


def test_every_rule_can_be_switched_off() -> None:
    rows = [row(16.0, ratio=0.9), row(16.0, ratio=1e-12), row(16.0, ratio=0), row(0.0), row(1e-20)]
    table = [value for values in rows for value in values]

    def rules(config: WeightsConfig) -> set[str]:
        watch = WeightWatch(config, list("abcde"), [(4, 4)] * 5)
        return {f.rule for step in range(5) for f in watch.update(step, table, [[NAN, 1.0]] * 5)}

    assert rules(WeightsConfig()) == set(RULES), "all is wrong with them"
    assert rules(OFF) == set()
    Config(weights=OFF)  # in range
