"""What /metrics says, checked by promtool and by prometheus_client's own parsers."""

from __future__ import annotations

import math
import subprocess
import threading
import time

import pytest
from fake_journals import FakeRank, identity, killed_rank, nonfinite, record, simulate
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gradmon.agent import exporter as exporter_module
from gradmon.agent.exporter import Exporter
from gradmon.agent.gpus import Gpu
from gradmon.agent.store import Store
from gradmon.metrics import METRICS, METRICS_BY_NAME

GPU = {
    "healthy": 0.0,
    "last_healthy_step": 17.0,
    "validation_loss": 2.25,
    "early_stop": 1.0,
    "first_moment_norm": 0.25,
    "second_moment_norm": 1e-5,
    "class_imbalance_ratio": 3.0,
    "token_share_ratio": 0.1,
    "paused": 1.0,
    "snapshot_memory_bytes": 6e9,
    "resident_memory_bytes": 3e8,
    "cpu_seconds": 12.5,
    "threads": 40.0,
    "open_fds": 100.0,
    "read_bytes": 5e9,
    "written_bytes": 6e9,
    "host_memory_available_bytes": 8e9,
    "host_memory_capacity_bytes": 16e9,
    "host_swap_used_bytes": 1e6,
    "host_load_average": 7.5,
    "host_cpus": 96.0,
    "gpu_memory_allocated_bytes": 1e9,
    "gpu_memory_reserved_bytes": 2e9,
    "gpu_memory_peak_allocated_bytes": 3e9,
    "gpu_memory_peak_reserved_bytes": 4e9,
    "gpu_memory_inactive_split_bytes": 5e8,
    "gpu_memory_capacity_bytes": 8e10,
    "gpu_allocator_retries": 0.0,
    "gpu_allocator_ooms": 0.0,
}
#: What the driver says of the GPU of rank r of "gpt".
DRIVER = {
    f"GPU-{r}": Gpu(
        f"00000000:{r}B:00.0",
        [
            ("gradmon_gpu_device_memory_used_bytes", (), 3e9),
            ("gradmon_gpu_device_memory_capacity_bytes", (), 8e10),
            ("gradmon_gpu_utilisation_ratio", (), 0.97),
            ("gradmon_gpu_power_watts", (), 650.0 + r),
            ("gradmon_gpu_temperature_celsius", (), 61.0),
            ("gradmon_gpu_throttled", ("sw_power_cap",), 1.0),
            ("gradmon_gpu_throttled", ("hw_slowdown",), 0.0),
            ("gradmon_gpu_ecc_errors_total", ("corrected",), 3.0),
            ("gradmon_gpu_nvlink_errors_total", ("replay",), 7.0),
        ],
    )
    for r in range(2)
}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def exposition(directory, accept: str = "") -> str:
    store = Store(directory)
    store.refresh()
    return Exporter(store, lambda: DRIVER).render(accept)[0].decode()


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    """Every sample of an exposition; fails if one label set is there twice."""
    found = {}
    for family in parse_text(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


@pytest.fixture
def directory(tmp_path):
    """Two ranks on a GPU, 400 steps with a NaN, a spike and a back-off, and a script of one rank on a CPU."""
    gpt = {"run": "gpt", "world_size": 2, "device": "H100"}
    ranks = [FakeRank(tmp_path, identity(rank=r, gpu_uuid=f"GPU-{r}", **gpt), GPU) for r in range(2)]
    ranks.append(FakeRank(tmp_path, identity(run="cpu")))
    simulate(ranks[:2], 1, 400)
    ranks[0].writer.count("gradmon_errors_total", ("hooks",))
    for seconds, name in ((12.5, "busy"), (0.25, "data_wait")):
        ranks[1].writer.count(f"gradmon_{name}_seconds_total", amount=seconds)
    assert all(rank.writer.flush() for rank in ranks[:2])
    ranks[2].step(record(1))
    yield tmp_path
    for rank in ranks:
        rank.end()


def test_promtool_has_nothing_to_complain_about(directory, promtool):
    text = exposition(directory)
    assert text.count("\n") > 100
    check = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_promtool_would_complain(promtool):
    bad = "# TYPE gradmon_steps counter\ngradmon_steps 1\n"
    check = subprocess.run([promtool, "check", "metrics"], input=bad, capture_output=True, text=True, check=False)
    assert check.returncode != 0


def test_every_metric_is_exported_with_its_own_labels(directory):
    text = exposition(directory)
    seen: dict[str, set] = {}
    for name, labels in samples(text):
        seen.setdefault(name, set()).add(frozenset(key for key, _ in labels))
    assert set(seen) == set(METRICS_BY_NAME)
    for metric in METRICS:
        assert seen[metric.name] == {frozenset(metric.labels)}
        assert f"# HELP {metric.name} {metric.help}\n" in text
        assert f"# TYPE {metric.name} {metric.kind}\n" in text


def test_health_is_said_once_per_run(directory):
    text = exposition(directory)
    assert value(text, "gradmon_healthy", run="gpt") == 0
    assert value(text, "gradmon_last_healthy_step", run="gpt") == 17
    assert value(text, "gradmon_snapshot_memory_bytes", run="gpt", rank="1") == 6e9
    assert value(text, "gradmon_healthy", run="gpt", rank="1") is None


def test_what_a_cpu_has_not_is_absent(directory):
    text = exposition(directory)
    gpu = {name for name in METRICS_BY_NAME if name.startswith("gradmon_gpu_")}
    assert len(gpu) == 16
    ranks = [(name, dict(labels)["run"], dict(labels)["rank"]) for name, labels in samples(text) if name in gpu]
    assert {name for name, run, rank in ranks if (run, rank) == ("gpt", "1")} == gpu
    assert [name for name, run, _ in ranks if run == "cpu"] == []


def test_values(directory):
    text = exposition(directory)
    assert value(text, "gradmon_steps_total", run="gpt", rank="1") == 400
    assert value(text, "gradmon_nonfinite_steps_total", run="gpt") == 1
    assert value(text, "gradmon_local_nonfinite_elements_total", run="gpt", rank="1", kind="nan") == 64
    assert value(text, "gradmon_local_nonfinite_elements_total", run="gpt", rank="0", kind="nan") == 0
    done = {"run": "gpt", "applied": "yes"}
    assert value(text, "gradmon_actions_total", action="skip", reason="nonfinite", **done) == 1
    assert value(text, "gradmon_actions_total", action="rescale", reason="spike", **done) == 2
    assert value(text, "gradmon_actions_total", action="backoff", reason="spike_streak", **done) == 1
    incident = {"run": "gpt", "rank": "0", "parameter": "blocks.0.attn.qkv.weight", "kind": "spike"}
    assert value(text, "gradmon_last_incident_info", **incident) == 1
    assert value(text, "gradmon_last_incident_step", run="gpt") == 231
    assert value(text, "gradmon_agent_journals") == 3
    assert value(text, "gradmon_errors_total", run="gpt", rank="0", part="hooks") == 1


def test_the_last_incident_is_one_series_per_run(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(nonfinite(1, parameter="a"), nonfinite(2, parameter="b"))
    text = exposition(tmp_path)
    rank.end()
    incidents = [dict(labels) for name, labels in samples(text) if name == "gradmon_last_incident_info"]
    assert incidents == [{"run": "demo", "rank": "0", "parameter": "b", "kind": "nonfinite"}]


def test_an_incident_nobody_can_be_blamed_for_says_so(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(nonfinite(1, culprit_rank=None, parameter=None))
    text = exposition(tmp_path)
    rank.end()
    unknown = {"rank": "unknown", "parameter": "unknown"}
    assert value(text, "gradmon_last_incident_info", run="demo", kind="nonfinite", **unknown) == 1


def test_gauges_are_never_nan(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(
        record(1, grad_norm=2.5, local_grad_norm=3.5, loss=4.5),
        nonfinite(2, loss=math.nan),
        nonfinite(3, loss=math.inf, grad_norm=math.inf),
    )
    text = exposition(tmp_path)
    rank.end()
    assert all(math.isfinite(v) for v in samples(text).values())
    assert value(text, "gradmon_grad_norm", run="demo") == 2.5
    assert value(text, "gradmon_local_grad_norm", run="demo", rank="0") == 3.5
    assert value(text, "gradmon_loss", run="demo", rank="0") == 4.5
    assert value(text, "gradmon_nonfinite_losses_total", run="demo", rank="0") == 2


def test_counters_are_born_at_0_before_the_first_step(tmp_path):
    rank = FakeRank(tmp_path, identity())
    text = exposition(tmp_path)
    rank.end()
    assert value(text, "gradmon_steps_total", run="demo", rank="0") == 0
    assert value(text, "gradmon_incidents_total", run="demo", rank="0", kind="nonfinite") == 0
    skip = {"action": "skip", "reason": "nonfinite", "applied": "yes"}
    assert value(text, "gradmon_actions_total", run="demo", **skip) == 0
    assert value(text, "gradmon_grad_norm", run="demo") is None
    assert value(text, "gradmon_agent_errors_total", part="journal") == 0


def test_what_is_equal_on_all_ranks_comes_from_rank_0_only(tmp_path):
    rank = FakeRank(tmp_path, identity(rank=3, world_size=8)).step(record(1), nonfinite(2))
    text = exposition(tmp_path)
    rank.end()
    names = {name for name, _ in samples(text)}
    run_level = {m.name for m in METRICS if "rank" not in m.labels and "run" in m.labels}
    run_level = run_level - {"gradmon_world_size"} | {"gradmon_last_incident_info"}
    assert not names & run_level
    assert value(text, "gradmon_steps_total", run="demo", rank="3") == 2


def test_up_finished_and_failed(tmp_path):
    ended = FakeRank(tmp_path, identity(run="ended")).step(record(1))
    failed = FakeRank(tmp_path, identity(run="failed")).step(record(1))
    living = FakeRank(tmp_path, identity(run="living")).step(record(1))
    ended.end()
    failed.end("exception", "ValueError: x")
    killed_rank(tmp_path, run="killed")
    text = exposition(tmp_path)
    living.end()
    names = ("gradmon_rank_up", "gradmon_rank_finished", "gradmon_rank_failed")
    runs = ("ended", "failed", "living", "killed")
    assert {run: tuple(value(text, name, run=run, rank="0") for name in names) for run in runs} == {
        "ended": (0, 1, 0),
        "failed": (0, 0, 1),
        "living": (1, 0, 0),
        "killed": (0, 0, 0),
    }
    assert {run for run in runs if value(text, "gradmon_world_size", run=run) is not None} == {"living"}
    for age in ("gradmon_last_step_age_seconds", "gradmon_last_heartbeat_age_seconds"):
        assert {run for run in runs if value(text, age, run=run, rank="0") is not None} == {"living"}


def test_ages_go_on_while_nobody_looks(tmp_path, monkeypatch):
    rank = FakeRank(tmp_path, identity()).step(record(1))
    store = Store(tmp_path)
    store.refresh()
    monkeypatch.setattr(exporter_module, "CACHE_SECONDS", 0.0)
    exporter = Exporter(store)

    def age(name):
        return value(exporter.render("")[0].decode(), f"gradmon_last_{name}_age_seconds", run="demo", rank="0")

    first = age("step"), age("heartbeat")
    time.sleep(0.3)
    later = age("step"), age("heartbeat")
    rank.end()
    for before, after in zip(first, later, strict=True):
        assert 0 <= before < 10
        assert 0.3 <= after - before < 10


def test_before_the_first_step_the_age_is_that_of_the_attachment(tmp_path):
    rank = FakeRank(tmp_path, identity())
    time.sleep(0.2)
    text = exposition(tmp_path)
    rank.end()
    assert 0.2 <= value(text, "gradmon_last_step_age_seconds", run="demo", rank="0") < 10


def test_a_pause_is_said_of_living_ranks_only(tmp_path):
    pausing = FakeRank(tmp_path, identity(run="pausing"), {"paused": 1.0})
    killed = FakeRank(tmp_path, identity(run="ended"), {"paused": 1.0})
    plain = FakeRank(tmp_path, identity(run="plain"))
    killed.end("exception")
    text = exposition(tmp_path)
    pausing.end()
    plain.end()
    seen = {run: value(text, "gradmon_paused", run=run, rank="0") for run in ("pausing", "ended", "plain")}
    assert seen == {"pausing": 1, "ended": 0, "plain": 0}


def test_a_host_is_told_of_once_and_by_a_living_rank(tmp_path):
    """Two runs and three ranks of it; the one that ended knew other numbers."""
    ended = FakeRank(tmp_path, identity(run="old"), {"host_cpus": 1.0, "host_load_average": 1.0})
    ended.end()
    first = FakeRank(tmp_path, identity(run="a"), {"host_cpus": 96.0})
    time.sleep(0.02)
    second = FakeRank(tmp_path, identity(run="b"), {"host_cpus": 95.0})
    text = exposition(tmp_path)
    first.end()
    second.end()
    hosts = {k: v for k, v in samples(text).items() if k[0].startswith("gradmon_host_")}
    assert hosts == {("gradmon_host_cpus", frozenset({("host", "node-a")})): 95.0}
    gone = {name for name, _ in samples(exposition(tmp_path))}
    assert "gradmon_rank_up" in gone
    assert "gradmon_host_cpus" not in gone, "nobody here knows any more"


def test_the_world_is_known_by_any_living_rank(tmp_path):
    rank = FakeRank(tmp_path, identity(rank=3, world_size=8))
    assert value(exposition(tmp_path), "gradmon_world_size", run="demo") == 8
    rank.end()
    assert value(exposition(tmp_path), "gradmon_world_size", run="demo") is None


def test_where_the_gpu_is_plugged_in(tmp_path):
    """From torch where it tells; an older one leaves it to the driver."""
    told = FakeRank(tmp_path, identity(run="told", gpu_uuid="GPU-0", gpu_pci_bus_id="00000000:3B:00.0"))
    asked = FakeRank(tmp_path, identity(run="asked", gpu_uuid="GPU-1"))
    unknown = FakeRank(tmp_path, identity(run="unknown", gpu_uuid="GPU-7"))
    text = exposition(tmp_path)
    for rank in (told, asked, unknown):
        rank.end()
    places = {
        dict(labels)["run"]: dict(labels)["gpu_pci_bus_id"]
        for name, labels in samples(text)
        if name == "gradmon_rank_info"
    }
    assert places == {"told": "00000000:3B:00.0", "asked": "00000000:1B:00.0", "unknown": ""}


def test_counted_seconds(directory):
    text = exposition(directory)
    assert value(text, "gradmon_busy_seconds_total", run="gpt", rank="1") == 12.5
    assert value(text, "gradmon_data_wait_seconds_total", run="gpt", rank="1") == 0.25
    assert value(text, "gradmon_data_wait_seconds_total", run="cpu", rank="0") is None


#: NVLink, errors of gradmon itself, and what only some scripts have are not among them.
SERIES_PER_RANK = 50


def test_series_of_a_rank_are_few(tmp_path, monkeypatch):
    """DESIGN says about 40; those of the run and of the host come once, whatever the number of ranks."""
    ranks = [
        FakeRank(tmp_path, identity(rank=r, world_size=2, gpu_uuid=f"GPU-{r}"), GPU, metrics={"level": "core"})
        for r in range(2)
    ]
    simulate(ranks, 1, 40)
    labels = [dict(labels) for _, labels in samples(exposition(tmp_path)) if dict(labels).get("rank") == "1"]
    for rank in ranks:
        rank.end()
    assert 30 < len(labels) <= SERIES_PER_RANK


def test_an_ended_run_leaves_after_a_while(tmp_path, monkeypatch):
    rank = FakeRank(tmp_path, identity()).step(record(1))
    monkeypatch.setattr(exporter_module, "ENDED_SECONDS", -1.0)
    assert value(exposition(tmp_path), "gradmon_rank_up", run="demo", rank="0") == 1  # it lives, however old
    rank.end()
    killed_rank(tmp_path, run="killed")
    gone = exposition(tmp_path)
    assert value(gone, "gradmon_rank_up", run="demo", rank="0") is None
    assert value(gone, "gradmon_rank_up", run="killed", rank="0") is None
    assert value(gone, "gradmon_agent_journals") == 2


def test_two_instances_and_two_attempts_give_no_label_set_twice(tmp_path):
    now = time.time()
    ranks = [
        FakeRank(tmp_path, identity(instance=name, attempt=attempt, started_seconds=now + i)).step(record(1))
        for i, (name, attempt) in enumerate((("a", 0), ("a", 1), ("b", 0)))
    ]
    found = samples(exposition(tmp_path))
    for rank in ranks:
        rank.end()
    assert found["gradmon_steps_total", frozenset({("run", "demo"), ("rank", "0")})] == 2
    assert found["gradmon_steps_total", frozenset({("run", "demo~2"), ("rank", "0")})] == 1


def test_openmetrics_for_those_who_ask(directory):
    store = Store(directory)
    store.refresh()
    exporter = Exporter(store)
    plain, plain_type = exporter.render("text/plain")
    body, content_type = exporter.render(OPENMETRICS)
    assert plain_type.startswith("text/plain; version=0.0.4")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    text = body.decode()
    assert text.endswith("# EOF\n")
    assert "_created" not in text + plain.decode()
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_openmetrics(text)
        for sample in family.samples
    }
    ages = {name for name in METRICS_BY_NAME if name.endswith("_age_seconds")}
    assert {k: v for k, v in found.items() if k[0] not in ages} == {
        k: v for k, v in samples(plain.decode()).items() if k[0] not in ages
    }
    assert {name for name, _ in found} >= ages


def test_awkward_names_survive(tmp_path):
    parameter = 'a"b\\c\nd é'
    rank = FakeRank(tmp_path, identity()).step(nonfinite(1, parameter=parameter))
    text = exposition(tmp_path)
    rank.end()
    incident = {"run": "demo", "rank": "0", "parameter": parameter, "kind": "nonfinite"}
    assert value(text, "gradmon_last_incident_info", **incident) == 1


def test_a_failing_rank_is_left_out_and_counted(directory, monkeypatch, caplog):
    honest = exporter_module._rank_samples

    def failing(run, rank, gpus):
        yield from honest(run, rank, gpus)
        if (run, rank.number) == ("gpt", 1):
            raise RuntimeError("broken on purpose")

    monkeypatch.setattr(exporter_module, "_rank_samples", failing)
    text = exposition(directory)
    assert value(text, "gradmon_agent_errors_total", part="exporter") == 1
    assert value(text, "gradmon_rank_up", run="gpt", rank="1") is None  # nothing of it, not half of it
    assert value(text, "gradmon_rank_up", run="gpt", rank="0") == 1
    assert "broken on purpose" in caplog.text


class TestRendering:
    @pytest.fixture
    def rank(self, tmp_path):
        rank = FakeRank(tmp_path, identity()).step(record(1))
        yield rank
        rank.end()

    @pytest.fixture
    def store(self, tmp_path, rank):
        store = Store(tmp_path)
        store.refresh()
        return store

    def steps(self, body: bytes) -> float | None:
        return value(body.decode(), "gradmon_steps_total", run="demo", rank="0")

    def test_it_is_used_again(self, rank, store, monkeypatch):
        exporter = Exporter(store)
        first = exporter.render("")
        rank.step(record(2))
        store.refresh()
        assert exporter.render("") == first
        assert exporter.ready("") == first
        monkeypatch.setattr(exporter_module, "CACHE_SECONDS", 0.0)
        assert exporter.ready("") is None
        assert self.steps(exporter.render("")[0]) == 2

    def test_what_was_asked_for_is_made_anew_by_who_reads(self, rank, store, monkeypatch):
        exporter = Exporter(store)
        assert exporter.ready("") is None
        exporter.prepare()
        assert self.steps(exporter.ready("")[0]) == 1, "asked for a moment ago"
        rank.step(record(2))
        store.refresh()
        exporter.prepare()
        assert self.steps(exporter.ready("")[0]) == 2
        assert exporter.ready(OPENMETRICS) is None, "nobody has asked for it"
        monkeypatch.setattr(exporter_module, "WANTED_SECONDS", -1.0)
        before = exporter.ready("")
        rank.step(record(3))
        store.refresh()
        exporter.prepare()
        assert exporter.ready("") == before, "nobody asks any more"

    def test_a_scrape_does_not_wait_for_who_reads(self, store):
        """Nor for a rendering under way."""
        exporter = Exporter(store)
        exporter.render("")
        holding, release = threading.Event(), threading.Event()

        def hold():
            with store.lock, exporter._format("")[0].lock:
                holding.set()
                release.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert holding.wait(20)
            began = time.monotonic()
            assert self.steps(exporter.ready("")[0]) == 1
            assert time.monotonic() - began < 1
        finally:
            release.set()
            thread.join()

    def test_of_several_scrapes_at_once_one_renders(self, store, monkeypatch):
        exporter = Exporter(store)
        rendered = []
        honest = exporter_module._run_samples

        def slow(run, rank):
            rendered.append(run.name)
            time.sleep(0.2)
            return honest(run, rank)

        monkeypatch.setattr(exporter_module, "_run_samples", slow)
        bodies = []
        threads = [threading.Thread(target=lambda: bodies.append(exporter.render("")[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rendered == ["demo"]
        assert len(bodies) == 4
        assert len(set(bodies)) == 1


def test_a_counter_of_a_newer_writer_is_left_out(tmp_path):
    rank = FakeRank(tmp_path, identity()).step(record(1))
    rank.writer.count("gradmon_from_the_future_total")
    assert rank.writer.flush()
    text = exposition(tmp_path)
    rank.end()
    assert "future" not in text
    assert value(text, "gradmon_steps_total", run="demo", rank="0") == 1


def test_gpus_that_fail_are_left_out_and_counted(directory, caplog):
    def failing():
        raise RuntimeError("broken on purpose")

    store = Store(directory)
    store.refresh()
    text = Exporter(store, failing).render("")[0].decode()
    assert value(text, "gradmon_agent_errors_total", part="exporter") == 1
    assert value(text, "gradmon_gpu_power_watts", run="gpt", rank="1") is None
    assert value(text, "gradmon_gpu_memory_allocated_bytes", run="gpt", rank="1") == 1e9
    assert "broken on purpose" in caplog.text
