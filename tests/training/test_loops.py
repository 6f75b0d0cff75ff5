"""Loops that scripts really have, each against the same loop without gradmon: guards of their own, logging clips,
several optimizers, accumulation, joins, copies, exits."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradmon
from gradmon.journal import read_journal
from gradmon.record import StepRecord

Loop = Callable[[nn.Module, list[torch.optim.Optimizer], int], None]


def parameters_after(loop: Loop, make: Callable[[nn.Module], list[torch.optim.Optimizer]], attached: bool) -> Any:
    """Run `loop` for 30 iterations; its final parameters and the journal's records."""
    inner = toy.build()
    model: nn.Module = DistributedDataParallel(inner) if dist.is_initialized() else inner
    optimizers = make(model)
    torch.manual_seed(toy.rank())
    monitor = gradmon.attach(model, optimizers) if attached else None
    for iteration in range(30):
        loop(model, optimizers, iteration)
    records: list[StepRecord] = []
    if monitor is not None:
        monitor.detach()
        assert monitor.journal_path is not None
        records = [made for _, made in read_journal(monitor.journal_path).steps]
    return [p.detach().clone() for p in inner.parameters()], records


def backward(model: nn.Module, broken: bool = False) -> None:
    inputs = torch.randn(8, toy.FEATURES)
    if broken:
        inputs[0, 0] = math.nan
    (model(inputs) - inputs.sum(1, keepdim=True) * 0.1).square().mean().backward()


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)]


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    listed = list(model.parameters())
    return [torch.optim.SGD(listed[:4], lr=1e-2), torch.optim.SGD(listed[4:], lr=1e-2)]


# --- one process ---------------------------------------------------------------------------------------------------


def test_a_guard_of_the_scripts_own(directory: Path) -> None:
    """A step that the script leaves out after its clip must not be judged again at the next."""

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        backward(model, broken=iteration == 20)
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizers[0].step()

    plain, _ = parameters_after(loop, adamw, attached=False)
    attached, records = parameters_after(loop, adamw, attached=True)
    assert toy.equal(plain, attached)
    assert len(records) == 29
    assert all(made.action == "none" for made in records)


def test_the_recipe_of_mixed_precision(directory: Path) -> None:
    """unscale_, clip, scaler.step: on Inf the scaler never calls a plain optimizer's step."""

    def make() -> Loop:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)

        def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
            optimizers[0].zero_grad()
            inputs = torch.randn(8, toy.FEATURES)
            loss = model(inputs).square().mean() * (math.inf if iteration == 12 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizers[0])
            scaler.update()

        return loop

    def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)]

    plain, _ = parameters_after(make(), sgd, attached=False)
    attached, records = parameters_after(make(), sgd, attached=True)
    assert toy.equal(plain, attached)
    left_out = [made for made in records if made.action != "none"]
    assert [(made.step, made.action, made.reason) for made in left_out] == [(13, "skip", "scaler_skip")]
    assert len(records) == 30


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_inside_a_step(directory: Path, fused: bool) -> None:
    """torch's hooks fire for a subclass's step and for the base class's that it calls."""

    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # a plain one, so that both classes are hooked

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [Mine(model.parameters(), lr=3e-3, fused=fused)]

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        backward(model, broken=iteration == 20)
        optimizers[0].step()

    parameters, records = parameters_after(loop, make, attached=True)
    assert all(p.isfinite().all() for p in parameters)
    assert [made.step for made in records] == list(range(1, 31))
    assert [made.step for made in records if made.action == "skip"] == [21]


def test_a_step_that_raised_does_not_end_the_guard(directory: Path) -> None:
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        backward(model, broken=True)

        def stop(*_args: Any) -> None:
            raise KeyboardInterrupt

        handle = optimizer.register_step_pre_hook(stop)  # after ours: gradients are held aside by then
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        handle.remove()
        optimizer.zero_grad()
        for broken in (False, True, False):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            backward(model, broken)
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            after = [p.detach() for p in model.parameters()]
            if broken:
                assert toy.equal(before, after)
            else:
                torch.testing.assert_close([p - 1e-2 * g for p, g in zip(before, gradients, strict=True)], after)
        assert monitor._nesting._depth[optimizer] == 0


