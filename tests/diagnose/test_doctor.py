"""The audit before the run: names what is wrong, stays quiet on what is right, and leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_doctor
from healthy import HEALTHY, classify, mlp, next_token, text_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import Broken, Healthy
from zoo_doctor import BROKEN, perceptron, rows

from gradmon.diagnose.doctor import Diagnosis, diagnose
from gradmon.diagnose.doctor.optimization import range_test, try_steps
from gradmon.diagnose.doctor.probe import as_loss_function, probe
from gradmon.record import Finding


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """One thread: these models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def rules(diagnosis: Diagnosis) -> set[str]:
    return {finding.rule for finding in diagnosis}


def named(diagnosis: Diagnosis, rule: str) -> Finding:
    return next(finding for finding in diagnosis if finding.rule == rule)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_names_what_is_broken(broken: Broken, tmp_path: Path) -> None:
    told = broken.find(tmp_path)
    assert [name for name in broken.names if name not in told] == []


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda healthy: healthy.name)
def test_is_quiet_on_healthy_models(healthy: Healthy) -> None:
    diagnosis = diagnose(*healthy.make())
    assert diagnosis.ok, str(diagnosis)
    assert not diagnosis
    assert len(diagnosis) <= 2


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda healthy: healthy.name)
def test_is_quiet_on_usual_optimizers(healthy: Healthy) -> None:
    model, batch, loss_fn = healthy.make()
    diagnosis = diagnose(model, batch, loss_fn, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert diagnosis.ok, str(diagnosis)
    assert len(diagnosis) <= 2


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda healthy: healthy.name)
def test_healthy_models_learn(healthy: Healthy) -> None:
    """What is called healthy is: the loss falls in 15 steps; the GAN's two losses pull against each other."""
    model, batch, loss_fn = healthy.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < (1.0 if healthy.name == "GAN" else 0.95) * losses[0]


def _cured_init(model: nn.Module) -> None:
    nn.init.kaiming_normal_(model.get_parameter("2.weight"), nonlinearity="relu")


def _cured_biases(model: nn.Module) -> None:
    nn.init.zeros_(model.get_parameter("2.bias"))


def _cured_decoder(model: nn.Module) -> None:
    for up in model.ups:
        nn.init.kaiming_normal_(up.weight)


def _cured_embedding(model: nn.Module) -> None:
    nn.init.normal_(model.get_parameter("embed.weight"), std=0.02)


def _cured_branches(model: nn.Module) -> None:
    for block in model.blocks:
        nn.init.zeros_(block[2].weight)
        nn.init.zeros_(block[2].bias)


def _cured_in_place(model: nn.Module) -> None:
    model[2].act.inplace = False


@pytest.mark.parametrize(
    ("make", "cure", "rule"),
    [
        (zoo_doctor.bad_init, _cured_init, "bad_init"),
        (zoo_doctor.tiny_init, _cured_init, "bad_init"),
        (zoo_doctor.dead_relu, _cured_biases, "dead_relu"),
        (zoo_doctor.upsampling_growth, _cured_decoder, "upsampling_growth"),
        (zoo_doctor.tied_head, _cured_embedding, "loss_at_start"),
        (zoo_doctor.residual_growth, _cured_branches, "residual_growth"),
        (zoo_doctor.overwritten, _cured_in_place, "inplace_reuse"),
    ],
)
def test_the_cure_it_names_cures(
    make: Callable[[], tuple[Any, Any, Any]], cure: Callable[[nn.Module], None], rule: str
) -> None:
    model, batch, loss_fn = make()
    assert rule in rules(diagnose(model, batch, loss_fn))
    cure(model)
    after = diagnose(model, batch, loss_fn)
    assert after.ok, str(after)


class Output(dict):  # type: ignore[type-arg]
    """As Hugging Face's models return."""


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(32, 64, 10)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        logits = self.net(input_ids)
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


