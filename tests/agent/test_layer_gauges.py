"""What /metrics says of layers and parameters, at each level and within the budget."""

from __future__ import annotations

import math
import sqlite3
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_journals import NO_GRADIENT, FakeRank, detail, identity, killed_rank, nonfinite, record, row
from prometheus_client.parser import text_string_to_metric_families

from gradmon.agent import layer_gauges as layer_gauges_module
from gradmon.agent import store as store_module
from gradmon.agent.exporter import Exporter
from gradmon.agent.layer_gauges import LAYER_GAUGES
from gradmon.agent.store import Store
from gradmon.journal import JournalView, read_journal
from gradmon.layers import Grouping, group
from gradmon.metrics import METRICS
from gradmon.record import Detail

NAMES = ["token.weight", "blocks.0.w", "blocks.0.b", "blocks.1.w", "blocks.1.b", "head.weight"]
Make = Callable[..., FakeRank]
#: (metric, layer) -> value, of one run.
Seen = dict[tuple[str, str], float]


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Make]:
    """Makes living ranks, and ends those a test leaves."""
    made: list[FakeRank] = []

    def make(number: int = 0, names: list[str] = NAMES, **options: object) -> FakeRank:
        made.append(FakeRank(tmp_path, identity(rank=number, world_size=2), parameters=names, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


def watched(directory: Path) -> Store:
    store = Store(directory)
    store.refresh()
    return store


def by_layer(store: Store) -> Seen:
    """Fails if one label set is there twice."""
    text = Exporter(store).render("")[0].decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = [((s.name, s.labels["layer"]), s.value) for s in samples if "layer" in s.labels]
    assert len(dict(found)) == len(found)
    assert {metric.labels for metric in METRICS if "layer" in metric.labels} == {("run", "layer")}
    return dict(found)


def dropped(store: Store) -> float:
    text = Exporter(store).render("")[0].decode()
    (sample,) = [
        s
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "gradmon_series_dropped"
    ]
    assert sample.labels == {"run": "demo"}
    return float(sample.value)


def layers_of(seen: Seen) -> list[str]:
    return list(dict.fromkeys(layer for _, layer in seen))


def full(step: int) -> Detail:
    """Norms 1, 3, 4, 6, 8, 2 in the order of NAMES."""
    return detail(step, *map(row, (1.0, 3.0, 4.0, 6.0, 8.0, 2.0)))


def test_by_default_values_are_per_layer(tmp_path: Path, rank: Make) -> None:
    rank().detailed(full(10))
    store = watched(tmp_path)
    seen = by_layer(store)
    assert layers_of(seen) == ["token", "blocks.0", "blocks.1", "head"], "in the order of the model"
    assert set(seen) == {(name, layer) for name in LAYER_GAUGES for layer in layers_of(seen)}
    assert seen["gradmon_layer_grad_norm", "blocks.0"] == pytest.approx(math.hypot(3, 4))
    assert seen["gradmon_layer_grad_norm", "head"] == 2
    assert seen["gradmon_layer_grad_abs_max", "blocks.1"] == 4
    assert seen["gradmon_layer_grad_zero_ratio", "blocks.1"] == 4 / 16
    assert seen["gradmon_layer_update_ratio", "token"] == pytest.approx(1e-3)
    assert seen["gradmon_layer_nonfinite_elements", "blocks.0"] == 0
    assert dropped(store) == 0


def test_level_core_has_none(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"level": "core", "series_budget": 10}).detailed(full(10))
    store = watched(tmp_path)
    assert by_layer(store) == {}
    assert dropped(store) == 0


def test_level_params_has_every_parameter(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"level": "params"}).detailed(full(10))
    store = watched(tmp_path)
    seen = by_layer(store)
    assert layers_of(seen) == NAMES
    assert [seen["gradmon_layer_grad_norm", name] for name in NAMES] == [1, 3, 4, 6, 8, 2]
    assert dropped(store) == 0


def test_the_budget_at_level_params_leaves_out_the_last(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"level": "params", "series_budget": 24}).detailed(full(10))
    store = watched(tmp_path)
    seen = by_layer(store)
    assert layers_of(seen) == NAMES[:4]
    assert len(seen) == 20
    assert dropped(store) == 10


