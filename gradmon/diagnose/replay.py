"""`gradmon replay BUNDLE --model module:factory`: run an incident's batch again, and find what broke first."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmon.diagnose import factory
from gradmon.diagnose.blame import ELEMENTWISE, Blame, blame_bad, blame_jump, growths, norm_of
from gradmon.diagnose.bundle import (
    Bundle,
    Fields,
    Forward,
    given_inputs,
    inputs_of,
    load_bundle,
    rest_of,
    samples_named,
    tensors_in,
)
from gradmon.diagnose.loss import CONVENTION, ReplayError, inputs_told, loss_of, where_the_loss_is
from gradmon.diagnose.operations import Contents, Given, Operation, OperationWatch, Seen, contents, is_users
from gradmon.diagnose.usage import MODULE_FACTORY
from gradmon.diagnose.weights import load_weights, plain_name, put_weights

#: Says nothing of a spike if the weights are not the step's.
_OF_WEIGHTS = frozenset({"growth", "large_throughout"})
Verdict = Literal["reproduced", "not reproduced", "unclear"]
#: A spike is reproduced if the replay's norm reaches this share of the one recorded.
_SAME = 0.5
#: No sound parameter holds a larger value.
_BLOWN_UP = 1e5


@dataclass(slots=True)
class Replay:
    """What running the batch again has shown."""

    bundle: Bundle
    verdict: Verdict
    why: str
    """What the verdict rests on, one sentence."""
    blame: Blame | None
    growths: list[Operation]
    """Operations whose output is largest against their input, the largest first."""
    loss: float
    """Of the replay; of the sum of the outputs where there was no loss."""
    norm: float
    """2-norm of this batch's gradients."""
    micro_step: int
    notes: list[str]
    """What limits the answer, as sentences."""
    root: Tensor
    """The loss, with its autograd graph."""
    model: nn.Module

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: plain values; what is not finite becomes a text."""
        record = self.bundle.record
        blame = None
        if self.blame is not None:
            blame = {**dataclasses.asdict(self.blame.finding), "then": self.blame.steps, "end": self.blame.end}
        answer = {
            "run": self.bundle.identity.run,
            "rank": self.bundle.identity.rank,
            "step": record.step,
            "reason": record.reason,
            "parameter": record.parameter,
            "micro_step": self.micro_step,
            "verdict": self.verdict,
            "why": self.why,
            "first": blame,
            "loss": self.loss,
            "grad_norm": self.norm,
            "growths": [_row(o) for o in self.growths],
            "notes": self.notes,
        }
        finite: dict[str, Any] = _jsonable(answer)
        return finite

    def text(self) -> str:
        """For a person."""
        record, identity = self.bundle.record, self.bundle.identity
        named = f", {record.parameter}" if record.parameter else ""
        lines = [
            f"run {identity.run}, rank {identity.rank}, step {record.step}, micro-step {self.micro_step}:"
            f" {record.reason}{named}",
            f"{self.verdict}: {self.why}",
        ]
        if self.blame is not None:
            finding = self.blame.finding
            lines += ["", f"first: {finding.message}"]
            lines += [f"  at   {finding.where}"] if finding.where and finding.where not in finding.message else []
            lines += [f"  then {step}" for step in self.blame.steps]
            lines += [f"  cure {finding.cure}"] if finding.cure else []
        if self.growths:
            lines += ["", "largest growths (largest absolute value of the output over that of the inputs)"]
            lines += _table([_row(o) for o in self.growths])
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


@dataclass(slots=True)
class _Run:
    forward: Forward
    watch: OperationWatch
    inputs: list[tuple[Given, Tensor]]
    root: Tensor
    ends: list[tuple[str, Seen]]
    norm: float
    has_loss: bool
    """False where the sum of the outputs stands for it."""
    operations: list[Operation]
    """Of the training: without a real loss, those of the forward alone."""


def replay(
    bundle: Bundle,
    model: nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
    command: str = "gradmon replay BUNDLE --model MODULE:FACTORY",
) -> Replay:
    """Run the bundle's batch again, forward and backward, and find the operation that broke first.

    Args:
        bundle: as `load_bundle` reads it.
        model: of the kind that was trained; its weights are replaced, and it is moved to `device`.
        loss_fn: where the model's output is not the loss itself and has no `.loss`: `loss_fn(output, *rest)` with what
            the DataLoader gave and forward did not get, see `rest_of`; `loss_fn(output, *args, **kwargs)` where that is
            nothing.
        weights: a state dict, if the bundle holds none.
        device: where to run it; None: on the kind of device it was trained on, if there is one here.
        command: what the answer tells to run again with `--loss`, if that is missing.

    Raises:
        ReplayError: there is no batch in the bundle, or model, batch, weights and loss do not fit together.
    """
    if not bundle.forwards:
        raise ReplayError(f"the bundle holds no batch: {'; '.join(bundle.notes) or 'none was captured'}")
    notes = list(bundle.notes)
    where = _device(device, bundle.forwards[0], notes)
    model = model.to(where)
    weights_known = _put_weights(model, bundle, weights, notes)
    runs: list[_Run] = []
    for forward in bundle.forwards:
        runs.append(_run(bundle, forward, model, loss_fn, where, notes))
        if blame_bad(runs[-1].ends) is not None:
            break
    broken = blame_bad(runs[-1].ends) is not None
    run = runs[-1] if broken else max(runs, key=lambda r: r.norm)
    if not run.has_loss:
        notes.append(
            "the loss was computed outside of the model and is not in the bundle: the sum of the outputs stands for it;"
            " give --loss module:function"
        )
    notes += _far_too_large(model)
    answer = _answer(bundle, run, model, list(dict.fromkeys(notes)), weights_known=weights_known)
    if answer.verdict == "unclear" and not run.has_loss:
        answer.why += f"; {where_the_loss_is(run.forward, command, bundle.notes)}"
    return answer


def _answer(bundle: Bundle, run: _Run, model: nn.Module, notes: list[str], *, weights_known: bool) -> Replay:
    gradients = [(name, seen) for name, seen in run.ends if not name.startswith("the ")]
    blame = blame_bad(run.ends)
    if blame is not None and blame.culprit is not None:
        message = blame.finding.message + _of_samples(blame.culprit, run.forward)
        blame = dataclasses.replace(blame, finding=dataclasses.replace(blame.finding, message=message))
    verdict, why = _verdict(bundle, run, blame, weights_known=weights_known)
    if blame is None and bundle.record.reason == "spike" and verdict == "reproduced":
        blame = blame_jump(run.operations, gradients, bundle.record.parameter, run.inputs)
        if not weights_known and (blame is None or blame.finding.rule in _OF_WEIGHTS):
            blame = None
            verdict, why = "unclear", f"{why}, but with the factory's weights, whose gradients are large anyway"
    named = bundle.record.parameter
    if blame is not None and named is not None:
        there = next((seen for name, seen in gradients if name == named), None)
        if there is not None and there.holds.bad:
            notes.append(f"the alarm named {named}: its gradient holds {there.holds.told()} in the replay too")
    return Replay(
        bundle=bundle,
        verdict=verdict,
        why=why,
        blame=blame,
        growths=growths(run.operations),
        loss=float(run.root.detach()),
        norm=run.norm,
        micro_step=run.forward.micro_step,
        notes=notes,
        root=run.root,
        model=model,
    )


def _of_samples(culprit: Operation, forward: Forward) -> str:
    """Which samples of the batch an operation broke on, where its rows are the batch's."""
    batch = {t.shape[0] for _, v in inputs_of(forward.args, forward.kwargs) for _, t in tensors_in(v, "") if t.dim()}
    rows, size = culprit.holds.rows, culprit.holds.of_rows
    each_its_own = not culprit.backward or culprit.name.split(" ")[0] in ELEMENTWISE
    if not each_its_own or batch != {size} or len(rows) == size:
        return ""
    return f" in {samples_named(rows, forward.indices)} of the batch"


