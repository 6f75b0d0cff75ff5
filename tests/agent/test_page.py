"""The live page in a real browser: it draws, follows, says what is wrong, and asks nobody but its agent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browsing import DESKTOP, PAINT, PHONE
from fake_journals import AgentProcess, FakeRank, event, identity, nonfinite, rank_process, record, simulate, until
from playwright.sync_api import Page, expect

ARTIFACTS = Path(__file__).resolve().parents[1] / "artifacts"


@pytest.fixture
def browse(browser):
    """Opens a page; at the end none of them may have complained or asked another host."""
    complaints: list[str] = []
    hosts: set[str] = set()
    expected: list[str] = []
    contexts = contextlib.ExitStack()

    def open_page(url: str, *, size=DESKTOP, scheme="light", scale=1, away=False, login=None) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            device_scale_factor=scale,
            http_credentials=login,  # what its user would type when asked
        )
        contexts.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(20_000)
        if not away:  # with its agent away, the browser itself writes to the console
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        expected.append(urlsplit(url).netloc)
        page.goto(url)
        return page

    open_page.close = contexts.close
    with contexts:
        yield open_page
    assert complaints == []
    assert hosts == set(expected)


@pytest.fixture
def serve(browse):
    """An agent; the pages that show it are closed before it ends, else one could ask it in between and complain."""

    @contextlib.contextmanager
    def serving(directory: Path, **options: str) -> Iterator[AgentProcess]:
        with AgentProcess(directory, **options) as agent:
            yield agent
            browse.close()

    return serving


@pytest.fixture
def run(tmp_path):
    """Two ranks, 400 steps: a NaN on rank 1, two spikes, a back-off."""
    ranks = [FakeRank(tmp_path, identity("nanochat-d12", rank=r, world_size=2, device="NVIDIA H100")) for r in (0, 1)]
    simulate(ranks, 1, 400)
    with AgentProcess(tmp_path) as agent:
        until(lambda: agent.json("/api/runs")["runs"])
        yield agent, ranks
    for rank in ranks:
        rank.end()


def drawn(page: Page) -> None:
    """Wait until all five charts are there and painted."""
    expect(page.locator(".uplot")).to_have_count(5)
    until(lambda: min(page.evaluate(PAINT)) > 300)


def shoot(page: Page, name: str) -> None:
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"page-{name}.png", full_page=True)


def point_at(page: Page, step: int, first: int, last: int, chart: int = 0) -> None:
    box = page.locator(".u-over").nth(chart).bounding_box()
    page.mouse.move(box["x"] + box["width"] * (step - first) / (last - first), box["y"] + box["height"] / 2)


def test_it_works_behind_a_password(tmp_path, browse, serve):
    rank = FakeRank(tmp_path, identity("guarded"))
    simulate([rank], 1, 100)
    logins = tmp_path / "logins"
    logins.write_text("ops:secret\n")
    logins.chmod(0o600)
    with serve(tmp_path, basic_auth_file=str(logins)) as agent:
        page = browse(agent.address, login={"username": "ops", "password": "secret"})
        drawn(page)
        expect(page.locator("#name")).to_have_text("guarded")
    rank.end()


@pytest.mark.parametrize(
    ("name", "size", "scheme", "scale"),
    [("light", DESKTOP, "light", 1), ("dark", DESKTOP, "dark", 1), ("phone", PHONE, "light", 2)],
)
def test_it_shows_a_run(run, browse, name, size, scheme, scale):
    agent, _ = run
    page = browse(agent.address, size=size, scheme=scheme, scale=scale)
    drawn(page)
    expect(page.locator("#name")).to_have_text("nanochat-d12")
    expect(page.locator("#state")).to_have_text("running")
    rows = page.locator("#events tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.first).to_contain_text("rate lowered")
    expect(rows.last).to_contain_text("64 NaN and 0 Inf gradient elements on rank 1, blocks.3.mlp.weight")
    expect(page.locator("#tiles")).to_contain_text("1 skipped · 2 rescaled · 1 backed off")
    expect(page.locator("#ranks tbody tr")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (scheme == "dark")
    shoot(page, name)


def test_an_unpainted_chart_would_be_found(tmp_path, browse, serve):
    rank = FakeRank(tmp_path, identity())
    with serve(tmp_path) as agent:
        page = browse(agent.address)
        expect(page.locator(".uplot")).to_have_count(5)
        page.wait_for_timeout(500)
        assert max(page.evaluate(PAINT)) < 300
        expect(page.locator("#headline")).to_have_text("attached, waiting for the first step")
        expect(page.locator("#charts")).to_contain_text("no values yet")
    rank.end()


def test_it_tells_what_happened_where_one_points(run, browse):
    agent, _ = run
    page = browse(agent.address)
    drawn(page)
    point_at(page, 150, 1, 400)
    tip = page.locator(".tip:visible")
    expect(tip).to_have_count(1)
    expect(tip).to_contain_text("Step 150: non-finite")
    expect(page.locator(".where").first).to_contain_text("step 150")
    shoot(page, "hover")
    point_at(page, 300, 1, 400, chart=2)  # the loss: its cursor moves those of the others
    expect(page.locator(".where").first).to_contain_text("step 300")
    expect(tip).to_have_count(0)


def test_it_follows_and_can_be_zoomed(run, browse):
    agent, ranks = run
    page = browse(agent.address)
    drawn(page)
    box = page.locator(".u-over").first.bounding_box()
    y = box["y"] + 80
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, y, steps=5)
    page.mouse.up()
    ranges = "state.charts.map((c) => [c.u.scales.x.min, c.u.scales.x.max])"
    for low, high in until(lambda: page.evaluate(ranges)):
        assert 195 < low < 205
        assert 295 < high < 305
    for rank in ranks:
        rank.step(*[record(i) for i in range(401, 421)])
    expect(page.locator("#tiles .value").first).to_have_text("420")
    assert page.evaluate(ranges)[0][1] < 305  # new steps do not undo the zoom
    page.get_by_role("button", name="Reset zoom").click()
    assert page.evaluate(ranges) == [[1, 420]] * 5
    page.get_by_role("button", name="150").click()
    assert page.evaluate(ranges) == [[90, 210]] * 5


def test_it_says_which_rank_is_silent(tmp_path, browse):
    with contextlib.ExitStack() as stack:
        rank = FakeRank(tmp_path, identity(rank=0, world_size=2)).step(record(1))
        process = stack.enter_context(rank_process(tmp_path, rank=1, world_size=2))
        agent = stack.enter_context(AgentProcess(tmp_path))
        page = browse(agent.address)
        expect(page.locator("#state")).to_have_text("running")
        process.kill()
        expect(page.locator("#state")).to_have_text("crashed")
        expect(page.locator("#headline")).to_contain_text("rank 1 is silent since")
        rank.end()


def test_it_goes_on_when_the_agent_comes_back(run, browse):
    agent, ranks = run
    port = urlsplit(agent.address).port
    page = browse(agent.address, away=True)
    drawn(page)
    agent.end()
    expect(page.locator("#banner")).to_be_visible()
    shoot(page, "banner")
    ranks[0].step(record(401))
    ranks[1].step(record(401))
    with AgentProcess(agent.directory, port=port):
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator("#tiles .value").first).to_have_text("401")
        assert page.evaluate("state.global.step.length") == 401


def test_without_a_run_it_says_how_to_attach(tmp_path, browse, serve):
    with serve(tmp_path) as agent:
        page = browse(agent.address)
        expect(page.locator("#empty")).to_contain_text("monitor = gradmon.attach(model, optimizer)")
        expect(page.locator("#directory")).to_contain_text(str(tmp_path))
        shoot(page, "empty")
        rank = FakeRank(tmp_path, identity()).step(record(1), record(2))
        expect(page.locator("#name")).to_have_text("demo")  # by itself
        expect(page.locator("#empty")).to_be_hidden()
        rank.end()


def test_several_runs_can_be_chosen_from(tmp_path, browse, serve):
    ranks = [FakeRank(tmp_path, identity(run)).step(record(1)) for run in ("first", "second~2")]
    with serve(tmp_path) as agent:
        page = browse(agent.address)
        expect(page.locator("#runs option")).to_have_count(2)
        for name in ("first", "second~2"):
            page.locator("#runs").select_option(name)
            expect(page.locator("#name")).to_have_text(name)
        assert page.url.endswith("#second~2")
        expect(browse(page.url).locator("#name")).to_have_text("second~2")
    for rank in ranks:
        rank.end()


def test_many_ranks_are_a_band_and_few_lines(tmp_path, browse, serve):
    ranks = [FakeRank(tmp_path, identity(rank=r, world_size=24)) for r in range(24)]
    simulate(ranks, 1, 120)
    broken = nonfinite(121, rank=17)
    for rank in ranks:
        rank.step(broken)
    with serve(tmp_path) as agent:
        page = browse(agent.address)
        drawn(page)
        assert page.evaluate("state.charts[1].lines.map((line) => line.label)") == [
            "lowest",
            "highest",
            "median",
            "rank 17",
        ]
        for rank in ranks[:12]:
            rank.step(nonfinite(122, rank=rank.identity.rank, applied=False))
            rank.tell(event(nonfinite(130 + rank.identity.rank, rank=rank.identity.rank)))
        until(lambda: page.evaluate("state.charts[1].lines.length") == 3 + 8)
        shoot(page, "many-ranks")
    for rank in ranks:
        rank.end()


def test_what_a_script_names_is_text_and_nothing_else(tmp_path, browse, serve):
    evil = "<img src=x onerror=alert(1)>"
    rank = FakeRank(tmp_path, identity(script=evil, device=evil, host=evil))
    rank.step(nonfinite(1, parameter=evil), tell=False).tell(event(nonfinite(1, parameter=evil), evil))
    with serve(tmp_path) as agent:
        page = browse(agent.address)
        expect(page.locator("#events tbody")).to_contain_text(evil)
        expect(page.locator("#ranks tbody")).to_contain_text(evil)
        assert page.locator("#run img").count() == 0
    rank.end()