def test_the_budget_at_level_layers_puts_the_last_together(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"level": "layers", "series_budget": 15}).detailed(full(10))
    store = watched(tmp_path)
    seen = by_layer(store)
    assert layers_of(seen) == ["token", "blocks.0", "other"]
    assert len(seen) == 15
    assert seen["gradmon_layer_grad_norm", "other"] == pytest.approx(math.sqrt(6**2 + 8**2 + 2**2))
    assert dropped(store) == 10, "blocks.1 and head have no series of their own"


def test_a_pattern_names_the_layers(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"layers": r"(w|b)$"}).detailed(full(10))
    seen = by_layer(watched(tmp_path))
    assert layers_of(seen) == ["other", "w", "b"]
    assert seen["gradmon_layer_grad_norm", "b"] == pytest.approx(math.hypot(4, 8))


def test_two_parameters_of_one_name_are_no_label_set_twice(tmp_path: Path, rank: Make) -> None:
    rank(names=["w", "w"], metrics={"level": "params"}).detailed(detail(10, row(3.0), row(4.0)))
    assert by_layer(watched(tmp_path))["gradmon_layer_grad_norm", "w"] == 5


def test_gauges_keep_the_last_finite_value_and_the_count_tells(tmp_path: Path, rank: Make) -> None:
    one = rank(names=["a.w", "b.w"], metrics={"level": "layers"}).detailed(detail(10, row(3.0), row(4.0)))
    store = watched(tmp_path)
    broken = row(math.nan, nan_count=5.0, inf_count=2.0, zero_count=math.nan, update_ratio=math.nan, abs_max=9.0)
    one.detailed(detail(11, row(7.0), broken))
    store.refresh()
    seen = by_layer(store)
    assert all(math.isfinite(value) for value in seen.values())
    assert (seen["gradmon_layer_grad_norm", "a"], seen["gradmon_layer_grad_norm", "b"]) == (7, 4)
    assert seen["gradmon_layer_grad_abs_max", "b"] == 9
    assert seen["gradmon_layer_grad_zero_ratio", "b"] == 0.25, "not measured in this one"
    assert seen["gradmon_layer_nonfinite_elements", "a"] == 0
    assert seen["gradmon_layer_nonfinite_elements", "b"] == 7
    one.detailed(detail(20, row(7.5), row(4.5)))
    store.refresh()
    assert by_layer(store)["gradmon_layer_nonfinite_elements", "b"] == 0


def test_what_was_never_measured_is_absent(tmp_path: Path, rank: Make) -> None:
    plain = row(1.0, zero_count=math.nan, update_ratio=math.nan)
    one = rank(names=["a.w", "b.w"]).detailed(detail(10, plain, NO_GRADIENT))
    store = watched(tmp_path)
    names = {"gradmon_layer_grad_norm", "gradmon_layer_grad_abs_max", "gradmon_layer_nonfinite_elements"}
    assert set(by_layer(store)) == {(name, "a") for name in names}
    one.detailed(detail(20, NO_GRADIENT, row(1.0)))
    store.refresh()
    seen = by_layer(store)
    assert ("gradmon_layer_grad_norm", "a") in seen
    assert ("gradmon_layer_nonfinite_elements", "a") not in seen, "the newest detail knows nothing of it"


def test_without_element_counts_there_is_no_zero_ratio(tmp_path: Path, rank: Make) -> None:
    rank(elements=[]).detailed(full(10))
    names = {name for name, _ in by_layer(watched(tmp_path))}
    assert names == set(LAYER_GAUGES) - {"gradmon_layer_grad_zero_ratio"}


def test_what_is_measured_now_and_then_is_not_missed_between_two_looks(tmp_path: Path, rank: Make) -> None:
    one = rank(names=["a.w"]).detailed(detail(10, row(1.0)))
    store = watched(tmp_path)
    rare = row(2.0, zero_count=8.0)
    often = row(3.0, zero_count=math.nan)
    one.detailed(detail(100, rare), detail(110, often), detail(120, often))
    store.refresh()
    seen = by_layer(store)
    assert seen["gradmon_layer_grad_norm", "a"] == 3
    assert seen["gradmon_layer_grad_zero_ratio", "a"] == 1


def test_parameters_added_later_have_names_of_their_own(tmp_path: Path, rank: Make) -> None:
    one = rank(names=["a.w"], metrics={"level": "params"}).detailed(detail(10, row(1.0)))
    store = watched(tmp_path)
    assert layers_of(by_layer(store)) == ["a.w"]
    one.detailed(detail(20, row(math.inf), row(5.0)))
    store.refresh()
    seen = by_layer(store)
    assert layers_of(seen) == ["a.w", "added[0]"]
    assert (seen["gradmon_layer_grad_norm", "a.w"], seen["gradmon_layer_grad_norm", "added[0]"]) == (1, 5)