def test_the_loss_is_taken_from_what_is_there() -> None:
    inputs, labels = rows()
    model = perceptron(32, 64, 10)
    expected = float(F.cross_entropy(model(inputs), labels).detach())
    for loss_fn in (None, nn.CrossEntropyLoss(), F.cross_entropy, classify):
        assert diagnose(model, (inputs, labels), loss_fn).loss == pytest.approx(expected)
    values = torch.randn(128, 10)
    squared = float(F.mse_loss(model(inputs), values).detach())
    assert diagnose(model, (inputs, values)).loss == pytest.approx(squared)
    own = diagnose(WithLoss(), {"input_ids": inputs, "labels": labels})
    assert own.ok
    assert own.loss == pytest.approx(math.log(10), rel=0.1)
    tokens, targets, alphabet = text_batch(4, 16)
    reader = nn.Sequential(nn.Embedding(alphabet, 16), nn.Linear(16, alphabet))
    by_hand = float(next_token(reader, (tokens, targets)).detach())
    assert diagnose(reader, (tokens, targets)).loss == pytest.approx(by_hand)


def test_wrapped_models_are_unwrapped() -> None:
    model = perceptron(32, 64, 64, 10)
    nn.init.normal_(model[2].weight, std=3.0)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert named(diagnose(wrapped, rows(), classify), "bad_init").where == "2.weight"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((perceptron, rows(), classify), "model must be a torch.nn.Module"),
        ((nn.ReLU(), rows(), classify), "no parameters that are trained"),
        ((perceptron(32, 8, 4), rows(), 3), "loss_fn must be a function"),
        ((perceptron(31, 8, 4), rows(), classify), "does not run on this batch.*shapes"),
        ((perceptron(32, 8, 4), rows(), lambda m, b: m(b[0])), r"must be one number.*\[?128, 4"),
        ((perceptron(32, 8, 4), rows(), lambda m, b: m(b[0]).sum().item()), "must be one number.*a float"),
        ((perceptron(32, 8, 4), rows()[0], nn.CrossEntropyLoss()), "a criterion needs a batch of"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(*args)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = perceptron(32, 8, 4), perceptron(32, 8, 4)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        diagnose(model, rows(classes=4), classify, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))


def test_an_optimizer_that_needs_a_closure_is_not_tried() -> None:
    model, batch, loss_fn = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    assert diagnose(model, batch, loss_fn, optimizer=optimizer, lr_test=True).ok


def test_code_under_vmap_and_checkpoint_is_audited_as_far_as_it_shows() -> None:
    model, (inputs, labels) = perceptron(32, 64, 10), rows()
    nn.init.normal_(model[2].weight, std=3.0)

    def mapped(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.vmap(lambda x, y: F.cross_entropy(model(x), y))(*batch).mean()

    def recomputed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(checkpoint(model, batch[0], use_reentrant=False), batch[1])

    for loss_fn in (mapped, recomputed):
        assert named(diagnose(model, (inputs, labels), loss_fn), "bad_init").where == "2.weight"


def test_a_loss_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="loss_scale must be above 0"):
        diagnose(perceptron(32, 8, 4), rows(classes=4), loss_scale=0)


def test_measures_what_plain_torch_does() -> None:
    model, batch, loss_fn = mlp()
    evidence = probe(model, batch, loss_fn)
    loss = loss_fn(model, batch)
    loss.backward()
    assert evidence.loss == pytest.approx(float(loss.detach()))
    for weight, (name, parameter) in zip(evidence.weights, model.named_parameters(), strict=True):
        assert weight.name == name
        assert weight.gradient is not None
        assert parameter.grad is not None
        assert weight.scale.std == pytest.approx(float(parameter.detach().std(correction=0)), rel=1e-4)
        assert weight.gradient.rms == pytest.approx(float(parameter.grad.square().mean().sqrt()), rel=1e-4)
        assert weight.uses == weight.accumulations == 1
    rectifier = next(operation for operation in evidence.operations if operation.layer == "1")
    out = model[1](model[0](batch[0])).detach()
    assert rectifier.units is not None
    assert rectifier.scale is not None
    assert rectifier.units.positive_share == pytest.approx(float((out > 0).float().mean()))
    assert rectifier.units.dead_share == pytest.approx(float(((out > 0).float().mean(0) < 0.01).float().mean()))
    assert rectifier.scale.rms == pytest.approx(float(out.square().mean().sqrt()), rel=1e-4)


