"""Attaching: bad input, missing ranks, differing ranks. Every error names the thing and the cure, on all ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import RankError, Ranks
from raw_containers import WRAPPED, OptimizersContainer, Wrapper, forget_accelerate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.identity import DirectoryError, EnvironmentVariableError
from gradmon.journal import read_journal


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = toy.build()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def some_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, toy.FEATURES)).square().mean().backward()
        optimizer.step()


def test_frozen_model(directory: Path) -> None:
    model, optimizer = parts()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradmon.attach(model, optimizer)


def test_optimizer_over_other_parameters(directory: Path) -> None:
    model, _ = parts()
    _, other = parts()
    with pytest.raises(
        ValueError, match=r"8 parameters that are not the model's, the first of shape \(32, 24\); attach"
    ):
        gradmon.attach(model, other)


@pytest.mark.parametrize("wrong", ["sgd", None, [1], []])
def test_not_an_optimizer(directory: Path, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="optimizer"):
        gradmon.attach(parts()[0], wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, r"model must be a torch.nn.Module or a list of them \(got dict\)"),
        ([nn.Linear(2, 2), "head"], r"model must be a torch.nn.Module or a list of them \(got str\)"),
        ((), "model is an empty list; attach at least one module"),
    ],
)
def test_not_a_module(directory: Path, wrong: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        gradmon.attach(wrong, parts()[1])


def test_twice(directory: Path) -> None:
    message = r"attached already in this process; call monitor.detach\(\) first"
    with gradmon.attach(*parts()), pytest.raises(RuntimeError, match=message):
        gradmon.attach(*parts())
    gradmon.attach(*parts()).detach()


def test_bad_config(directory: Path) -> None:
    with pytest.raises(gradmon.ConfigError, match=r"clip\.spike_ratio must be above 1"):
        gradmon.attach(*parts(), config={"clip": {"spike_ratio": 1}})
    gradmon.attach(*parts()).detach()


def test_directory_that_cannot_be_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "file").write_text("")
    monkeypatch.setenv("GRADMON_DIR", str(directory / "file" / "below"))
    with pytest.raises(DirectoryError, match="set GRADMON_DIR"):
        gradmon.attach(*parts())


def test_partial_torchrun_environment(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(EnvironmentVariableError, match="LOCAL_RANK and WORLD_SIZE not set although RANK is"):
        gradmon.attach(*parts())


def test_world_size_without_a_process_group_is_watched_only(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    model, optimizer = parts()
    with gradmon.attach(model, optimizer) as monitor:
        some_steps(model, optimizer)
    assert "only watching, not acting: WORLD_SIZE is 2 but there is no process group" in caplog.text
    assert not any(made.applied for _, made in read_journal(monitor.journal_path).steps)


def test_a_journal_that_cannot_be_opened_costs_the_journal_only(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradmon.plan.JournalWriter", refuse)
    model, optimizer = parts()
    with gradmon.attach(model, optimizer) as monitor:
        some_steps(model, optimizer)
        assert monitor.step == 3
        assert monitor.journal_path is None
    assert "no journal for this rank, training goes on without it: [Errno 28]" in caplog.text


def test_exceptions_are_the_scripts_own(directory: Path) -> None:
    model, optimizer = parts()
    monitor = gradmon.attach(model, optimizer)

    def script() -> None:
        with monitor:
            some_steps(model, optimizer)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        script()
    view = read_journal(monitor.journal_path)
    assert (view.state, view.end_detail, len(view.steps)) == ("exception", "KeyError: 'mine'", 3)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("loss", [torch.ones(3), torch.ones(0)])
def test_loss_must_be_one_number(directory: Path, loss: torch.Tensor) -> None:
    with gradmon.attach(*parts()) as monitor, pytest.raises(ValueError, match="loss must hold one element"):
        monitor.observe(loss=loss)


@pytest.mark.parametrize("when", ["before", "after"])
def test_losses_belong_to_their_step(directory: Path, when: str) -> None:
    model, optimizer = parts()
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 6):
            optimizer.zero_grad()
            model(torch.randn(4, toy.FEATURES)).square().mean().backward()
            if when == "before":
                monitor.observe(loss=torch.tensor(float(step)))
                monitor.observe(loss=float(step + 1))  # a second micro-step
            optimizer.step()
            if when == "after":
                monitor.observe(loss=torch.tensor(step + 0.5, requires_grad=True))
    losses = {made.step: made.loss for _, made in read_journal(monitor.journal_path).steps}
    if when == "after":  # the first call tells which way the loop goes
        assert losses == {1: 1.5, 2: 2.5, 3: 3.5, 4: 4.5, 5: 5.5}
    else:
        assert losses == {step: step + 0.5 for step in range(1, 6)}


def test_state_goes_on(directory: Path) -> None:
    """Resumed == uninterrupted: the same spikes are judged the same way, also in the middle of the ladder."""

    def run(resume_at: int | None) -> tuple[list[torch.Tensor], list[tuple[int, str, float | None, float]]]:
        model, optimizer = parts()
        generator = torch.Generator().manual_seed(5)
        monitor = gradmon.attach(model, optimizer)
        seen: list[Any] = []
        for step in range(1, 41):
            optimizer.zero_grad()
            loss = model(torch.randn(4, toy.FEATURES, generator=generator)).square().mean()
            (loss * (1000 if step in range(30, 34) else 1)).backward()
            optimizer.step()
            if step == resume_at:
                state = monitor.state_dict()
                monitor.detach()
                seen += read_journal(monitor.journal_path).steps
                monitor = gradmon.attach(model, optimizer)
                monitor.load_state_dict(state)
        monitor.detach()
        seen += read_journal(monitor.journal_path).steps
        parameters = [p.detach().clone() for p in model.parameters()]
        told = [(made.step, made.action, made.grad_norm_limit, made.learning_rate_scale) for _, made in seen]
        return parameters, told

    straight = run(None)
    assert [action for step, action, *_ in straight[1] if 30 <= step < 35] == [
        "rescale",
        "skip",
        "skip",
        "skip",
        "none",
    ]
    assert [scale for step, *_, scale in straight[1] if 33 <= step < 36] == [1, 0.3, 0.3 * 1.05]
    for at in (20, 30, 31, 33, 35):
        assert toy.equal(run(at), straight)


def test_state_of_something_else(directory: Path) -> None:
    with gradmon.attach(*parts()) as monitor, pytest.raises(ValueError, match=r"version 1 \(got None\)"):
        monitor.load_state_dict({})


@pytest.mark.filterwarnings("ignore:.*(deprecated|Deprecated):")  # the frameworks' own imports
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_optimizers_are_judged(directory: Path, kind: str) -> None:
    """The step with the NaN leaves all weights; a rate that is lowered after two spikes is that of the inner one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(toy.FEATURES, 8), nn.Linear(8, 1))
    optimizer = WRAPPED[kind](model)
    factors = {20: float("nan"), 30: 1000.0, 31: 1000.0}
    moved = {}
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 33):
            optimizer.zero_grad()
            inputs = torch.randn(16, toy.FEATURES, generator=torch.Generator().manual_seed(step))
            ((model(inputs) - 1).square().mean() * factors.get(step, 1.0)).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            moved[step] = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    if kind == "accelerate":
        forget_accelerate()
    view = read_journal(monitor.journal_path)
    assert not [key for key, count in view.counters.items() if "errors" in key[0] and count]
    actions = {made.step: made.action for _, made in view.steps}
    assert len(actions) == 32, "one step for all, however many optimizers are inside"
    assert {step: action for step, action in actions.items() if action != "none"} == {
        20: "skip", 30: "rescale", 31: "skip",
    }  # fmt: skip
    assert {step for step, changed in moved.items() if not any(changed)} == {20, 31}


