"""The report: a page of its own in a real browser, that asks nobody; and a text. Bounded, and escaped."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import time
from pathlib import Path

import pytest
from browsing import DESKTOP, PAINT, PHONE
from journals import (
    PARAMETERS,
    WritingRank,
    detail,
    event,
    healthy,
    identity,
    kill_in_mid_write,
    nonfinite,
    profile,
    record,
    spike,
    troubled,
    write_run,
)
from playwright.sync_api import Page, expect

from gradmon.diagnose import markup, report
from gradmon.diagnose.advice import advise
from gradmon.diagnose.story import read_story

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"
MIB = 1 << 20
#: What the browser says of a test that looks at its canvases more than once.
READING = "Canvas2D: Multiple readback"


@pytest.fixture
def browse(browser):
    """Opens a file; at the end none may have complained, and none may have asked for anything but itself."""
    complaints: list[str] = []
    asked: list[str] = []
    opened: list[str] = []
    with contextlib.ExitStack() as contexts:

        def open_file(path: Path, *, size=DESKTOP, scheme="light", scale=1) -> Page:
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=scale
            )
            contexts.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: asked.append(request.url))
            opened.append(path.as_uri())
            page.goto(path.as_uri())
            return page

        yield open_file
    assert [said for said in complaints if READING not in said] == []
    assert [url for url in asked if not url.startswith("data:")] == opened


def make(directory: Path, *more: str) -> tuple[int, Path]:
    """Run the command as the command line does."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    out = directory / "report.html"
    return report.run(parser.parse_args([str(directory), "--out", str(out), *more])), out


def drawn(page: Page, charts: int) -> None:
    expect(page.locator(".uplot")).to_have_count(charts)
    deadline = time.monotonic() + 10
    while min(page.evaluate(PAINT)) < 100:
        assert time.monotonic() < deadline, page.evaluate(PAINT)
        time.sleep(0.05)


def showcase(directory: Path) -> Path:
    """A run worth looking at: see `troubled`, with findings, a bundle and a setting of its own."""
    write_run(directory, troubled(), ranks=2, of=3, steps=800)
    rank = WritingRank(directory, identity(rank=2, world_size=3))
    usual = healthy(noise_of_rank=2)
    for step in range(1, 801):
        one, _ = usual(2, step)
        rank.step(one)
        if step == 420:
            said = "labels: class 7 is 41 times as frequent as class 2 (612 labels seen)"
            rank.tell(event(one, said, kind="class_imbalance", action="none", parameter="labels"))
    rank.end("exception", "ValueError: expected 1024 tokens, got 1023 in data/shard-0007.bin")
    (directory / "gpt-small/i1/0/rank-00001-step-0000120.bundle").touch()
    return directory


@pytest.mark.parametrize(
    ("name", "size", "scheme", "scale"),
    [("", DESKTOP, "light", 1), ("-dark", DESKTOP, "dark", 1), ("-phone", PHONE, "light", 2)],
)
def test_it_shows_a_run(tmp_path, browse, name, size, scheme, scale):
    code, out = make(showcase(tmp_path))
    assert code == 0
    page = browse(out, size=size, scheme=scheme, scale=scale)
    drawn(page, 6)
    expect(page.locator("#name")).to_have_text("gpt-small")
    expect(page.locator("#verdict")).to_contain_text("gradients broke first at step 120 on rank 1")
    expect(page.locator("#first")).to_contain_text("blocks.2.mlp.up.weight")
    expect(page.locator("#bundles code").first).to_contain_text("gradmon replay")
    expect(page.locator("#timeline tbody tr")).to_have_count(8)
    expect(page.locator("#findings")).to_contain_text("class 7 is 41 times as frequent")
    expect(page.locator("#ranks tbody tr")).to_have_count(3)
    expect(page.locator("#advice article")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (scheme == "dark")
    if name == "":
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "report.png", full_page=True)


