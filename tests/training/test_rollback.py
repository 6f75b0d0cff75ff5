"""From a run that has gone wrong back to healthy weights, on all ranks together; and never without need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
import toy
from ladder import Job, Outcome, assert_equal_ranks, loss_of, train
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel

import gradmon

ROLLBACK = {"rollback": {"every_steps": 10}, "replicas": {"check_every": 1}, "clip": {"skip_next": 0}}
WRECK = 70


def rolled_back(outcome: Outcome) -> list[int]:
    return [step for step, action in outcome.actions.items() if action == "rollback"]


def check_rollback(outcomes: list[Outcome]) -> None:
    assert_equal_ranks(outcomes)
    first = outcomes[0]
    (step,) = rolled_back(first)
    assert WRECK + 1 < step <= WRECK + 40
    record = next(r for _, r in first.journal.steps if r.step == step)
    assert (record.reason, record.applied, record.grad_norm_applied) == ("diverging", True, 0.0)
    (event,) = [e for _, e in first.journal.events if e.action == "rollback"]
    back_to = int(event.message.split("weights of step ")[1].split(",")[0])
    assert WRECK - 40 < back_to <= WRECK, "the oldest of three, ten steps apart"
    assert toy.equal(first.copies[step], first.copies[back_to]), "bit for bit, and the step itself is skipped"
    assert not toy.equal(first.copies[step - 1], first.copies[back_to])
    after = [r for _, r in first.journal.steps if r.step > step]
    assert 0.05 <= after[0].learning_rate_scale <= 0.3
    losses = {r.step: r.mean_loss for _, r in first.journal.steps if r.mean_loss is not None}
    assert max(losses[s] for s in range(WRECK + 2, step)) > 1.5 * losses[WRECK], "it had gone wrong"
    assert losses[after[5].step] < 1.1 * losses[back_to]
    assert first.healthy[back_to]
    assert not first.healthy[step - 2], "the steps before the rollback were known to be bad"
    assert first.healthy[step + 5]


@pytest.mark.parametrize("optimizer", ["fused_adamw", "adamw", "sgd"])
def test_rolls_back_in_one_process(tmp_path: Path, optimizer: str) -> None:
    check_rollback([train(Job(str(tmp_path), "single", 120, optimizer, ROLLBACK, wreck=WRECK))])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rolls_back_on_two_ranks_together(two_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    check_rollback(two_ranks.run(train, Job(str(tmp_path), kind, 120, "adamw", ROLLBACK, wreck=WRECK)))


def test_rolls_back_on_four_ranks_together(four_ranks: Ranks, tmp_path: Path) -> None:
    check_rollback(four_ranks.run(train, Job(str(tmp_path), "ddp", 120, "adamw", ROLLBACK, wreck=WRECK)))


def test_without_rollback_the_same_run_is_lost(tmp_path: Path) -> None:
    outcome = train(Job(str(tmp_path), "single", 120, "adamw", {"clip": {"skip_next": 0}}, wreck=WRECK))
    losses = [r.mean_loss for _, r in outcome.journal.steps if r.mean_loss is not None]
    assert losses[-1] > 1.5 * losses[WRECK - 1]
    assert rolled_back(outcome) == []
    assert outcome.healthy[-1] is False


def test_in_observe_mode_it_is_said_and_nothing_is_done(tmp_path: Path) -> None:
    config = {**ROLLBACK, "mode": "observe"}
    outcome = train(Job(str(tmp_path), "single", 120, "adamw", config, wreck=WRECK))
    told = [e for e in outcome.events if e[2] == "rollback"]
    assert told
    assert not any(applied for *_, applied in told)
    assert rolled_back(outcome) == []
    plain = train(Job(str(tmp_path), "single", 120, "adamw", {"mode": "observe"}, wreck=WRECK))
    assert toy.equal(outcome.parameters, plain.parameters)


def test_a_level_shift_with_a_falling_loss_never_rolls_back_or_stops(tmp_path: Path) -> None:
    job = Job(str(tmp_path), "single", 200, "adamw", ROLLBACK, level_shift=(100, 12.0))
    outcome = train(job)
    norms = {r.step: r.grad_norm for _, r in outcome.journal.steps}
    assert norms[101] > 4 * norms[99], "the shift is there"
    assert outcome.stopped is None
    assert rolled_back(outcome) == []
    assert any(e[1] == "drift" for e in outcome.events), "it is told"
    assert all(outcome.healthy[150:])


def test_nothing_to_roll_back_to_is_said_once_in_a_while(tmp_path: Path) -> None:
    config = {"rollback": {"every_steps": 500}, "clip": {"skip_next": 0}}
    outcome = train(Job(str(tmp_path), "single", 120, "adamw", config, wreck=WRECK))
    told = [e for _, e in outcome.journal.events if e.kind == "diverging"]
    assert told
    assert len(told) <= 3
    assert "no snapshot to roll back to" in told[0].message
    assert rolled_back(outcome) == []


def test_without_a_loss_it_is_said_that_rollback_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="gradmon"):
        outcome = train(Job(str(tmp_path), "single", 120, "adamw", ROLLBACK, wreck=WRECK, observe=False))
    assert rolled_back(outcome) == []
    said = [r.message for r in caplog.records if "rollback has no effect without a loss above 0" in r.message]
    assert len(said) == 1


def test_the_cost_is_said_up_front(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gradmon"):
        outcome = train(Job(str(tmp_path), "single", 60, "adamw", ROLLBACK))
    numbers = sum(p.numel() for p in outcome.parameters)
    assert any("GiB of host memory per rank" in r.message for r in caplog.records)
    held = outcome.journal.samples["snapshot_memory_bytes"]
    assert 0 <= held <= 3 * 2 * (3 * 4 * numbers + 16 * 64)


def replace_weights(directory: str) -> list[Any]:
    """What is registered comes back too, and scheduler and random numbers go on."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = {"dir": directory, "agent": {"start": "off"}, **ROLLBACK}
    monitor = gradmon.attach(model, optimizer, config=config)
    monitor.register(average=average)
    averages, rates, draws = {}, [], []
    for step in range(1, 121):
        draws.append(float(torch.rand(())))
        optimizer.zero_grad()
        loss = (model(torch.randn(64, 4)) - 1).square().mean() + 0.5
        loss.backward()
        monitor.observe(loss=loss)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        averages[step] = [p.detach().clone() for p in average.parameters()]
        rates.append(optimizer.param_groups[0]["lr"])
        if step == WRECK:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(40.0)
    monitor.detach()
    assert monitor.journal_path is not None
    return [averages, rates, draws, gradmon.journal.read_journal(monitor.journal_path)]