def test_the_rate_is_lowered_inside_a_container(directory: Path) -> None:
    """Its own groups have a rate that nobody reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(toy.FEATURES, 8), nn.Linear(8, 1))
    optimizer = OptimizersContainer(list(model.children()), lr=1e-2, weight_decay=0.0)
    rates: list[list[float]] = []
    for inner in optimizer.optimizers:
        inner.register_step_post_hook(lambda inner, *_: rates[-1].append(inner.param_groups[0]["lr"]))
    with gradmon.attach(model, optimizer):
        for step in range(1, 36):
            rates.append([])
            optimizer.zero_grad()
            inputs = torch.randn(16, toy.FEATURES, generator=torch.Generator().manual_seed(step))
            ((model(inputs) - 1).square().mean() * (1000.0 if 30 <= step < 34 else 1.0)).backward()
            optimizer.step()
    assert rates[10] == [1e-2, 1e-2]
    assert rates[33] == [pytest.approx(0.3 * 1e-2)] * 2


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (lambda wrapper: wrapper, r"Wrapper wraps an optimizer and has no step hooks .* attach the inner one"),
        (lambda _: None, r"Wrapper wraps an optimizer and has no step hooks .* attach the inner one"),
    ],
    ids=["itself", "nothing"],
)
def test_a_wrapper_with_no_optimizer_inside(directory: Path, inner: Callable[[Any], Any], said: str) -> None:
    model, optimizer = parts()
    wrapper = Wrapper(optimizer, "optim")
    wrapper.optim = inner(wrapper)
    with pytest.raises(TypeError, match=said):
        gradmon.attach(model, wrapper)


def test_an_optimizer_for_every_parameter_is_watched(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As torchtitan's container for steps inside backward: no step has all gradients, so none can be skipped whole."""
    model = toy.build()
    each = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}

    def step_now(parameter: torch.Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    with gradmon.attach(model, each.values()) as monitor:
        for _ in range(3):
            model(torch.full((4, toy.FEATURES), float("nan"))).square().mean().backward()
    assert "only watching, not acting: every parameter has an optimizer of its own" in caplog.text
    view = read_journal(monitor.journal_path)
    assert view.steps
    assert not any(made.applied and made.action != "none" for _, made in view.steps)


def test_parts_are_one_model(directory: Path) -> None:
    """torchtitan's parts keep the names they had in the whole model; where two have one name, the number tells."""
    whole = toy.build()
    apart = [nn.ModuleDict({"inner": whole[0], "norm": whole[2]}), nn.ModuleDict({"up": whole[3], "head": whole[5]})]
    optimizer = torch.optim.SGD([p for part in apart for p in part.parameters()], lr=0.1)
    with gradmon.attach(apart, optimizer) as monitor:
        assert monitor._watched.names == [
            f"{m}.{k}" for m in ("inner", "norm", "up", "head") for k in ("weight", "bias")
        ]
    alike = (nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    alike[1].weight = alike[0].weight  # shared: one parameter
    other = nn.Linear(3, 1)
    with gradmon.attach((*alike, other), torch.optim.SGD([*alike[0].parameters(), *other.parameters()])) as monitor:
        assert monitor._watched.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert len(monitor._watched.parameters) == 4
    with gradmon.attach([whole], torch.optim.SGD(whole.parameters())) as monitor:
        assert monitor._topology.model is whole
        assert monitor._watched.names[0] == "0.weight"


def test_a_nan_in_one_part_is_skipped_in_all(directory: Path) -> None:
    model_parts: list[nn.Module] = [nn.Linear(toy.FEATURES, 8), nn.Linear(8, 1)]
    optimizer = OptimizersContainer(model_parts, lr=1e-2, fused=True)
    with gradmon.attach(model_parts, optimizer) as monitor:
        for step in range(1, 4):
            optimizer.zero_grad()
            model_parts[1](torch.tanh(model_parts[0](torch.randn(4, toy.FEATURES)))).square().mean().backward()
            if step == 2:
                model_parts[1].bias.grad[0] = float("nan")  # type: ignore[index, union-attr]
            before = [p.detach().clone() for part in model_parts for p in part.parameters()]
            optimizer.step()
            after = [p for part in model_parts for p in part.parameters()]
            assert all(torch.equal(a, b) == (step == 2) for a, b in zip(before, after, strict=True))
    written = [made for _, made in read_journal(monitor.journal_path).steps]
    assert [(made.step, made.action) for made in written] == [(1, "none"), (2, "skip"), (3, "none")]
    assert written[1].parameter == "1.bias"


def test_one_verdict_for_several_optimizers(directory: Path) -> None:
    """A NaN in the second optimizer's part: none of them steps."""
    model = toy.build()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.AdamW([*model[3].parameters(), *model[5].parameters()], fused=True),
    ]
    with gradmon.attach(model, optimizers) as monitor:
        for step in range(1, 4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.randn(4, toy.FEATURES)).square().mean().backward()
            if step == 2:
                model[5].weight.grad[0, 0] = float("nan")
            before = [p.detach().clone() for p in model.parameters()]
            for optimizer in optimizers:
                optimizer.step()
            same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            # model[2], the LayerNorm, has no optimizer
            assert same == ([True] * 8 if step == 2 else [False, False, True, True, False, False, False, False])
    written = [made for _, made in read_journal(monitor.journal_path).steps]
    assert [(made.step, made.action) for made in written] == [(1, "none"), (2, "skip"), (3, "none")]
    assert written[1].parameter == "5.weight"


def test_optimizers_that_take_turns_are_judged_each_on_its_own_gradients(directory: Path) -> None:
    """As in a GAN: the second backward comes after the first step; its NaN must not slip through."""
    model = nn.ModuleDict({"d": nn.Linear(3, 1), "g": nn.Linear(3, 1)})
    first, second = (torch.optim.SGD(model[k].parameters(), lr=0.1) for k in "dg")
    with gradmon.attach(model, [first, second]) as monitor:
        for step in range(3):
            first.zero_grad()
            second.zero_grad()
            model["d"](torch.ones(1, 3)).sum().backward()
            first.step()
            before = model["g"].weight.detach().clone()
            model["g"](torch.full((1, 3), float("nan") if step == 1 else 1.0)).sum().backward()
            second.step()
            assert torch.equal(before, model["g"].weight) == (step == 1)
    assert [made.action for _, made in read_journal(monitor.journal_path).steps] == ["none"] * 3 + ["skip"] + [
        "none"
    ] * 2


def test_the_scripts_clip_is_seen_through_an_early_import(directory: Path) -> None:
    from torch.nn.utils import clip_grad_norm_ as imported_early

    model, optimizer = parts()
    with gradmon.attach(model, optimizer) as monitor:
        optimizer.zero_grad()
        (model(torch.randn(4, toy.FEATURES)) * 100).square().mean().backward()
        norm = imported_early(iter(model.parameters()), 0.5)
        optimizer.step()
    (made,) = (made for _, made in read_journal(monitor.journal_path).steps)
    assert float(norm) > 1
    assert made.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert made.grad_norm_applied == pytest.approx(0.5, rel=1e-4)


# --- several ranks -------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """As Lightning Fabric's module: holds the DDP object, and is what the script calls."""

    def __init__(self, inner: nn.Module, *, more: bool = False) -> None:
        super().__init__()
        self.forwarded = inner
        self.scale = nn.Parameter(torch.ones(())) if more else 1.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.forwarded(inputs) * self.scale


def ddp_inside(directory: str, kind: str) -> tuple[str, list[str], bool, bool]:
    """(topology, names, whether the step with the NaN was left out, whether ranks have equal weights at the end)."""
    os.environ["GRADMON_DIR"] = directory
    torch.manual_seed(0)
    first, second = (DistributedDataParallel(nn.Linear(4, 4)) for _ in range(2))
    model: Any = {
        "list": [first, second],
        "module list": nn.ModuleList([first, second]),
        "holder": Holder(first),
        "holder of more": Holder(first, more=True),
        "list of one": [first],
    }[kind]
    modules = model if isinstance(model, list) else [model]
    if kind == "module list":
        modules = list(model)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with gradmon.attach(model, optimizer) as monitor:
        for step in range(1, 4):
            optimizer.zero_grad()
            outputs = torch.full((2, 4), float("nan") if (step, toy.rank()) == (2, 1) else 0.1)
            for module in modules:
                outputs = torch.tanh(module(outputs))
            outputs.sum().backward()
            optimizer.step()
        topology, names = str(monitor._topology), monitor._watched.names
    applied = [r.action for _, r in read_journal(monitor.journal_path).steps if r.applied and r.action != "none"]
    flat = torch.cat([p.detach().flatten() for p in modules[0].parameters()])[:20]
    every = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(every, flat)
    return topology, names, applied == ["skip"], torch.equal(every[0], every[1]) and bool(flat.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "topology", "name", "acts"),
    [
        ("list", "ddp: several DistributedDataParallel objects", "0.weight", False),
        ("module list", "ddp: several DistributedDataParallel objects", "0.module.weight", False),
        ("holder", "ddp", "weight", True),
        ("holder of more", "unrecognised: a part of the model is no DistributedDataParallel", "scale", False),
        ("list of one", "ddp", "weight", True),
    ],
)
def test_ddp_objects_inside(two_ranks: Ranks, tmp_path: Path, kind: str, topology: str, name: str, acts: bool) -> None:
    """gradmon acts on one object that holds all parameters; else it says which one to attach."""
    for found, names, skipped, sound in two_ranks.run(ddp_inside, str(tmp_path), kind):
        assert (found == topology) if acts else found.startswith(topology)
        assert names[0] == name
        assert skipped == acts
        assert sound == acts


