"""What a newcomer read in reports, and was led astray by: each test is a sentence that was wrong, or missing."""

from __future__ import annotations

import dataclasses
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from journals import WritingRank, detail, event, identity, nonfinite, profile, record, row, spike

import gradmon
from gradmon.cli import main
from gradmon.config import load
from gradmon.diagnose.advice import RULES, advise
from gradmon.diagnose.report import report_html, report_text
from gradmon.diagnose.story import Story, read_story
from gradmon.diagnose.telling import factory_of, verdict
from gradmon.policy import Policy, Trend
from gradmon.record import StepRecord

pytestmark = pytest.mark.usefixtures("one_thread")
BUNDLE = "gpt-small/i1/0/rank-00000-step-0000040.bundle"


def write(
    directory: Path,
    instead: Mapping[int, StepRecord] = MappingProxyType({}),
    *,
    ranks: int = 1,
    steps: int = 189,
    end: tuple[str, str] = ("finished", ""),
    told: Sequence[tuple[int, str, str, str]] = (),
    **who: object,
) -> Path:
    """A healthy run with some steps `instead` of its own; each of `told` is (step, kind, action, message)."""
    for number in range(ranks):
        rank = WritingRank(directory, identity(rank=number, world_size=ranks, **who))
        for step in range(1, steps + 1):
            one = instead.get(step) or record(step, loss=2 + 5 / step)
            events = [] if one.healthy else [event(one)]
            events += [event(one, said, kind=kind, action=act) for at, kind, act, said in told if at == step]
            rank.step(one, *events)
        rank.end(*end)
    return directory


def on_all_ranks(*steps: int) -> dict[int, StepRecord]:
    """As a bug in the code breaks a step: alike everywhere, so that no rank is to blame."""
    return {step: nonfinite(step, rank=None, here=True, parameter="2.bias") for step in steps}


def spikes(*steps: int) -> dict[int, StepRecord]:
    return {step: spike(step) for step in steps}


def evidence(story: Story) -> dict[str, str]:
    return {one.rule: one.evidence for one in advise(story)}


def text_of(story: Story) -> str:
    return " ".join(report_text(story, advise(story)).split())


# --- all ranks at once ------------------------------------------------------------------------------------------------


def test_steps_that_broke_on_all_ranks_are_the_code_s_and_no_explosion(tmp_path: Path) -> None:
    story = read_story(write(tmp_path, on_all_ranks(40, 80, 146), ranks=2))
    assert [one.rank for one in story.incidents] == [None] * 3
    assert evidence(story) == {
        "NaN from one batch": "3 steps not finite (step 40, 80, 146 on all ranks, 2.bias), healthy steps after them;"
        " all ranks broke at once: more likely the code than the data"
    }
    assert "gradients broke first at step 40 on all ranks, 2.bias (NaN), before 2 more" in verdict(story).text


def test_where_no_rank_was_seen_to_break_all_are_not_said_to_have(tmp_path: Path) -> None:
    """Finite gradients whose average overflows."""
    story = read_story(write(tmp_path, {40: nonfinite(40, rank=None, here=False, parameter=None)}, ranks=2))
    assert evidence(story) == {"NaN from one batch": "1 step not finite (step 40), healthy steps after them"}


def test_a_last_step_that_broke_has_no_healthy_ones_after_it(tmp_path: Path) -> None:
    said = evidence(read_story(write(tmp_path, on_all_ranks(60), ranks=2, steps=60)))
    assert "healthy steps after" not in said["NaN from one batch"]


@pytest.mark.parametrize(("steps", "told"), [(300, False), (500, True)])
def test_spikes_are_early_only_in_a_run_that_goes_on(tmp_path: Path, steps: int, told: bool) -> None:
    story = read_story(write(tmp_path, spikes(12, 20, 31), steps=steps))
    assert [one.reason for one in story.incidents] == ["spike"] * 3
    assert ("explodes early" in evidence(story)) is told


def test_nan_is_not_counted_among_early_spikes(tmp_path: Path) -> None:
    story = read_story(write(tmp_path, spikes(12, 20) | {31: nonfinite(31, rank=0, here=True)}, steps=500))
    assert len(story.incidents) == 3
    assert "explodes early" not in evidence(story)


# --- newest measurements ----------------------------------------------------------------------------------------------


def with_details(directory: Path, last: list[list[float]]) -> Story:
    rank = WritingRank(directory, identity())
    broken = [row(math.nan, nan_count=4096.0) for _ in profile(1.0)]
    for step in range(1, 201):
        one = nonfinite(146, rank=0, here=True) if step == 146 else record(step)
        details = {100: profile(1.0), 146: broken, 200: last}.get(step)
        rank.step(one, details=[] if details is None else [detail(step, details)])
    rank.end()
    return read_story(directory)