def test_what_is_registered_comes_back_and_the_rest_goes_on(tmp_path: Path) -> None:
    averages, rates, draws, journal = replace_weights(str(tmp_path))
    (event,) = [e for _, e in journal.events if e.action == "rollback"]
    (step,) = [r.step for _, r in journal.steps if r.action == "rollback"]
    back_to = int(event.message.split("weights of step ")[1].split(",")[0])
    before, now = averages[step - 1], averages[step]
    assert max(float(b.abs().max()) for b in before) > 3
    # the step's own update of the average came after the rollback: 0.9 of the restored one, 0.1 of the restored weights
    assert max(float(n.abs().max()) for n in now) < 2
    assert all(torch.allclose(n, a, atol=0.3) for n, a in zip(now[:2], averages[back_to][:2], strict=True))
    assert rates == pytest.approx([1e-2 / (1 + s) for s in range(1, 121)], rel=1e-12), "the scheduler never saw it"
    assert len(set(draws)) == 120, "random numbers were not drawn twice"


def test_registering_without_rollback_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"dir": str(tmp_path), "agent": {"start": "off"}}
    with caplog.at_level("WARNING", logger="gradmon"), gradmon.attach(model, optimizer, config=config) as monitor:
        monitor.register(average=model)
    assert any("monitor.register has no effect" in r.message for r in caplog.records)


