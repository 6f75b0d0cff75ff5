"""Two runs side by side: what differs between them, and from which step on they go different ways."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import random
import time
from pathlib import Path

import pytest
from journals import WritingRank, healthy, identity, record, troubled, write_run
from playwright.sync_api import expect, sync_playwright

from gradmon.config import ClipConfig, Config
from gradmon.diagnose import compare
from gradmon.diagnose.gather import NoJournalsError
from gradmon.diagnose.story import read_story

#: What the browser says of a test that looks at its canvases more than once.
READING = "Canvas2D: Multiple readback"


def noisy(level, *, count=1000, sigma=0.05, seed=0):
    rng = random.Random(seed)
    return list(range(1, count + 1)), [level(step) + sigma * rng.gauss(0, 1) for step in range(1, count + 1)]


def falling(step: int) -> float:
    return 2 + 3 * math.exp(-step / 150)


def test_equal_series_never_part():
    found = compare.parting("loss", noisy(falling), noisy(falling))
    assert (found.shared_steps, found.first_difference, found.beyond_noise) == (1000, None, None)


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_seeds_differ_and_do_not_part(seed):
    found = compare.parting("loss", noisy(falling), noisy(falling, seed=seed))
    assert found.first_difference == 1
    assert found.beyond_noise is None


@pytest.mark.parametrize("other_seed", [False, True])
def test_a_run_that_leaves_is_seen_to_leave_at_its_step(other_seed):
    """From step 501 on it climbs by half of the noise with every step."""
    away = noisy(lambda step: falling(step) + max(0, step - 500) * 0.025, seed=9 if other_seed else 0)
    found = compare.parting("loss", noisy(falling), away)
    assert found.first_difference == (1 if other_seed else 501)
    assert (470 if other_seed else 501) < found.beyond_noise < 530


def test_a_lone_spike_is_no_parting():
    steps, values = noisy(falling)
    spiked = [value + 50 * (step == 400) for step, value in zip(steps, values, strict=True)]
    found = compare.parting("loss", (steps, values), (steps, spiked))
    assert (found.first_difference, found.beyond_noise) == (400, None)


def test_norms_part_by_ratios_and_nan_is_a_difference():
    steps, values = noisy(lambda step: 1e-6, sigma=1e-7)
    doubled = [value * (2 if step > 300 else 1) for step, value in zip(steps, values, strict=True)]
    doubled[99] = math.nan
    found = compare.parting("grad_norm", (steps, values), (steps, doubled), logs=True)
    assert found.first_difference == 100
    assert 300 < found.beyond_noise < 310


def test_runs_without_common_steps_have_nothing_to_part(tmp_path):
    write_run(tmp_path / "a", healthy(), steps=20)
    write_run(tmp_path / "b", healthy(), steps=20, first=100)
    both = compare.compare(read_story(tmp_path / "a"), read_story(tmp_path / "b"))
    assert both.partings == ()
    assert "There is no step that both have" in compare.comparison_text(both)


def other_rate(directory: Path) -> None:
    """The same start, then other norms and a loss that stays up, under other settings."""
    usual = healthy()
    config = dataclasses.replace(Config(run="elsewhere"), clip=ClipConfig(max_norm=1.0)).to_dict()
    rank = WritingRank(directory, identity("lower-lr", script="train2.py"), config=config)
    for step in range(1, 501):
        one = usual(0, step)[0]
        if step > 200:
            more = 1 + min(1.0, (step - 200) / 40)
            one = dataclasses.replace(one, grad_norm=one.grad_norm * more, mean_loss=one.mean_loss * more, loss=None)
        rank.step(one)
    rank.end()


def command(directory: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([str(directory / "a"), str(directory / "b"), *more]))


def test_the_text_tells_settings_numbers_and_partings(tmp_path, capsys):
    write_run(tmp_path / "a", healthy(), steps=500)
    other_rate(tmp_path / "b")
    assert command(tmp_path, "--text") == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said[0] == "gpt-small lower-lr"
    assert "script train.py train2.py" in said
    assert "clip.max_norm None 1.0" in said
    assert not any(line.startswith("run ") for line in said)  # where it lies is no difference
    assert "steps 500 500" in said
    assert "spikes 0 0" in said
    losses = next(line for line in said if line.startswith("loss, last 50 steps")).split()[-2:]
    assert 1.9 < float(losses[1]) / float(losses[0]) < 2.1
    partings = [line for line in said if "bit-identical before step 201" in line]
    assert [line.split(":")[0] for line in partings] == ["Loss", "Gradient norm"]
    assert all("beyond noise from step 2" in line for line in partings)


def test_what_was_done_is_counted_and_the_smaller_one_named(tmp_path):
    write_run(tmp_path / "a", troubled(), ranks=2, steps=540)
    write_run(tmp_path / "b", healthy(), ranks=2, steps=540)
    both = compare.compare(read_story(tmp_path / "a"), read_story(tmp_path / "b"))
    lines = {one.name: one for one in both.lines}
    assert lines["non-finite steps"].values == ("4", "0")
    assert lines["non-finite steps"].better == 1
    assert lines["skipped"].values == ("4", "0")
    assert lines["step time, median"].better is None
    assert both.settings == ()
    assert both.names == ("A: gpt-small/i1", "B: gpt-small/i1")


def test_a_directory_without_journals_is_said(tmp_path):
    write_run(tmp_path / "a", healthy(), steps=3)
    (tmp_path / "b").mkdir()
    with pytest.raises(NoJournalsError, match="b holds no journals"):
        command(tmp_path)


def test_two_short_runs_can_be_compared(tmp_path, capsys):
    for name, steps in (("a", 0), ("b", 2)):
        write_run(tmp_path / name, lambda _, step: (record(step), []), steps=steps)
    assert command(tmp_path, "--out", str(tmp_path / "out.html")) == 0
    assert "comparison: " in capsys.readouterr().out


def test_the_page_draws_both_and_asks_nobody(tmp_path, chromium):
    evil = "<img src=x onerror=alert(1)>"
    write_run(tmp_path / "a", healthy(), steps=500, device=evil)
    other_rate(tmp_path / "b")
    out = tmp_path / "compare.html"
    assert command(tmp_path, "--out", str(out)) == 0
    complaints: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright, contextlib.ExitStack() as stack:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(out.as_uri())
        expect(page.locator(".uplot")).to_have_count(5)
        expect(page.locator(".legend").first).to_contain_text("lower-lr")
        expect(page.locator("#settings")).to_contain_text(evil)
        assert page.locator("main img").count() == 0
        colours = """(name) => {
          const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
          const want = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
          const canvas = document.querySelector('.uplot canvas');
          const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          let n = 0;
          for (let i = 0; i < data.length; i += 4) if (want.every((w, k) => Math.abs(data[i + k] - w) < 30)) n += 1;
          return n;
        }"""
        deadline = time.monotonic() + 10
        while min(page.evaluate(colours, name) for name in ("--s0", "--s1")) < 100:
            assert time.monotonic() < deadline
        marks = page.evaluate("DATA.marks.map((mark) => mark.first)")
        assert marks
        assert all(200 < step < 240 for step in marks)
    assert [said for said in complaints if READING not in said] == []
    assert [url for url in asked if not url.startswith("data:")] == [out.as_uri()]
