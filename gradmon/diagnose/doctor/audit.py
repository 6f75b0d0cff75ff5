"""One audit: run the model once, let every check look at what was seen, put the worst first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradmon.diagnose.doctor.activations import check_activations
from gradmon.diagnose.doctor.flow import Flow
from gradmon.diagnose.doctor.labels import check_labels
from gradmon.diagnose.doctor.optimization import check_optimizer, check_range, range_test
from gradmon.diagnose.doctor.probe import (
    Evidence,
    LossFunction,
    ModelError,
    as_loss_function,
    of_output,
    probe,
    runs,
)
from gradmon.diagnose.doctor.weights import check_weights
from gradmon.record import Finding

__all__ = ["Diagnosis", "ModelError", "diagnose", "doctor"]

_ORDER = {"error": 0, "warning": 1, "info": 2}
#: Findings of one rule that are told; the last says how many more there are.
MOST_OF_A_RULE = 4


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found, worst first. True in a condition if there is a warning or an error."""

    findings: tuple[Finding, ...]
    parameters: int
    """Elements of all parameters."""
    loss: float | None
    """Of the first forward; None if it ended early."""

    @property
    def ok(self) -> bool:
        """True if nothing worse than an info was found."""
        return all(finding.severity == "info" for finding in self.findings)

    def __bool__(self) -> bool:
        return not self.ok

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        from gradmon.diagnose.doctor.command import as_text

        return as_text(self)


def doctor(
    model: nn.Module,
    batch: Any,
    loss_fn: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: float = 1.0,
    lr_test: bool = False,
) -> Diagnosis:
    """Run the model forward and backward once and say what is wrong with it; leaves everything as it was, to the bit.

    Args:
        model: on any device, before it is sharded; what DDP or torch.compile wraps is unwrapped.
        batch: as the loop gets it.
        loss_fn: a function of (model, batch) that returns the loss; or a criterion or a function of (output, target),
            fed model(inputs) and the target of a batch (inputs, target). A function that fails before it has called
            the model is taken as one of (output, target). Without one: the model's own loss, cross entropy for whole
            numbers as target, mean squared error for others.
        optimizer: audited too, by trial steps of a copy of it; that keeps one copy of the weights and of its state.
        loss_scale: factor that a GradScaler multiplies the loss by.
        lr_test: a learning-rate range test with the optimizer; SGD if there is none.

    Raises:
        ModelError: (a ValueError) the model does not run on the batch, or gives no loss.
        ValueError: the model has no parameters to train or is sharded, the optimizer is another model's, or an argument
            is out of range.
    """
    model = _unwrapped(model)
    if not loss_scale > 0:
        raise ValueError(
            f"loss_scale must be above 0 (got {loss_scale}); it is GradScaler's factor, 65536 at its start"
        )
    if optimizer is not None:
        _check_same(model, optimizer)
    function, evidence = _probed(model, batch, loss_fn, loss_scale)
    flow = Flow(evidence.operations)
    findings = [*check_labels(evidence), *check_weights(evidence, flow), *check_activations(evidence, flow)]
    if optimizer is not None:
        findings += check_optimizer(model, batch, function, optimizer, evidence)
    closure = isinstance(optimizer, torch.optim.LBFGS)  # its step runs the model itself, at rates of its own
    if lr_test and not closure and not any(finding.severity == "error" for finding in findings):
        tested = optimizer if optimizer is not None else torch.optim.SGD(model.parameters(), lr=1e-3)
        findings += check_range(range_test(model, batch, function, tested), tested)
    return Diagnosis(_fewer(findings), sum(p.numel() for p in model.parameters()), evidence.loss)


#: What the commands call it.
diagnose = doctor


def _probed(model: nn.Module, batch: Any, loss_fn: Any, loss_scale: float) -> tuple[LossFunction, Evidence]:
    """The loss function as it can be called, and what it showed; both tries begin from the same state."""
    function = as_loss_function(loss_fn)
    with runs(model) as ran:
        try:
            return function, probe(model, batch, function, loss_scale=loss_scale)
        except ModelError as error:
            if ran or function is not loss_fn:
                raise
            first = error
    other = of_output(function)
    try:
        return other, probe(model, batch, other, loss_scale=loss_scale)
    except ModelError:
        cause = first.__cause__ or first
        said = (str(cause).splitlines() or [""])[0]
        raise ModelError(
            "your loss_fn is called as loss_fn(model, batch); wrap it:"
            " `lambda model, batch: my_loss(model(batch[0]), batch[1])`, if it is one of (output, target); it failed"
            f" before it had called the model, with {type(cause).__name__}: {said}"
        ) from first


def _fewer(findings: list[Finding]) -> tuple[Finding, ...]:
    """A few of each rule: a fault that is in every layer fills no pages."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    for same in by_rule.values():
        if len(same) > MOST_OF_A_RULE:
            last = same[MOST_OF_A_RULE - 1]
            more = f"{last.message}; and so in {len(same) - MOST_OF_A_RULE} more places"
            same[MOST_OF_A_RULE - 1 :] = [dataclasses.replace(last, message=more)]
    kept = [finding for same in by_rule.values() for finding in same]
    return tuple(sorted(kept, key=lambda finding: _ORDER[finding.severity]))


def _check_same(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds none of the model's parameters; make it of model.parameters()")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without DDP's and torch.compile's wrappers."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module (got a {type(model).__name__})")  # noqa: TRY004  the user's mistake
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return _unwrapped(compiled)
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise ValueError("the model is sharded already; let the doctor see it before fully_shard()")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameters that are trained; give the doctor the one the optimizer trains")
    return model
