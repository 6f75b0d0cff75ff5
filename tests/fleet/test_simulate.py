"""The simulated agents say all that real ones may say, in the form Prometheus and its linter want."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
import simulate
import values
from prometheus_client.parser import text_string_to_metric_families
from simulate import FleetServer, History, Scenario, SimulatedRun, broken_runs

from gradmon import counting
from gradmon.agent.gpus import _ECC_KINDS, _LINK_COUNTERS, _THROTTLE_REASONS
from gradmon.metrics import METRICS, METRICS_BY_NAME, Metric

START = 1_795_000_000.0
LATER = START + 3000.0

Labels = tuple[tuple[str, str], ...]


def run_of(scenario: str | Scenario = "healthy", **settings: object) -> SimulatedRun:
    return SimulatedRun("llama", nodes=2, ranks_per_node=4, scenario=scenario, start=START, **settings)  # type: ignore[arg-type]


def samples(body: bytes) -> Iterator[tuple[str, Labels, float]]:
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            yield sample.name, tuple(sorted(sample.labels.items())), sample.value


def all_runs() -> list[SimulatedRun]:
    return [run_of(), run_of("story"), *broken_runs(START + 2000.0, START)]


def test_every_name_is_there_with_its_labels_and_kind() -> None:
    families = {f.name: f for f in text_string_to_metric_families(run_of().render(0, LATER).decode())}
    for metric in METRICS:
        family = families.pop(metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name)
        assert family.type == metric.kind
        assert family.documentation == metric.help
        assert family.samples, metric.name
        for sample in family.samples:
            assert set(sample.labels) == set(metric.labels), metric.name
    assert not families


def test_a_metric_nobody_thought_of_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "METRICS", (*METRICS, Metric("gradmon_new", "gauge", "1", ("run",), "New.")))
    with pytest.raises(LookupError, match=r"gradmon_new.*values\.py"):
        run_of().render(0, LATER)


def test_no_series_is_there_twice_over_all_nodes_but_the_world_size() -> None:
    for run in all_runs():
        found = [key for node in range(run.nodes) for *key, _ in samples(run.render(node, LATER))]
        found = [key for key in found if key[0] not in ("gradmon_world_size", "gradmon_agent_journals")]
        found = [key for key in found if key[0] != "gradmon_agent_errors_total"]
        assert len(found) == len({tuple(key) for key in found}), run.name


def test_only_the_node_of_rank_0_tells_of_the_run() -> None:
    names = {name for name, *_ in samples(run_of().render(1, LATER))}
    of_run = {m.name for m in METRICS if "run" in m.labels and "rank" not in m.labels}
    assert names & of_run == {"gradmon_world_size"}
    ranks = {dict(labels)["rank"] for name, labels, _ in samples(run_of().render(1, LATER)) if name == "gradmon_loss"}
    assert ranks == {"4", "5", "6", "7"}


def test_counters_never_shrink_and_are_whole_where_they_count() -> None:
    for run in all_runs():
        before: dict[tuple[str, Labels], float] = {}
        for k in range(0, 3600, 211):
            now = {(name, labels): value for name, labels, value in samples(run.render(0, START + k))}
            now = {key: value for key, value in now.items() if METRICS_BY_NAME[key[0]].kind == "counter"}
            for key, value in now.items():
                assert value >= before.get(key, 0.0), (run.name, key)
                assert value == int(value) or METRICS_BY_NAME[key[0]].unit == "seconds", (run.name, key)
            before = now
        assert before


def test_the_same_moment_looks_the_same_and_the_next_one_does_not() -> None:
    assert run_of("story").render(0, LATER) == run_of("story").render(0, LATER)
    first, second = ({(n, lb): v for n, lb, v in samples(run_of().render(0, t))} for t in (LATER, LATER + 5))
    moved = {name for (name, labels), value in first.items() if value != second[name, labels]}
    assert {"gradmon_grad_norm", "gradmon_steps_total", "gradmon_loss", "gradmon_gpu_power_watts"} <= moved
    assert "gradmon_incidents_total" not in moved


def test_the_story_has_a_spike_a_nan_a_backoff_and_a_straggler() -> None:
    def value(t: float, name: str, **wanted: str) -> float:
        found = samples(run_of("story").render(0, START + t))
        return next(v for n, labels, v in found if n == name and set(wanted.items()) <= set(labels))

    assert value(725, "gradmon_local_grad_norm", rank="1") > 10 * value(725, "gradmon_local_grad_norm", rank="0")
    assert value(725, "gradmon_last_incident_info", rank="1", kind="spike") == 1
    assert value(1310, "gradmon_nonfinite_steps_total") == 3
    assert value(2500, "gradmon_learning_rate_scale_ratio") < value(2600, "gradmon_learning_rate_scale_ratio") < 1
    slow, other = (
        value(2000, "gradmon_busy_seconds_total", rank=rank) - value(1600, "gradmon_busy_seconds_total", rank=rank)
        for rank in ("3", "0")
    )
    assert slow > 1.2 * other


def test_labels_are_those_that_gradmon_writes() -> None:
    assert set(values.ACTIONS) == {*counting._STEP_ACTIONS, *counting._EVENT_ACTIONS}
    assert set(values.THROTTLE_REASONS) == set(_THROTTLE_REASONS)
    assert {kind for (kind,) in values.LABELS["gradmon_gpu_ecc_errors_total"]} == set(_ECC_KINDS)
    assert {kind for (kind,) in values.LABELS["gradmon_gpu_nvlink_errors_total"]} == set(_LINK_COUNTERS)


def test_without_gpus_their_metrics_are_absent() -> None:
    names = {name for name, *_ in samples(run_of(gpu=False).render(0, LATER))}
    assert "gradmon_loss" in names
    assert not {name for name in names if name.startswith("gradmon_gpu_")}


def test_promtool_accepts_what_a_node_says(promtool: str) -> None:
    def check(body: bytes) -> int:
        return subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False).returncode

    for run in all_runs():
        assert check(run.render(0, LATER)) == 0, run.name
    assert check(run_of().render(0, LATER).replace(b"gradmon_errors_total", b"gradmon_errors")) != 0


def test_the_server_answers_for_each_node_and_says_no_for_others() -> None:
    run = SimulatedRun("llama", nodes=2)
    with FleetServer([run], down=["llama-0001"]) as fleet:
        with urllib.request.urlopen(f"http://127.0.0.1:{fleet.port}/llama-0000/metrics", timeout=10) as answer:
            assert b'gradmon_loss{run="llama",rank="0"}' in answer.read()
        for host, code in (("llama-0001", 503), ("llama-0002", 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{fleet.port}/{host}/metrics", timeout=10)
            assert refused.value.code == code
            refused.value.close()


def test_the_server_tells_each_part_of_the_past_once() -> None:
    with FleetServer([run_of()]) as fleet:
        (config,) = fleet.history_config(LATER, [History(frozenset({"gradmon_loss"}), 60.0, 30.0)], "5s")
        query = urllib.parse.urlencode({name: value for name, (value,) in config["params"].items()})
        url = f"http://127.0.0.1:{fleet.port}/llama-0000/history?{query}"
        bodies = []
        for _ in range(2):
            with urllib.request.urlopen(url, timeout=10) as answer:
                bodies.append(answer.read().decode())
    lines = bodies[0].splitlines()
    assert {float(line.split()[-1]) for line in lines[:-1]} == {LATER - 60.0, LATER - 30.0}
    assert len(lines) == 2 * 4 + 1
    assert 'job="gradmon"' in lines[0]
    assert lines[-1] == "# EOF"
    assert bodies[1] == "# EOF\n"