def try_to_attach(directory: str, kind: str) -> tuple[str, float]:
    """The error on this rank and how long it took; then a run that works, on the same processes."""
    os.environ["GRADMON_DIR"] = directory
    rank = toy.rank()
    model = DistributedDataParallel(toy.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config: dict[str, Any] = {"attach_timeout_seconds": 2}
    if kind == "config" and rank == 1:
        config["clip"] = {"spike_ratio": 5}
    if kind == "broken config" and rank == 1:
        config["clip"] = {"spike_ratio": "a lot"}
    if kind == "model" and rank == 1:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1)
    if kind == "directory" and rank == 0:
        config["dir"] = "/proc/none"
    started = time.monotonic()
    error = ""
    try:
        if kind == f"no rank {rank}":
            time.sleep(3)
        else:
            gradmon.attach(model, optimizer, config=config).detach()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    took = time.monotonic() - started
    torch.distributed.barrier()
    if not kind.startswith("no rank"):  # there one process has attached less often than the other
        with gradmon.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
            pass
    return error, took


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("config", ["AttachError: setting clip.spike_ratio differs between ranks: 4.0 on rank 0, 5.0 on rank 1;"] * 2),
        (
            "broken config",
            [
                "AttachError: rank 1: clip.spike_ratio must be a number",
                "ConfigError: clip.spike_ratio must be a number",
            ],
        ),
        ("model", ["AttachError: the model differs between ranks: 'ddp 8 parameter tensors"] * 2),
        ("directory", ["DirectoryError: dir /proc/none", "AttachError: rank 0: dir /proc/none can't be made"]),
    ],
)
def test_ranks_that_do_not_fit_get_the_same_error(
    two_ranks: Ranks, tmp_path: Path, kind: str, expected: list[str]
) -> None:
    for (error, _), start in zip(two_ranks.run(try_to_attach, str(tmp_path), kind), expected, strict=True):
        assert error.startswith(start)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_attached_is_an_error_not_a_hang(two_ranks: Ranks, tmp_path: Path, missing: int) -> None:
    outcomes = two_ranks.run(try_to_attach, str(tmp_path), f"no rank {missing}")
    two_ranks.stop()  # the processes have attached unequally often
    error, took = outcomes[1 - missing]
    assert f"rank {missing} did not attach within 2 s" in error
    assert "on every rank" in error
    assert took < 3 * (2 + 5)