def _verdict(bundle: Bundle, run: _Run, blame: Blame | None, *, weights_known: bool) -> tuple[Verdict, str]:
    record = bundle.record
    if blame is not None:
        return "reproduced", f"the replay is not finite ({blame.steps[-1]})"
    suspect = _suspect(bundle, weights_known=weights_known)
    if record.reason != "spike":
        if not run.has_loss:
            return "unclear", "the outputs and their gradients are finite, but the loss itself is not in the bundle"
        return "not reproduced", f"loss and gradients of this batch are finite here; {suspect}"
    if not run.has_loss:
        return "unclear", "a spike can only be compared with the real loss, which is not in the bundle"
    recorded = record.local_grad_norm if record.local_grad_norm is not None else record.grad_norm
    told = f"norm {run.norm:.3g} here, {recorded:.3g} recorded"
    limit = math.inf if record.grad_norm_limit is None else record.grad_norm_limit
    if run.norm >= min(_SAME * recorded, limit):
        return "reproduced", told
    return "not reproduced", f"{told}; {suspect}"


def _put_weights(model: nn.Module, bundle: Bundle, given: Mapping[str, Tensor] | None, notes: list[str]) -> bool:
    """Give the model the step's weights; False where they are not known, and the factory's have to do."""
    chosen = bundle.weights if given is None else given
    if chosen is not None and given is None and _broken_by_the_step(bundle, chosen):
        notes.append(
            "the step was not skipped and broke the weights, which were saved after it: they are not used here, but"
            " mode: guard would have kept them whole"
        )
        chosen = None
    if chosen is None:
        notes.append("the weights are as the factory makes them, which may not reproduce: give --weights CHECKPOINT")
        return False
    put_weights(model, chosen)
    return True