def test_operations_carry_the_users_line_and_layer() -> None:
    model, batch, loss_fn = zoo_doctor.concat_growth()
    operations = probe(model, batch, loss_fn).operations
    cats = [operation for operation in operations if operation.name == "cat"]
    source = Path(zoo_doctor.__file__).read_text().splitlines()
    assert len(cats) == 4
    for cat in cats:
        name, line = cat.line.split(":")
        assert name == "zoo_doctor.py"
        assert "torch.cat([x, layer(x)], dim=1)" in source[int(line) - 1]
    assert [o.layer for o in operations if o.name == "linear"] == [*(f"layers.{i}" for i in range(4)), "head"]


def test_counts_the_uses_of_a_shared_weight() -> None:
    model, batch, loss_fn = zoo_doctor.reused_layer()
    uses = {weight.name: weight.uses for weight in probe(model, batch, loss_fn).weights}
    assert uses["cell.weight"] == 24
    assert uses["enter.weight"] == uses["head.weight"] == 1
    tied = named(diagnose(*HEALTHY[4].make()), "shared_weight")
    assert tied.severity == "info"
    assert "embed.weight = head.weight is used 2 times" in tied.message
    assert "accumulated 1 time " in tied.message


def test_the_update_ratio_is_that_of_a_plain_step() -> None:
    model, batch, loss_fn = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trial = try_steps(model, batch, loss_fn, optimizer)
    assert trial is not None
    loss_fn(model, batch).backward()
    weights = [p for p in model.parameters() if p.dim() > 1]
    moved = math.sqrt(sum(float((0.1 * p.grad).square().sum()) for p in weights))
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in weights))
    assert trial.update_ratio == pytest.approx(moved / size, rel=1e-3)
    assert trial.losses[-1] < trial.losses[0]
    assert not optimizer.state


def test_a_warm_up_is_judged_by_the_rate_it_leads_to() -> None:
    model, batch, loss_fn = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    assert optimizer.param_groups[0]["lr"] == 0
    assert "learning_rate_low" not in rules(diagnose(model, batch, loss_fn, optimizer=optimizer))
    flat = torch.optim.AdamW(model.parameters(), lr=0.0)
    assert "learning_rate_low" in rules(diagnose(model, batch, loss_fn, optimizer=flat))


def test_the_range_test_suggests_a_rate_that_trains() -> None:
    model, batch, loss_fn = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    seen = range_test(model, batch, loss_fn, optimizer)
    assert all(b[0] > a[0] for a, b in pairwise(seen))
    finding = named(diagnose(model, batch, loss_fn, optimizer=optimizer, lr_test=True), "lr_range")
    suggested = float(finding.cure.split("lr=")[1].split(")")[0])
    assert 1e-3 < suggested < 1
    trained = torch.optim.SGD(model.parameters(), lr=suggested)
    first = float(loss_fn(model, batch).detach())
    for _ in range(40):
        trained.zero_grad()
        loss_fn(model, batch).backward()
        trained.step()
    assert float(loss_fn(model, batch).detach()) < 0.98 * first


def test_the_range_test_warns_of_a_rate_past_its_end() -> None:
    model, batch, loss_fn = HEALTHY[6].make()  # the ViT, under Adam, diverges early
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    seen = range_test(model, batch, loss_fn, optimizer)
    assert seen[-1][0] < 0.5  # it ended before it came so far
    from gradmon.diagnose.doctor.optimization import check_range

    (finding,) = check_range(seen, optimizer)
    assert finding.severity == "warning"
    assert "diverges" in finding.message


def test_fp16_with_a_scaler_is_quiet() -> None:
    model, batch, loss_fn = zoo_doctor.half_unscaled()
    assert named(diagnose(model, batch, loss_fn), "fp16_without_scaler").severity == "warning"
    assert "fp16_without_scaler" not in rules(diagnose(model, batch, loss_fn, loss_scale=65536.0))