def test_the_marker_file_follows(tmp_path: Path) -> None:
    marker = tmp_path / "health.json"
    job = Job(str(tmp_path), "single", 60, "adamw", {"health_file": str(marker), "mode": "observe"}, nan=((0, 60),))
    outcome = train(job)
    said = json.loads(marker.read_text())
    assert said["healthy"] is outcome.healthy[-1] is False
    assert (said["step"], said["last_healthy_step"]) == (60, 59)
    assert "not finite" in said["why"]
    train(Job(str(tmp_path), "single", 20, "adamw", {"health_file": str(marker)}))
    assert json.loads(marker.read_text())["healthy"] is True


class Refusing:
    """A registered thing that raises where it is told to, on one rank."""

    def __init__(self, saves: tuple[int, ...] = (), loads: bool = False) -> None:
        self.asked, self.saves, self.loads = 0, saves, loads

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked in self.saves and dist.get_rank() == 1:
            raise RuntimeError("can't save")
        return {"asked": self.asked}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        if self.loads and dist.get_rank() == 1:
            raise RuntimeError("can't load")


def one_rank_fails(directory: str, what: str) -> dict[str, Any]:
    """Rank 1 can't do what a rollback needs of it."""
    torch.manual_seed(0)
    inner = sharded.build()
    inner.register_buffer("cache", torch.zeros(3))
    model = DistributedDataParallel(inner, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = {"dir": directory, "agent": {"start": "off"}, **ROLLBACK}
    monitor = gradmon.attach(model, optimizer, config=config)
    monitor.register(thing=Refusing(saves=(5,) if what == "save" else (), loads=what == "load"))
    stopped = ""
    try:
        for step in range(1, 121):
            optimizer.zero_grad()
            seen, loss = loss_of(model, Job(directory), step)
            loss.backward()
            monitor.observe(loss=seen)
            optimizer.step()
            if step == WRECK:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(40.0)
            if what == "shape" and step == 60 and dist.get_rank() == 1:
                inner.cache = torch.zeros(5)
    except gradmon.TrainingStopped as error:
        stopped = str(error)
    monitor.detach()
    assert monitor.journal_path is not None
    view = gradmon.journal.read_journal(monitor.journal_path)
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "actions": [(r.step, r.action) for _, r in view.steps if r.action == "rollback"],
        "events": [e.message for _, e in view.events if e.kind == "diverging"],
        "errors": {labels[0]: n for (name, labels), n in view.counters.items() if name == "gradmon_errors_total" and n},
        "applied": all(r.applied for _, r in view.steps[1:]),
        "stopped": stopped,
    }