def test_one_can_zoom_and_point(tmp_path, browse):
    _, out = make(showcase(tmp_path))
    page = browse(out)
    drawn(page, 6)
    page.locator("#timeline button.step").first.click()
    ranges = "charts.map((c) => [Math.round(c.u.scales.x.min), Math.round(c.u.scales.x.max)])"
    assert page.evaluate(ranges) == [[60, 180]] * 6
    page.locator("#charts .u-over").first.scroll_into_view_if_needed()
    box = page.locator(".u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    tip = page.locator(".tip:visible")
    expect(tip).to_have_count(1)
    expect(tip).to_contain_text("Step 120")
    expect(tip).to_contain_text("64 NaN and 0 Inf")
    expect(page.locator(".where").first).to_have_text("step 120")
    page.get_by_role("button", name="Reset zoom").click()
    assert page.evaluate(ranges) == [[1, 800]] * 6


@pytest.mark.parametrize("steps", [0, 3])
def test_a_short_run_is_shown(tmp_path, browse, steps):
    _, out = make(write_run(tmp_path, healthy(), steps=steps))
    page = browse(out)
    expect(page.locator("#timeline")).to_contain_text("Nothing has happened")
    expect(page.locator(".uplot")).to_have_count(6 if steps else 0)
    expect(page.locator("#advice")).to_contain_text("No rule of the table matches this run.")


def test_many_ranks_are_a_band_and_few_lines(tmp_path, browse):
    def script(rank, step):
        if step == 90:
            broken = nonfinite(step, rank=41, here=rank == 41)
            return broken, [event(broken)]
        return healthy(rank)(rank, step) if rank == 0 else (record(step, local_grad_norm=1 + rank / 64), [])

    _, out = make(write_run(tmp_path, script, ranks=64, steps=120, details=False))
    assert out.stat().st_size < MIB
    page = browse(out)
    drawn(page, 6)
    labels = page.evaluate("DATA.charts[1].lines.map((line) => line.label)")
    assert labels[0] == "median"
    assert "rank 41" in labels
    assert len(labels) == 5
    expect(page.locator("#ranks tbody tr")).to_have_count(64)
    expect(page.locator("#ranks tbody tr").first).to_contain_text("41")


EVIL = "</script><img src=x onerror=alert(1)>{{main}}{{data}}\x1b[31m\u202eevil"


def test_what_a_script_names_is_text_and_nothing_else(tmp_path, browse, capsys):
    rank = WritingRank(
        tmp_path,
        identity(script=EVIL, device=EVIL, host=EVIL, topology=EVIL, version=EVIL),
        parameters=[EVIL, *PARAMETERS[1:]],
        config={"preset": EVIL, "clip": {"max_norm": EVIL}},
    )
    broken = nonfinite(2, rank=0, here=True, parameter=EVIL)
    rank.step(record(1))
    rank.step(
        broken, event(broken, EVIL), event(broken, EVIL, kind=EVIL, action=EVIL), details=[detail(2, profile(1.0))]
    )
    rank.step(record(3))
    rank.end("exception", EVIL)
    rank.path.with_name("rank-00000-step-0000002.bundle").touch()
    _, out = make(tmp_path)
    assert "\x1b" not in capsys.readouterr().out
    page = browse(out)  # it fails if something is loaded, alerted or complained about
    expect(page.locator("#timeline")).to_contain_text("onerror=alert(1)")
    expect(page.locator("#findings")).to_contain_text("onerror=alert(1)")
    expect(page.locator("#ranks")).to_contain_text("{{main}}")
    assert page.locator("main img").count() == 0
    assert page.locator("body > script").count() == 3
    page.wait_for_timeout(200)


def test_the_browser_would_stop_what_slipped_through(tmp_path, browser):
    """The page's own policy: an image from elsewhere, or a script that is not ours, is refused."""
    write_run(tmp_path, healthy(), steps=3)
    story = read_story(tmp_path)
    whole = report.report_html(story, advise(story))
    leaky = tmp_path / "leaky.html"
    leaky.write_text(whole.replace("</main>", '<img src="http://127.0.0.1:9/x.png" onerror="window.hit=1"></main>'))
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(leaky.as_uri())
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_json_is_safe_inside_a_script():
    said = markup.to_json({"a": [math.nan, math.inf, 1.0, 0.1234567, "</script>\u2028&"], "b": None})
    assert not re.search("[<>&\u2028]", said)
    assert json.loads(said) == {"a": [None, None, 1, 0.12346, "</script>\u2028&"], "b": None}


def test_a_long_run_stays_small(tmp_path):
    """Thousands of steps and incidents: what grows with them is thinned, and the peaks are there."""

    def script(rank, step):
        if step % 7 == 0:
            one = spike(step, grad_norm=9999.0 if step == 7_007 else 30.0, rank=step % 4)
            return one, [event(one)]
        return record(step, grad_norm=1 + (step * 7919 % 101) / 300, loss=2 + step % 13 / 40), []

    write_run(tmp_path, script, ranks=2, steps=12_000)
    _, out = make(tmp_path)
    assert out.stat().st_size < 0.5 * MIB
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text())[1])
    norm = data["charts"][0]
    assert len(norm["x"]) <= 480
    assert {one["label"]: max(v for v in one["values"] if v) for one in norm["lines"]} == {
        "spike limit": 4,
        "highest": 9999,
        "applied, highest": 1,
        "norm, median": pytest.approx(1.2, abs=0.1),
    }
    assert len(data["marks"]) <= 16


def test_the_text_is_short_and_says_what_the_page_says(tmp_path, capsys):
    assert make(showcase(tmp_path), "--text") == (0, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    said = capsys.readouterr().out
    assert "gradients broke first at step 120 on rank 1" in " ".join(said.split())
    assert "gradmon replay" in said
    assert "one bad rank" in said
    assert "rank 2: exception ValueError: expected 1024 tokens" in said
    assert max(map(len, said.splitlines())) <= 100 + len(str(tmp_path))
    assert len(said.splitlines()) < 60


def test_a_killed_rank_and_a_damaged_journal_are_said(tmp_path, capsys):
    kill_in_mid_write(tmp_path, after=100, rank=0, world_size=3)
    WritingRank(tmp_path, identity(rank=1, world_size=3)).end()
    path = tmp_path / "gpt-small/i1/0/rank-00001.db"
    path.write_bytes(path.read_bytes()[:5000])
    code, out = make(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert f"{path} could not be read: cut off or damaged" in said
    assert "Of ranks 1 and 2 no journal was read" in said
    assert "ended without a word (killed?)" in said
    assert "killed: rank 0 on node-a ended after step" in said
    assert "crashed" in out.read_text()


def test_where_it_can_not_write_it_says_so(tmp_path):
    write_run(tmp_path, healthy(), steps=3)
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    with pytest.raises(ValueError, match=r"--out .* can't be written \(No such file or directory\); name a file"):
        report.run(parser.parse_args([str(tmp_path), "--out", str(tmp_path / "no/where.html")]))