def _broken_by_the_step(bundle: Bundle, weights: Mapping[str, Tensor]) -> bool:
    """True if it was this step that put NaN or Inf into them; an earlier one that was applied has done so before."""
    record = bundle.record
    if record.reason == "spike" or (record.applied and record.action in ("skip", "leave_out")):
        return False
    if any(r.reason == "nonfinite" and not r.applied and r.step < record.step for r in bundle.records):
        return False
    return any((contents(value) or Contents()).bad for value in weights.values())


def _suspect(bundle: Bundle, *, weights_known: bool) -> str:
    """What may differ between the step and its replay, the likeliest first: hardware only where nothing else can."""
    record = bundle.record
    if not weights_known:
        return "with other weights than the step's that says nothing yet"
    changed = record.reason == "spike" and not (record.applied and record.action == "skip")
    others = ["the weights are those after the step"] if changed else []
    if record.reason == "spike":
        if bundle.micro_steps > len(bundle.forwards):
            others.append(
                f"{bundle.micro_steps - len(bundle.forwards)} micro-batches of the step are not in the bundle"
            )
        others.append("gradients that no zero_grad() had cleared count in the norm recorded")
    return f"{'; '.join([*others, 'else '])}suspect hardware or a race" if others else "suspect hardware or a race"


def _far_too_large(model: nn.Module) -> list[str]:
    """A note where the weights have blown up before: what overflows then is not to blame."""
    sizes = {name: (contents(p) or Contents()).magnitude for name, p in model.named_parameters()}
    name = max(sizes, key=lambda n: sizes[n], default="")
    if not name or sizes[name] < _BLOWN_UP:
        return []
    return [
        f"the weights had blown up before this step: {name} reaches {sizes[name]:.3g}; lower the learning rate, and go"
        " back to a checkpoint of before"
    ]


# --- one run ---------------------------------------------------------------------------------------------------------


def _run(
    bundle: Bundle,
    forward: Forward,
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    device: torch.device,
    notes: list[str],
) -> _Run:
    forward = dataclasses.replace(
        forward,
        args=tuple(_moved(list(forward.args), device)),
        kwargs=_moved(forward.kwargs, device),
        loaded=_moved(forward.loaded, device),
    )
    rest = rest_of(forward)  # before the model writes into its inputs
    _require_gradients(forward)
    model.zero_grad(set_to_none=True)
    for name, module in model.named_modules():
        module.training = plain_name(name) not in bundle.eval_modules
    inputs = given_inputs(forward)
    watch = OperationWatch(model, [*inputs, *_given_weights(model)])
    with _rng(forward, device, notes), _plainly(), torch.enable_grad():
        with _autocast(forward, device):
            try:
                output = watch.call(model, *forward.args, **forward.kwargs)
            except Exception as error:  # the user's model: whatever it raises
                raise ReplayError(_does_not_fit(forward, error)) from error
            loss = loss_of(watch, output, forward, rest, loss_fn)
        ends = [(name, watch.look(end)) for name, end in loss.ends]
        _backward(watch, loss.root, bundle.record.loss_scale, notes)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = norm_of(gradients) / (bundle.record.loss_scale or 1.0)
    operations = watch.operations if loss.real else watch.operations[: loss.operations]
    return _Run(forward, watch, inputs, loss.root, [*ends, *watch.arrived], norm, loss.real, operations)


def _backward(watch: OperationWatch, root: Tensor, scale: float | None, notes: list[str]) -> None:
    if not root.requires_grad:
        notes.append("the loss does not depend on any parameter that is trained: there was no backward")
        return
    start = root if scale is None else root * scale
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            watch.call(start.sum().backward, retain_graph=True)
        except RuntimeError as error:
            forward_line = _line_of(told)
            raise ReplayError(
                f"backward failed: {str(error).splitlines()[0]}{forward_line};"
                " an in-place operation (relu_, +=, nn.ReLU(inplace=True)) on a tensor that is used again needs a copy"
            ) from error