def test_gradients_are_told_unscaled() -> None:
    model, batch, loss_fn = mlp()
    plain, scaled = probe(model, batch, loss_fn), probe(model, batch, loss_fn, loss_scale=1024.0)
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        assert one.gradient is not None
        assert other.gradient is not None
        assert other.gradient.rms == pytest.approx(one.gradient.rms, rel=1e-4)


def test_a_step_lost_to_bfloat16_is_told() -> None:
    model = perceptron(32, 64, 64, 10).bfloat16()
    inputs, labels = rows()
    batch = (inputs.bfloat16(), labels)
    small = torch.optim.SGD(model.parameters(), lr=1e-3)
    lost = named(diagnose(model, batch, classify, optimizer=small), "lost_updates")
    assert lost.measured is not None
    assert lost.measured > 0.9
    large = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert "lost_updates" not in rules(diagnose(model, batch, classify, optimizer=large))


def test_decay_on_norms_is_told_once_it_matters() -> None:
    model, batch, loss_fn = HEALTHY[6].make()
    everything = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    told = named(diagnose(model, batch, loss_fn, optimizer=everything), "decay_on_norms")
    assert told.severity == "info"
    split = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    assert "decay_on_norms" not in rules(diagnose(model, batch, loss_fn, optimizer=split))


class Side(nn.Module):
    """A head that no loss looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused = nn.Linear(32, 10), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_parameters_without_a_gradient_are_named() -> None:
    model = Side()
    assert named(diagnose(model, rows(), classify), "no_gradient").where == "unused.weight"
    model.unused.requires_grad_(False)
    assert diagnose(model, rows(), classify).ok


def test_a_tensor_changed_before_its_backward_is_told() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = torch.sigmoid(model[0](batch[0]))
        kept = hidden * 2
        hidden.relu_()
        return F.cross_entropy(model[2](hidden + kept), batch[1])

    model, batch = perceptron(32, 64, 10), rows()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(model, batch).backward()
    told = named(diagnose(model, batch, loss), "inplace_reuse")
    assert told.severity == "error"
    assert "relu_" in told.message or "relu" in told.where


def test_nonfinite_inputs_are_told_before_what_they_break() -> None:
    inputs, labels = rows()
    inputs[3, 4] = math.nan
    told = diagnose(perceptron(32, 64, 10), (inputs, labels), classify)
    assert "1 NaN or infinite elements" in named(told, "nonfinite_input").message
    assert "nonfinite_forward" not in rules(told)
    assert named(told, "nonfinite_loss").severity == "error"


def test_a_broken_backward_is_told() -> None:
    """sqrt at 0: the forward is finite, its gradient is 0 times infinity."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + (logits - logits).square().sum(1).sqrt().mean()

    told = diagnose(perceptron(32, 64, 10), rows(), loss)
    assert named(told, "nonfinite_gradient").where == "2.bias"
    assert "nonfinite_loss" not in rules(told)


def test_binary_targets_out_of_range() -> None:
    inputs, labels = rows(classes=3)
    told = diagnose(
        perceptron(32, 64, 1),
        (inputs, labels.float()[:, None]),
        lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0]), batch[1]),
    )
    assert "outside 0 to 1" in named(told, "bad_labels").message


def test_tokens_may_be_as_rare_as_they_like() -> None:
    tokens, targets, alphabet = text_batch(8, 128)
    counts = torch.bincount(targets.flatten(), minlength=alphabet)
    assert counts.max() > 10 * counts.min()  # as samples they would be called imbalanced
    model = nn.Sequential(nn.Embedding(alphabet, 16), nn.Linear(16, alphabet))
    assert diagnose(model, (tokens, targets), next_token).ok


def test_labels_that_are_all_ignored() -> None:
    inputs, labels = rows()
    told = diagnose(perceptron(32, 64, 10), (inputs, torch.full_like(labels, -100)), classify)
    assert "all labels are ignored" in named(told, "bad_labels").message