def test_gradients_broken_after_the_clip_are_seen(directory: Path) -> None:
    """A clip by an overflowed norm leaves NaN where all was finite before."""

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        backward(model)
        if iteration == 20:
            for parameter in model.parameters():
                parameter.grad.fill_(1e25)
        nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizers[0].step()

    parameters, records = parameters_after(loop, adamw, attached=True)
    assert all(p.isfinite().all() for p in parameters)
    assert records[20].action == "skip"


def test_parameters_added_and_unfrozen_later_are_watched(directory: Path) -> None:
    model = toy.build()
    listed = list(model.parameters())
    listed[0].requires_grad_(False)
    optimizer = torch.optim.SGD(listed[:4], lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        for iteration in range(20):
            if iteration == 5:
                optimizer.add_param_group({"params": listed[4:]})
            if iteration == 10:
                listed[0].requires_grad_(True)
            optimizer.zero_grad()
            backward(model)
            if iteration == 8:
                listed[-1].grad.fill_(math.nan)
            if iteration == 15:
                listed[0].grad[0, 0] = math.nan
            optimizer.step()
    assert all(p.isfinite().all() for p in listed)
    skipped = {
        made.step: made.parameter for _, made in read_journal(monitor.journal_path).steps if made.action == "skip"
    }
    assert skipped == {9: "added[7]", 16: "0.weight"}


@pytest.mark.parametrize("shared", [True, False])
def test_back_off_of_a_tensor_rate_shared_by_groups(directory: Path, shared: bool) -> None:
    rate = torch.tensor(1e-2)

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        listed = list(model.parameters())
        groups = [{"params": listed[:4], "lr": rate}, {"params": listed[4:], "lr": rate if shared else rate.clone()}]
        return [torch.optim.AdamW(groups, lr=rate, fused=True)]

    made: list[torch.optim.Optimizer] = []

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        made[:] = optimizers
        optimizers[0].zero_grad()
        backward(model)
        if iteration in range(20, 24):
            for parameter in model.parameters():
                parameter.grad.mul_(1e4)
        optimizers[0].step()

    _, records = parameters_after(loop, make, attached=True)
    assert [r.learning_rate_scale for r in records][24] == 0.3
    assert [float(group["lr"]) for group in made[0].param_groups] == [pytest.approx(1e-2)] * 2
    assert all(r.learning_rate == pytest.approx(1e-2) for r in records)


def test_sparse_gradients_are_really_rescaled(directory: Path) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradmon.attach(model, optimizer) as monitor:
        for iteration in range(15):
            optimizer.zero_grad()
            before = model.weight.detach().clone()
            (model(torch.tensor([1, 2, 1])).sum() * (1e6 if iteration == 12 else 1e-3)).backward()
            optimizer.step()
            update = float((model.weight.detach() - before).double().norm())
            assert update == pytest.approx(1e-3 * math.sqrt(4 * (4 + 1)), rel=1e-3)
    assert [made.action for _, made in read_journal(monitor.journal_path).steps][12] == "rescale"


def test_a_rate_the_script_set_after_a_failed_step_is_kept(directory: Path) -> None:
    from gradmon.actions import OptimizerActions

    optimizer = torch.optim.SGD(toy.build().parameters(), lr=torch.tensor(0.1))
    actions = OptimizerActions(optimizer)
    actions.before(None, 0.5)  # the step raises
    optimizer.param_groups[0]["lr"] = 0.3
    actions.restore()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_compiled_clip_is_not_in_the_way(directory: Path) -> None:
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    clip = torch.compile(lambda p: nn.utils.clip_grad_norm_(p, 0.1), backend="eager", fullgraph=True)
    try:
        backward(model)
        clip(list(model.parameters()))
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch can't compile its own clip (2.6 can't)")
    torch.compiler.reset()
    with gradmon.attach(model, optimizer):
        optimizer.zero_grad()
        backward(model)
        assert float(clip(list(model.parameters()))) > 0.1
        optimizer.step()
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        ("", "finished"),
        ("sys.exit(0)", "finished"),
        ("sys.exit(3)", "exception"),
        ("raise RuntimeError('x')", "exception"),
    ],
)
def test_how_a_script_ended(tmp_path: Path, ending: str, state: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, gradmon\nmodel = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nmonitor = gradmon.attach(model, optimizer)\n"
        f"model(torch.ones(1, 2)).sum().backward()\noptimizer.step()\nprint(monitor.journal_path)\n{ending}\n"
    )
    environment = {**os.environ, "GRADMON_DIR": str(tmp_path / "journals"), "GRADMON_AGENT": "off"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == {"": 0, "sys.exit(0)": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert read_journal(Path(done.stdout.split()[0])).state == state


def test_an_optimizer_wrapper_is_named(directory: Path) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.hidden = optimizer  # `optimizer` and `optim` are looked into

    model = toy.build()
    with pytest.raises(TypeError, match=r"Wrapper wraps an optimizer .* attach the inner one"):
        gradmon.attach(model, Wrapper(torch.optim.SGD(model.parameters())))


def test_an_agent_that_cannot_start_leaves_the_guard_standing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADMON_AGENT", "auto")
    (directory / "agent.log").mkdir()  # can't be opened as a file
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        for broken in (False, False, True):
            optimizer.zero_grad()
            backward(model, broken)
            optimizer.step()
    assert "gradmon's own agent failed, training goes on: IsADirectoryError" in caplog.text
    view = read_journal(monitor.journal_path)
    assert [made.action for _, made in view.steps] == ["none", "none", "skip"]
    assert view.counters["gradmon_errors_total", ("agent",)] == 1


def test_a_loss_that_cannot_be_read_costs_the_loss_only(directory: Path) -> None:
    """`meta` stands in for a device whose values can't be had."""
    model = toy.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradmon.attach(model, optimizer) as monitor:
        for iteration in range(4):
            optimizer.zero_grad()
            backward(model, broken=iteration == 3)
            monitor.observe(loss=torch.ones((), device="meta") if iteration == 1 else 2.5)
            optimizer.step()
    view = read_journal(monitor.journal_path)
    assert view.steps[0][1].loss == view.steps[-1][1].loss == 2.5
    assert view.steps[-1][1].action == "skip"
    assert view.steps[-1][1].applied, "the guard stands"


def test_an_optimizer_without_a_learning_rate(directory: Path) -> None:
    from gradmon.actions import OptimizerActions, learning_rate

    optimizer = torch.optim.SGD(toy.build().parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    assert math.isnan(float(learning_rate(optimizer)))
    actions = OptimizerActions(optimizer)
    actions.before(None, 0.5)
    actions.after()
    assert optimizer.param_groups[0]["lr"] is None


def test_what_a_scaler_threw_away_is_not_the_next_steps(two_ranks: Ranks, tmp_path: Path) -> None:
    for broken in two_ranks.run(scaler_skips, str(tmp_path)):
        assert broken == []


def scaler_skips(directory: str) -> list[int]:
    """Rows of a backward whose step the script left out; the steps after it must not show its NaN."""
    os.environ["GRADMON_DIR"] = directory

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        backward(model, broken=iteration == 10 and toy.rank() == 1)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            optimizers[0].step()

    _, records = parameters_after(loop, adamw, attached=True)
    assert len(records) == 29
    return [r.step for r in records if r.local_nan_count or not math.isfinite(r.local_grad_norm or 0.0)]


# --- several ranks -------------------------------------------------------------------------------------------------


def optimizers_in_turn(directory: str) -> tuple[bool, list[str]]:
    """`clip(a); a.step(); clip(b); b.step()` after one backward; NaN in one iteration."""
    os.environ["GRADMON_DIR"] = directory

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, broken=iteration == 20 and toy.rank() == 1)
        for optimizer in optimizers:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
            optimizer.step()

    parameters, records = parameters_after(loop, halves, attached=True)
    return all(bool(p.isfinite().all()) for p in parameters), [made.reason for made in records]


def test_optimizers_in_turn_each_with_a_clip(two_ranks: Ranks, tmp_path: Path) -> None:
    for finite, reasons in two_ranks.run(optimizers_in_turn, str(tmp_path)):
        assert finite
        assert reasons == ["healthy"] * 20 + ["nonfinite"] + ["healthy"] * 9


def every_second(directory: str) -> list[str]:
    os.environ["GRADMON_DIR"] = directory

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizers[0].step()
        if iteration % 2:
            optimizers[1].step()

    _, records = parameters_after(loop, halves, attached=True)
    assert all(made.grad_norm > 0.1 for made in records[:5]), "measured before the clip"
    return [made.reason for made in records]


def test_an_optimizer_that_steps_every_second_time(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(every_second, str(tmp_path)) == [["healthy"] * 30] * 2


def logging_clip_on_one_rank(directory: str, threads: bool) -> tuple[Any, list[str]]:
    """Rank 0 logs the norm by a clip without limit, after the step; rank 1 does not."""
    os.environ["GRADMON_DIR"] = directory
    torch.set_num_threads(1 + (toy.rank() if threads else 0))

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        backward(model, broken=iteration == 20 and toy.rank() == 1)
        optimizers[0].step()
        if toy.rank() == 0:
            nn.utils.clip_grad_norm_(model.parameters(), math.inf)

    try:
        parameters, records = parameters_after(loop, adamw, attached=True)
    finally:
        torch.set_num_threads(1)
    return parameters, [made.action for made in records]


@pytest.mark.parametrize("threads", [False, True], ids=["equal-threads", "unequal-threads"])
def test_a_rank_that_clips_for_its_log(two_ranks: Ranks, tmp_path: Path, threads: bool) -> None:
    (left, actions), (right, others) = two_ranks.run(logging_clip_on_one_rank, str(tmp_path), threads)
    assert toy.equal(left, right)
    assert all(p.isfinite().all() for p in left)
    assert actions == others == ["none"] * 20 + ["skip"] + ["none"] * 9


def nan_in_the_first_micro_step(directory: str) -> list[tuple[int, int | None]]:
    os.environ["GRADMON_DIR"] = directory

    def loop(model: nn.Module, optimizers: list[torch.optim.Optimizer], iteration: int) -> None:
        optimizers[0].zero_grad()
        for micro in range(3):  # without no_sync: each all-reduce hands the NaN on
            backward(model, broken=(toy.rank(), iteration, micro) == (1, 12, 0))
        optimizers[0].step()

    _, records = parameters_after(loop, adamw, attached=True)
    return [(made.step, made.culprit_rank) for made in records if made.reason == "nonfinite"]


def test_accumulation_without_no_sync_names_the_right_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(nan_in_the_first_micro_step, str(tmp_path)) == [[(13, 1)]] * 2


def uneven_inputs(directory: str, threads: bool) -> tuple[bool, bool]:
    """Rank 1 has fewer batches; inside `model.join()`."""
    os.environ["GRADMON_DIR"] = directory
    torch.set_num_threads(1 + (toy.rank() if threads else 0))

    def run(attached: bool) -> list[torch.Tensor]:
        model = DistributedDataParallel(toy.build())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        torch.manual_seed(toy.rank())
        monitor = gradmon.attach(model, optimizer) if attached else None
        with model.join():
            for _ in range(12 - 4 * toy.rank()):
                optimizer.zero_grad()
                backward(model)
                optimizer.step()
        if monitor is not None:
            monitor.detach()
        return [p.detach().clone() for p in model.parameters()]

    try:
        without, attached = run(False), run(True)
    finally:
        torch.set_num_threads(1)
    return toy.equal(without, attached), all(bool(p.isfinite().all()) for p in attached)


@pytest.mark.parametrize("threads", [False, True], ids=["equal-threads", "unequal-threads"])
def test_join_with_uneven_inputs(two_ranks: Ranks, tmp_path: Path, threads: bool) -> None:
    assert two_ranks.run(uneven_inputs, str(tmp_path), threads) == [(True, True)] * 2


def copies(directory: str) -> list[str]:
    """An EMA copy, a deep copy and a saved DDP model, while attached."""
    os.environ["GRADMON_DIR"] = directory
    model = DistributedDataParallel(toy.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    done = []
    with gradmon.attach(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        twin = copy.deepcopy(model)
        backward(twin)
        done.append("deepcopy")
        torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
        done.append("average")
        torch.save(model, io.BytesIO())
        done.append("save")
    return done


def test_a_model_can_be_copied_while_attached(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(copies, str(tmp_path)) == [["deepcopy", "average", "save"]] * 2


def bucket_views(directory: str, static: bool) -> tuple[bool, bool]:
    os.environ["GRADMON_DIR"] = directory

    def run(attached: bool) -> tuple[list[torch.Tensor], bool]:
        model = DistributedDataParallel(toy.build(), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        torch.manual_seed(toy.rank())
        monitor = gradmon.attach(model, optimizer) if attached else None
        for _ in range(15):
            optimizer.zero_grad(set_to_none=not static)
            backward(model)
            optimizer.step()
        acted = False
        if monitor is not None:
            monitor.detach()
            acted = all(made.applied for _, made in read_journal(monitor.journal_path).steps)
        return [p.detach().clone() for p in model.parameters()], acted

    (without, _), (attached, acted) = run(False), run(True)
    return toy.equal(without, attached), acted


@pytest.mark.parametrize("static", [False, True], ids=["fresh-gradients", "static-gradients"])
def test_bucket_views_stay_bit_identical(two_ranks: Ranks, three_ranks: Ranks, static: bool, tmp_path: Path) -> None:
    """On 3 ranks DDP divides what lies in the bucket already and multiplies what it copies there: other bits."""
    assert two_ranks.run(bucket_views, str(tmp_path), static) == [(True, True)] * 2
    assert three_ranks.run(bucket_views, str(tmp_path / "three"), static) == [(True, True)] * 3


def watched_only(directory: str, kind: str) -> str:
    os.environ["GRADMON_DIR"] = directory
    group = None
    if kind == "subgroup":
        group = [dist.new_group([0]), dist.new_group([1])][toy.rank()]
    inner = toy.build()
    if kind == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["0.weight"])
    model = DistributedDataParallel(inner, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    target: nn.Module = model.module if kind == "inner on rank 0" and toy.rank() == 0 else model
    try:
        with gradmon.attach(target, optimizer) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                backward(model)
                optimizer.step()
        view = read_journal(monitor.journal_path)
        assert not any(made.applied for _, made in view.steps)
        return f"{view.identity.run} {view.identity.rank} {view.identity.topology}"
    except gradmon.monitor.AttachError as error:
        return str(error)


def test_topologies_that_are_only_watched(two_ranks: Ranks, tmp_path: Path) -> None:
    subgroup = two_ranks.run(watched_only, str(tmp_path), "subgroup")
    assert [s.split(" ", 2)[1:] for s in subgroup] == [
        [str(rank), "ddp: DDP averages over 1 of 2 ranks, and the others would decide differently"] for rank in (0, 1)
    ]
    assert len({s.split()[0] for s in subgroup}) == 1, "one run, not two"
    for told in two_ranks.run(watched_only, str(tmp_path), "ignored"):
        assert "DDP is told to ignore 1 of the parameters" in told


def test_ddp_on_one_rank_and_its_module_on_the_other(two_ranks: Ranks, tmp_path: Path) -> None:
    """One rank would all-reduce alone: an error on both, not a hang."""
    first, second = two_ranks.run(watched_only, str(tmp_path), "inner on rank 0")
    assert first == second
    assert "the model differs between ranks: 'unrecognised: several ranks" in first