def _line_of(told: list[warnings.WarningMessage]) -> str:
    """The line of the forward that anomaly detection names, out of its traceback: the user's innermost."""
    lines = [line.strip() for message in told for line in str(message.message).splitlines()]
    places = [line for line in lines if line.startswith('File "') and is_users(line.split('"')[1])]
    return f", of the forward in {places[-1]}" if places else ""


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Nothing compiled, and autograd remembers where each node came from."""
    with torch.compiler.set_stance("force_eager"), torch.autograd.set_detect_anomaly(True, check_nan=False):
        yield


@contextlib.contextmanager
def _rng(forward: Forward, device: torch.device, notes: list[str]) -> Iterator[None]:
    """The generators as they were before the forward; ours are put back after it."""
    there = forward.rng.get("device")
    fitting = there is not None and device.type == forward.device
    python = random.getstate()
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.set_rng_state(forward.rng["cpu"])
        if fitting:
            torch.get_device_module(device).set_rng_state(there, device)
        elif device.type != forward.device:
            notes.append(
                f"this runs on {device.type}, the training ran on {forward.device}: dropout draws other numbers"
            )
        version, state, gauss = forward.rng["python"]
        random.setstate((version, tuple(state), gauss))
        try:
            yield
        finally:
            random.setstate(python)


def _autocast(forward: Forward, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if forward.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=forward.autocast)


def _device(given: torch.device | str | None, forward: Forward, notes: list[str]) -> torch.device:
    if given is not None:
        try:
            device = torch.device(given)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ReplayError(f"--device {given} can't be used: {str(error).splitlines()[0]}") from None
        return device
    accelerator = forward.device if forward.device != "cpu" else ""
    if accelerator == "cuda" and not torch.cuda.is_available():
        notes.append("trained on cuda, of which there is none here: this ran on the CPU, with other rounding")
        accelerator = ""
    return torch.device(accelerator or "cpu")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)  # a model may write into its inputs
    if isinstance(value, dict):
        moved = {key: _moved(part, device) for key, part in value.items()}
        return Fields(moved) if isinstance(value, Fields) else moved
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, device) for part in value)
    return value


def _require_gradients(forward: Forward) -> None:
    for name, value in inputs_of(forward.args, forward.kwargs):
        for where, tensor in tensors_in(value, name):
            if where in forward.requires_grad:
                tensor.requires_grad_()


def _given_weights(model: nn.Module) -> Iterator[tuple[Given, Tensor]]:
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            holds = contents(tensor) or Contents()
            told = f"{kind} {name} holds {holds.told()}" if holds.bad else ""
            yield Given(kind, name, holds, told), tensor


def _does_not_fit(forward: Forward, error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    return (
        f"the model does not fit the bundle's batch: {type(error).__name__}: {said};"
        f" it was called with {inputs_told(forward)}: name the factory of the model that was trained"
    )


_EXAMPLE = """\
example:
  gradmon replay RUN/HOST/0/rank-00001-step-0000008.bundle --model train:make_model --loss torch.nn:CrossEntropyLoss
"""

# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradmon replay`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{MODULE_FACTORY}\n{CONVENTION}\n{_EXAMPLE}"
    parser.add_argument("bundle", metavar="BUNDLE", help="rank-*-step-*.bundle, beside the journals of the run")
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="what makes the model, see below")
    parser.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="loss(output, *rest), see below (default: the model's own, if it has one)",
    )
    parser.add_argument("--weights", metavar="FILE", help="state dict (default: the bundle's, else the factory's)")
    parser.add_argument("--graph", metavar="PATH", help="draw the autograd graph there, as SVG and PNG")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the kind it was trained on, if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out `gradmon replay`: 0 if the incident was reproduced, 1 if not.

    Raises:
        ValueError: the bundle, the factory, the weights or the model are no good; the message names the cure.
    """
    bundle = load_bundle(Path(args.bundle))
    loss = None if args.loss is None else factory.loss(args.loss)
    weights = None if args.weights is None else load_weights(Path(args.weights))
    answer = replay(bundle, factory.model(args.model), loss, weights, device=args.device, command=_command(args))
    if args.graph is not None:
        from gradmon.diagnose.graph import draw

        answer.notes += [f"graph drawn: {path}" for path in draw(answer, Path(args.graph))]
    print(json.dumps(answer.to_dict(), indent=1) if args.json else answer.text(), end="\n" if args.json else "")
    return 0 if answer.verdict == "reproduced" else 1


def _command(args: argparse.Namespace) -> str:
    """As it was given; without what would be another output."""
    given = ["gradmon", "replay", args.bundle, "--model", args.model]
    for name in ("weights", "device"):
        given += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    return shlex.join(given)


def _row(operation: Operation) -> dict[str, Any]:
    return {
        "growth": operation.growth,
        "input": operation.largest_input,
        "output": operation.holds.magnitude,
        "operation": operation.name,
        "module": operation.module,
        "line": operation.line,
        "text": operation.text,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [["growth", "input", "output", "operation", "module", "line"]]
    for row in rows:
        line = row["line"].rpartition("/")[2]
        cells.append(
            [
                f"x{row['growth']:.3g}",
                f"{row['input']:.3g}",
                f"{row['output']:.3g}",
                row["operation"],
                row["module"],
                line,
            ]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")
    if isinstance(value, dict):
        return {key: _jsonable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_jsonable(part) for part in value]
    return value