def test_leaked_labels_are_a_hint() -> None:
    inputs, labels = rows()
    leaked = torch.cat([inputs[:, :22], 10 * F.one_hot(labels, 10).float()], dim=1)
    model = nn.Linear(32, 10)
    with torch.no_grad():
        model.weight[:, 22:] += torch.eye(10)
    assert named(diagnose(model, (leaked, labels), classify), "loss_at_start").severity == "info"


def test_gates_and_last_sigmoids_may_saturate() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.value(x) * torch.sigmoid(50 * self.gate(x)))

    operations = probe(Gated(), rows(), classify).operations
    gate = next(operation for operation in operations if operation.name == "sigmoid")
    assert gate.units is not None
    assert gate.units.saturated_share > 0.5
    assert "saturated_activation" not in rules(diagnose(Gated(), rows(), classify))
    last = nn.Sequential(perceptron(32, 64, 4), nn.Sigmoid())
    nn.init.normal_(last[0][2].weight, std=3)
    inputs = rows()[0]
    assert "saturated_activation" not in rules(diagnose(last, (inputs, torch.rand(128, 4)), nn.MSELoss()))


def test_small_starts_are_right_in_residual_branches_and_heads() -> None:
    """Zero-initialised branches and heads (Fixup, LoRA, diffusion models) are no bad initialisation."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = (
                nn.Linear(32, 32),
                nn.Linear(32, 4, bias=False),
                nn.Linear(4, 32, bias=False),
            )
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model = nn.Sequential(Branch(), nn.ReLU(), Branch(), nn.ReLU(), nn.Linear(32, 10))
    nn.init.zeros_(model[4].weight)
    assert diagnose(model, rows(), classify).ok
    plain = perceptron(32, 64, 64, 10)
    nn.init.zeros_(plain[2].weight)
    assert "can never differ" in named(diagnose(plain, rows(), classify), "bad_init").message


def test_depth_counts_what_nothing_interrupts() -> None:
    deep = [layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.ReLU())]
    for layer in deep[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    plain = nn.Sequential(*deep, nn.Linear(32, 10))
    assert named(diagnose(plain, rows(), classify), "deep_plain_chain").measured == 13
    normed = nn.Sequential(*deep[:12], nn.LayerNorm(32), *deep[12:], nn.Linear(32, 10))
    assert "deep_plain_chain" not in rules(diagnose(normed, rows(), classify))


def test_worst_comes_first_and_all_of_it_is_printed() -> None:
    model, batch, loss_fn = zoo_doctor.saturated_sigmoid()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    diagnosis = diagnose(model, (batch[0], batch[1] + 50), loss_fn, optimizer=optimizer)
    order = [finding.severity for finding in diagnosis]
    assert order == sorted(order, key=["error", "warning", "info"].index)
    assert set(order) == {"error", "warning", "info"}
    told = str(diagnosis)
    assert all(f"{finding.rule}  {finding.where}" in told for finding in diagnosis)
    assert max(map(len, told.splitlines())) <= 120
    assert diagnosis.loss is None  # the labels ended the forward
    assert all(f.cure and f.source and f.message for f in diagnosis)


def test_a_fault_in_every_layer_is_told_a_few_times() -> None:
    model = perceptron(32, *[64] * 8, 10)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=3.0)
    told = [finding for finding in diagnose(model, rows(), classify) if finding.rule == "bad_init"]
    assert len(told) == 4
    assert told[-1].message.endswith("and so in 5 more places")


def test_a_custom_norm_counts_as_one() -> None:
    class Rms(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    operations = probe(nn.Sequential(nn.Linear(32, 32), Rms(), nn.Linear(32, 10)), rows(), classify).operations
    assert [o.kind for o in operations if o.name == "mul"] == ["norm"]


def test_a_criterion_is_recognised() -> None:
    assert as_loss_function(classify) is classify
    assert as_loss_function(nn.MSELoss()) is not nn.MSELoss