def test_a_snapshot_that_fails_on_one_rank_costs_that_snapshot_only(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(one_rank_fails, str(tmp_path), "save")
    assert (first["errors"], second["errors"]) == ({}, {"snapshot": 1})
    assert first["applied"] and second["applied"], "the guard stands"
    assert first["actions"] == second["actions"] != []
    assert toy.equal(first["parameters"], second["parameters"])


def test_what_does_not_fit_on_one_rank_any_more_is_rolled_back_on_none(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(one_rank_fails, str(tmp_path), "shape")
    assert first["actions"] == second["actions"]
    assert first["events"] == second["events"]
    assert (first["stopped"], first["errors"]) == (second["stopped"], second["errors"]) == ("", {})
    assert toy.equal(first["parameters"], second["parameters"])


def test_a_rollback_that_fails_on_one_rank_stops_all(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(one_rank_fails, str(tmp_path), "load")
    assert "a rollback failed on another rank" in first["stopped"]
    assert "a rollback failed: can't load" in second["stopped"]


def test_parameters_added_later_come_back_too(tmp_path: Path) -> None:
    """Progressive unfreezing: a rollback that left them wrecked would be in vain."""
    torch.manual_seed(0)
    model = sharded.build()
    parts = list(model.parameters())
    optimizer = torch.optim.AdamW(parts[-2:], lr=3e-3)
    config = {"dir": str(tmp_path), "agent": {"start": "off"}, **ROLLBACK}
    copies = {}
    with gradmon.attach(model, optimizer, config=config) as monitor:
        for step in range(1, 121):
            if step == 20:
                optimizer.add_param_group({"params": parts[:-2]})
            optimizer.zero_grad()
            seen, loss = loss_of(model, Job(str(tmp_path)), step)
            loss.backward()
            monitor.observe(loss=seen)
            optimizer.step()
            copies[step] = [p.detach().clone() for p in parts]
            if step == WRECK:
                with torch.no_grad():
                    for parameter in parts:
                        parameter.mul_(40.0)
    assert monitor.journal_path is not None
    view = gradmon.journal.read_journal(monitor.journal_path)
    (event,) = [e for _, e in view.events if e.action == "rollback"]
    (step,) = [r.step for _, r in view.steps if r.action == "rollback"]
    assert toy.equal(copies[step], copies[int(event.message.split("weights of step ")[1].split(",")[0])])


def test_smooth_training_to_a_tiny_loss_is_left_alone(tmp_path: Path) -> None:
    """On all data Adam's norm and a loss near 0 bounce by multiples; nothing is lost."""
    torch.manual_seed(0)
    inputs = torch.randn(64, toy.FEATURES)
    targets = torch.tanh(inputs.sum(1, keepdim=True) * 0.2)

    def run(attach: bool) -> tuple[list[torch.Tensor], list[float], list[str]]:
        model = toy.build()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        config = {"dir": str(tmp_path), "agent": {"start": "off"}, "rollback": {"every_steps": 20}}
        monitor = gradmon.attach(model, optimizer, config=config) if attach else None
        losses, unfit = [], []
        for _ in range(1200):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            if monitor is not None:
                monitor.observe(loss=loss)
            optimizer.step()
            if monitor is not None and not monitor.is_healthy():
                unfit.append(monitor._guard.why_unfit)
        if monitor is not None:
            monitor.detach()
            assert monitor.journal_path is not None
            view = gradmon.journal.read_journal(monitor.journal_path)
            assert not [e for _, e in view.events if e.action in ("rollback", "stop")]
        return [p.detach().clone() for p in model.parameters()], losses, unfit

    parameters, losses, unfit = run(attach=True)
    lowest = min(losses)
    assert max(losses[losses.index(lowest) :]) > 2 * lowest or max(losses[600:]) > 2 * min(losses[:600])
    assert len([why for why in unfit if "loss" in why]) == 0
    assert len(parameters) == 8


def test_no_reference_from_before_a_rebaseline_comes_back(tmp_path: Path) -> None:
    """The loss has another level since: a rollback must not bring the old best along."""
    torch.manual_seed(0)
    model = sharded.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = {"dir": str(tmp_path), "agent": {"start": "off"}, **ROLLBACK}
    with gradmon.attach(model, optimizer, config=config) as monitor:
        for step in range(1, 161):
            optimizer.zero_grad()
            seen, loss = loss_of(model, Job(str(tmp_path)), step)
            loss.backward()
            monitor.observe(loss=seen + (5.0 if step > 60 else 0.0))
            optimizer.step()
            if step == 60:
                monitor.rebaseline()
            if step == 80:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(400.0)
        assert monitor.is_healthy()
    assert monitor.journal_path is not None
    view = gradmon.journal.read_journal(monitor.journal_path)
    (event,) = [e for _, e in view.events if e.action == "rollback"]
    back_to = int(event.message.split("weights of step ")[1].split(",")[0])
    assert back_to < 60, "to a snapshot from before the rebaseline"