def test_only_rank_0_tells_and_only_its_details_are_read(
    tmp_path: Path, rank: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, int] = {}

    def watching(path: Path, **cursor: int) -> JournalView:
        view = read_journal(path, **cursor)
        read[view.identity.rank] = read.get(view.identity.rank, 0) + len(view.details)
        return view

    monkeypatch.setattr(store_module, "read_journal", watching)
    for number, norm in ((0, 3.0), (1, 4.0)):
        rank(number, names=["a.w"]).detailed(detail(10, row(norm)))
    store = watched(tmp_path)
    store.refresh()
    assert by_layer(store)["gradmon_layer_grad_norm", "a"] == 3
    assert read == {0: 1, 1: 0}, "and a detail once"


def test_parameters_are_grouped_once(tmp_path: Path, rank: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(names: list[str], pattern: str | None, limit: int) -> Grouping:
        calls.append(len(names))
        return group(names, pattern, limit)

    monkeypatch.setattr(layer_gauges_module, "group", counting)
    one = rank().detailed(full(10), full(20))
    store = watched(tmp_path)
    for step in (30, 40):
        one.detailed(full(step))
        store.refresh()
        assert by_layer(store)
    assert calls == [len(NAMES)]


def test_a_killed_run_still_shows_its_layers_and_a_new_attempt_starts_afresh(tmp_path: Path, rank: Make) -> None:
    one = rank(names=["old.w"]).detailed(detail(10, row(3.0)))
    one.end()
    store = watched(tmp_path)
    assert layers_of(by_layer(store)) == ["old"]
    later = FakeRank(tmp_path, identity(attempt=1, world_size=2), parameters=["new.w"])
    store.refresh()
    assert by_layer(store) == {}
    later.detailed(detail(10, row(4.0)))
    store.refresh()
    assert by_layer(store)["gradmon_layer_grad_norm", "new"] == 4
    assert layers_of(by_layer(store)) == ["new"]
    later.end()


def test_a_new_file_under_the_old_name_is_read_from_its_start(tmp_path: Path) -> None:
    first = FakeRank(tmp_path, identity(started_seconds=1.0)).detailed(*(detail(i, row(1.0)) for i in range(1, 9)))
    store = watched(tmp_path)
    first.end()
    second = FakeRank(tmp_path, identity(started_seconds=2.0), parameters=["a.w"]).detailed(detail(1, row(7.0)))
    store.refresh()
    assert layers_of(by_layer(store)) == ["a"]
    second.end()


@pytest.mark.parametrize("harm", ["half a row", "bad pattern"])
def test_bad_details_cost_the_values_per_layer_only(
    tmp_path: Path, rank: Make, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    one = rank(names=["a.w"], metrics={"layers": "(" if harm == "bad pattern" else None})
    values = array("d", [0.0] * (9 if harm == "half a row" else 8)).tobytes()
    one.detailed(Detail(10, "global", values)).step(nonfinite(11))
    rank(1, names=["a.w"]).step(record(11))
    store = watched(tmp_path)
    one.detailed(Detail(20, "global", values))
    store.refresh()
    assert store.errors["journal"] == 2
    assert len(caplog.messages) == 1, "counted each time, logged once"
    assert by_layer(store) == {}
    run = store.find("demo")
    assert run is not None
    assert [made.history.newest > 0 for made in run.ranks().values()] == [True, True]
    assert run.ranks()[0].incident is not None


def test_settings_of_another_version_do_no_harm(tmp_path: Path, rank: Make) -> None:
    rank(metrics={"level": "params", "from_the_future": 1}).detailed(full(10))
    assert layers_of(by_layer(watched(tmp_path))) == NAMES


def test_a_journal_without_details_has_none(tmp_path: Path) -> None:
    killed_rank(tmp_path)
    (path,) = tmp_path.rglob("rank-*.db")
    with sqlite3.connect(path) as connection:
        connection.executescript("DROP TABLE details; PRAGMA user_version = 1;")
    connection.close()
    store = watched(tmp_path)
    assert store.errors.total() == 0
    assert store.find("demo") is not None
    assert by_layer(store) == {}
    assert dropped(store) == 0
