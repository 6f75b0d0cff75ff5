"""`gradmon doctor`: its arguments, what it audits, and how the findings are written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradmon.diagnose.usage import MODULE_FACTORY
from gradmon.record import Finding

if TYPE_CHECKING:
    from gradmon.diagnose.doctor.audit import Diagnosis

_MARKS = {"error": "ERROR", "warning": "WARN", "info": "info"}
_WIDTH = 118
_CONVENTIONS = """\
--data          a DataLoader of the script's, a function that makes one, or a batch: (inputs, targets).
--loss          called as loss(model, batch); a criterion, its class (`torch.nn:CrossEntropyLoss`), or a function that
                fails before it has called the model, as loss(model(inputs), *targets) for a batch (inputs, targets).

example:
  gradmon doctor train:make_model --data train:make_loader --loss torch.nn:CrossEntropyLoss
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{MODULE_FACTORY}\n{_CONVENTIONS}"
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="returns the model, or (model, batch, loss_fn[, optimizer]); see below",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:LOADER",
        help="a batch, an iterable of batches, or a function that returns one of them",
    )
    parser.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss of (model, batch), or a criterion, see below (default: by the target's type)",
    )
    parser.add_argument("--optimizer", metavar="MODULE:FUNCTION", help="takes the model, returns its optimizer")
    parser.add_argument("--lr-range", action="store_true", help="also search a learning rate, in a few dozen steps")
    parser.add_argument(
        "--loss-scale", type=float, default=1.0, metavar="FACTOR", help="GradScaler's, if one is used (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Audit and print; returns 0 if nothing worse than an info was found, else 1.

    Raises:
        ValueError: what was named can't be used, or the model does not run on the batch.
    """
    from gradmon.diagnose.doctor.audit import diagnose

    model, batch, loss_fn, optimizer = _subject(args)
    diagnosis = diagnose(model, batch, loss_fn, optimizer=optimizer, loss_scale=args.loss_scale, lr_test=args.lr_range)
    print(as_json(diagnosis) if args.json else as_text(diagnosis), file=sys.stdout)
    return 0 if diagnosis.ok else 1


def _subject(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Model, batch, loss function and optimizer, from what the arguments name."""
    from torch import nn
    from torch.optim import Optimizer

    from gradmon.diagnose import factory

    named = factory.named(args.factory, "factory")
    made = named if isinstance(named, nn.Module) else factory.made(args.factory, "factory")
    parts = list(made) if isinstance(made, tuple) else [made]
    if not 1 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        raise factory.FactoryError(
            f"factory {args.factory} must return a torch.nn.Module or (model, batch, loss_fn[, optimizer])"
            f" (got {_kinds(parts)})"
        )
    model, batch, loss_fn, optimizer = parts + [None] * (4 - len(parts))
    if args.data:
        batch = _first_batch(args.data)
    if batch is None:
        raise factory.FactoryError(
            f"factory {args.factory} returns no batch; name one with --data module:loader, or return"
            " (model, batch, loss_fn)"
        )
    if args.loss:
        loss_fn = factory.loss(args.loss)
    if args.optimizer:
        optimizer = factory.function(args.optimizer, "--optimizer")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        optimizer = _optimizer(optimizer, model, args.optimizer or args.factory)
    return model, batch, loss_fn, optimizer


def _optimizer(make: Any, model: Any, spec: str) -> Any:
    """What a function of the model, or of its parameters, returns."""
    from torch.optim import Optimizer

    from gradmon.diagnose.factory import FactoryError

    try:
        optimizer = make(model.parameters()) if isinstance(make, type) else make(model)
    except Exception as error:  # the user's function: whatever it raises is told as it is
        raise FactoryError(
            f"--optimizer {spec} failed with {type(error).__name__}: {error}; it must take the model alone,"
            " such as `def make_optimizer(model): return AdamW(model.parameters(), lr=3e-4)`"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise FactoryError(f"--optimizer {spec} must return a torch.optim.Optimizer (got a {type(optimizer).__name__})")
    return optimizer


def _first_batch(spec: str) -> Any:
    """A batch as it is (a tensor, tuple or dict); of anything else that can be iterated, the first."""
    from torch import Tensor

    from gradmon.diagnose import factory

    data = factory.named(spec, "--data")
    if callable(data):
        data = factory.made(spec, "--data")
    if isinstance(data, Tensor | tuple | dict):
        return data
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        return data
    if not isinstance(data, Iterable):
        raise factory.FactoryError(
            f"--data {spec} must give a batch or an iterable of batches (got a {type(data).__name__})"
        )
    batch = next(iter(data), None)
    if batch is None:
        raise factory.FactoryError(f"--data {spec} has no batch; give it some data")
    return batch


def _kinds(parts: list[Any]) -> str:
    return ", ".join(type(part).__name__ for part in parts) or "an empty tuple"


def as_json(diagnosis: Diagnosis) -> str:
    """One object, its findings as in `gradmon.record.Finding`; numbers that JSON lacks are null."""
    findings = [{key: _plain(value) for key, value in dataclasses.asdict(f).items()} for f in diagnosis.findings]
    told = {
        "ok": diagnosis.ok,
        "parameters": diagnosis.parameters,
        "loss": _plain(diagnosis.loss),
        "findings": findings,
    }
    return json.dumps(told, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(diagnosis: Diagnosis) -> str:
    """Worst first; of each finding: where, what, the cure, the source."""
    counts = [f"{n} {kind}{'s' if n > 1 else ''}" for kind in _MARKS if (n := _count(diagnosis, kind))]
    loss = "no loss" if diagnosis.loss is None else f"first loss {diagnosis.loss:.4g}"
    head = f"gradmon doctor: {', '.join(counts) or 'nothing found'} ({diagnosis.parameters:,} parameters, {loss})"
    return "\n\n".join([head, *map(_finding_text, diagnosis.findings)])


def _count(diagnosis: Diagnosis, kind: str) -> int:
    return sum(finding.severity == kind for finding in diagnosis.findings)


def _finding_text(finding: Finding) -> str:
    lines = [f"{_MARKS[finding.severity]:<5}  {finding.rule}  {finding.where}"]
    for label, text in (("", finding.message), ("cure", finding.cure), ("source", finding.source)):
        if text:
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=f"       {label:<7}" if label else "       ",
                subsequent_indent=" " * 14 if label else " " * 7,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