def test_a_healed_run_is_not_red_and_the_worst_step_is_named(tmp_path: Path) -> None:
    story = with_details(tmp_path, profile(0.245))
    assert {one.nonfinite_elements for one in (*story.parameters, *story.layers)} == {0}
    assert {one.worst.step for one in (*story.parameters, *story.layers)} == {146}
    page = report_html(story, [])
    tables = page[page.index('id="layers"') : page.index('id="actions"')]
    assert "at worst 4,096 (step 146)" in tables
    assert 'class="hot"' not in tables
    assert '<i class="bad"' not in tables


def test_what_is_broken_at_the_end_is_red(tmp_path: Path) -> None:
    rows = profile(0.245)
    rows[3] = row(math.nan, nan_count=7.0)
    story = with_details(tmp_path, rows)
    assert [one.nonfinite_elements for one in story.parameters if one.nonfinite_elements] == [7]
    page = report_html(story, [])
    tables = page[page.index('id="layers"') : page.index('id="actions"')]
    assert tables.count('class="hot"') == tables.count('<i class="bad"') == 1


# --- gradmon's own stop -----------------------------------------------------------------------------------------------


def train_into_nan(directory: Path) -> None:
    """A real training of one process, whose loss is NaN from its second step on, until gradmon ends it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"dir": str(directory), "run": "toy", "agent": {"start": "off"}}
    with gradmon.attach(model, optimizer, config=config) as monitor:
        for step in range(1, 20):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 4)).square().mean() * (math.nan if step > 1 else 1.0)
            monitor.observe(loss=loss)
            loss.backward()
            optimizer.step()


def test_a_stop_is_told_once_and_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(gradmon.TrainingStopped):
        train_into_nan(tmp_path)
    story = read_story(tmp_path)
    assert story.state == "exception"
    said = text_of(story)
    assert (
        "Training ran 11 steps on 1 rank; gradmon stopped it at step 11, after 10 non-finite steps from step 2 on"
        " (2.bias); gradmon skipped 10 steps. What happened" in said
    )
    assert "all ranks" not in said
    assert "gradmon stopped training" not in said
    assert said.count("10 steps in a row were not finite") == 1
    assert "broken for good" in evidence(story)
    assert "exception" not in evidence(story)
    page = report_html(story, advise(story))
    assert "gradmon stopped training" not in page
    assert page.count("in a row were not finite") == 2, "in the timeline and as a mark on the charts"
    assert ">stopped</span>" in page
    assert ">failed</span>" not in page


STOP = "10 steps in a row were not finite, 2.bias: the weights no longer move: stopping all ranks"


def stopped(directory: Path, *, ranks: int = 2, before: tuple[int, ...] = ()) -> Story:
    bad = (*before, *range(22, 32))
    end = ("exception", f"gradmon stopped training at step 31: {STOP}")
    told = [(31, "skip_streak", "stop", STOP)]
    return read_story(write(directory, on_all_ranks(*bad), ranks=ranks, steps=31, end=end, told=told))


def test_a_stop_of_several_ranks(tmp_path: Path) -> None:
    assert verdict(stopped(tmp_path)).text.startswith(
        "Training ran 31 steps on 2 ranks; gradmon stopped all ranks at step 31, after 10 non-finite steps from step 22"
        " on (2.bias); gradmon skipped 10 steps"
    )


def test_what_broke_before_the_stop_s_own_steps_is_still_told(tmp_path: Path) -> None:
    said = verdict(stopped(tmp_path, before=(9,))).text
    assert (
        "from step 22 on (2.bias); gradients broke first at step 9 on all ranks, 2.bias (NaN), before 10 more" in said
    )


def test_any_other_exception_is_told_as_before(tmp_path: Path) -> None:
    story = read_story(write(tmp_path, end=("exception", "ValueError: gradmon stopped training, he said")))
    assert "ended with ValueError" in verdict(story).text
    assert "exception" in evidence(story)


def test_spikes_before_the_first_nan_do_not_contradict_the_tile(tmp_path: Path) -> None:
    story = read_story(write(tmp_path, spikes(75, 76) | {135: nonfinite(135, rank=1, here=False)}, ranks=2))
    assert "gradients spiked from step 75 (2 spikes), not finite from step 135 on rank 1" in verdict(story).text
    assert "first at step 75" in report_html(story, [])


# --- one bad rank -----------------------------------------------------------------------------------------------------


def test_bad_data_comes_before_the_hardware() -> None:
    rule = next(rule for rule in RULES if rule.name == "one bad rank")
    assert "data" in rule.causes[0]
    assert "GPU" in rule.causes[-1]
    first, data, hardware, *_ = rule.cures
    assert "unclear says nothing (the loss was not in the bundle)" in first
    assert "not reproduced with the step's own weights (`incident.weights: true`) points to hardware" in first
    assert "shard of the data" in data
    assert hardware.startswith("only after more than a handful of such steps")
    assert "another machine" not in " ".join(rule.cures)


def test_a_rank_left_out_has_bad_data_before_a_broken_gpu() -> None:
    policy = Policy(load({"leave_out": {"bad_rank": True, "report_after": 1}}, {}).config, 4)
    (said,) = [e.message for e in policy.update(record(1), Trend(), left_out=[2]) if e.kind == "left_out_streak"]
    assert said.index("bad data") < said.index("broken GPU")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "directory", "factory"),
    [
        ("train.py", "", "train:FACTORY"),
        ("/home/me/my project/train-gpt.py", "/home/me/my project", "train-gpt:FACTORY"),
        ("lab.train", "", "lab.train:FACTORY"),
        ("gradmon.demo.train", "", "gradmon.demo.train:Model"),
        ("/usr/lib/python3/ipykernel_launcher.py", "", "MODULE:FACTORY"),
        ("-c", "", "MODULE:FACTORY"),
        ("python", "", "MODULE:FACTORY"),
        ("a; rm -rf b", "", "MODULE:FACTORY"),
    ],
)
def test_the_model_s_module_is_the_script_s(script: str, directory: str, factory: str) -> None:
    assert factory_of(script) == (directory, factory)


def test_the_command_is_ready_and_stands_there_once(tmp_path: Path) -> None:
    write(tmp_path, {40: nonfinite(40, rank=0, here=True)}, script="/home/me/my project/train.py")
    (tmp_path / BUNDLE).touch()
    story = dataclasses.replace(read_story(tmp_path), nonfinite_losses=1)
    assert set(evidence(story)) == {"NaN from one batch", "loss not finite"}, "two that say: replay it"
    command = f"cd '/home/me/my project' && gradmon replay {tmp_path / BUNDLE} --model train:FACTORY"
    hint = "FACTORY: the function or class in train.py that makes the model, called without arguments"
    page = html.unescape(report_html(story, advise(story)))
    for said in (text_of(story), page):
        assert said.count("gradmon replay") == said.count(command) == said.count(hint) == 1
        assert said.count("replay it (above)") == 2
        assert said.index(command) < said.index("replay it (above)")
    assert page.index('id="bundles"') < page.index('id="advice"') < page.index('id="charts"')


def test_the_demo_s_command_is_complete(tmp_path: Path) -> None:
    from gradmon.demo.train import Model

    write(tmp_path, on_all_ranks(40), script="gradmon.demo.train")
    (tmp_path / BUNDLE).touch()
    said = text_of(read_story(tmp_path))
    assert f"gradmon replay {tmp_path / BUNDLE} --model gradmon.demo.train:Model" in said
    assert "FACTORY" not in said
    assert Model()


def test_the_placeholder_is_the_same_everywhere() -> None:
    cures = [cure for rule in RULES for cure in rule.cures]
    assert not [cure for cure in cures if re.search("module:factory|FACTORY", cure.replace("MODULE:FACTORY", ""))]
    assert all("MODULE:FACTORY" in cure for cure in cures if re.search("gradmon (replay|doctor) ", cure.split(":")[0]))


# --- one process, and small matters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "end"), [(1, ": stopping"), (2, ": stopping all ranks")])
def test_all_ranks_are_stopped_only_where_there_are_several(world_size: int, end: str) -> None:
    for acts, told in ((True, end), (False, end.replace("stopping", "would have stopped"))):
        policy = Policy(load({}, {}).config, world_size)
        for step in range(1, 11):
            events = policy.update(nonfinite(step, rank=0, here=True), Trend(), acts=acts)
        assert events[-1].message.endswith(told)


@pytest.mark.parametrize(("wait", "step", "told"), [(0.0006, 0.006, False), (0.0104, 0.1, True), (0.004, 0.005, False)])
def test_a_wait_of_a_moment_is_not_worth_advice(tmp_path: Path, wait: float, step: float, told: bool) -> None:
    steps = {number: record(number, step_seconds=step, data_wait_seconds=wait) for number in range(1, 61)}
    story = read_story(write(tmp_path, steps, steps=60))
    assert story.ranks[0].data_wait_ratio >= 0.0999
    assert ("data wait" in evidence(story)) is told
    assert not told or evidence(story)["data wait"].endswith("10.4 % of a step, 10.4 ms")


# --- without DIR ------------------------------------------------------------------------------------------------------


def test_without_a_directory_it_looks_where_attach_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path))
    assert main(["report", "--text"]) == 2
    assert f"{tmp_path} holds no journals" in capsys.readouterr().err
    for name, started in (("middle", 2e9), ("newest", 3e9), ("a-first", 1e9)):
        write(tmp_path, steps=3, run=name, started_seconds=started)
    assert main(["report", "--text"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("newest (train.py")
    assert "Other runs lie here too (--run NAME): middle, a-first." in said


def test_the_help_names_the_places(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "[DIR]" in said
    assert "where attach() puts them: GRADMON_DIR" in said
    assert "/tmp/gradmon-UID" in said