def test_rank_error_is_reported(two_ranks: Ranks) -> None:
    """The harness itself: a failing rank must fail the test."""
    with pytest.raises(RankError, match="ZeroDivisionError"):
        two_ranks.run(divmod, 1, 0)


def test_a_journal_that_lies_behind_keeps_no_details_waiting(directory: Path) -> None:
    """On a dead disk ten thousand steps may wait; with statistics of 2,000 parameters each they would be gigabytes."""
    import threading

    from gradmon.journal import _DETAILED_QUEUE_LIMIT

    model = toy.build()
    optimizer = toy.optimizer_for("sgd", model.parameters())
    dead, waiting = threading.Event(), []
    with gradmon.attach(model, optimizer) as monitor:
        journal = monitor._journal
        assert journal is not None
        write, put = journal._write_item, journal.put

        def stuck(*args: object) -> None:
            dead.wait(30)
            write(*args)

        def seen(item: object) -> None:
            waiting.append(len(getattr(item, "_details", ())))
            put(item)

        journal._write_item, journal.put = stuck, seen
        for _ in range(_DETAILED_QUEUE_LIMIT + 20):
            optimizer.zero_grad()
            model(torch.randn(2, toy.FEATURES)).square().mean().backward()
            optimizer.step()
        dead.set()
    assert waiting[0] == 1, "a step has statistics"
    assert waiting[-1] == 0
    assert sum(waiting) <= _DETAILED_QUEUE_LIMIT + 8
    assert len(read_journal(monitor.journal_path).steps) == _DETAILED_QUEUE_LIMIT + 20
