"""What the driver says of the GPUs, and what becomes of it when the driver is absent, forgets a GPU, or hangs."""

from __future__ import annotations

import inspect
import logging
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pynvml
import pytest
from fake_journals import AgentProcess, FakeRank, identity, record, until
from fake_nvml import DATA, FLIT, RECOVERY, REPLAY, A, B, FakeNvml, Gpu, hopper
from prometheus_client.parser import text_string_to_metric_families

from gradmon.agent import exporter as exporter_module
from gradmon.agent import gpus as module
from gradmon.agent.exporter import Exporter
from gradmon.agent.gpus import STALE_SECONDS, GpuSampler
from gradmon.agent.store import Store
from gradmon.metrics import METRICS_BY_NAME

NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
NOT_FOUND = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
LOST = pynvml.NVML_ERROR_GPU_IS_LOST
UNKNOWN = pynvml.NVML_ERROR_UNKNOWN


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Sampling:
    """A running sampler over a fake module, its period short, its clock ours."""

    def __init__(self, nvml, errors=None) -> None:
        self.nvml = nvml
        self.errors = Counter() if errors is None else errors
        self.clock = Clock()
        self.sampler = GpuSampler(self.errors, load=lambda: nvml, clock=self.clock)
        self.sampler.start()

    def round(self) -> dict[str, dict[tuple, float]]:
        """What is served once two more rounds have begun, so that at least one began after this call."""
        begun = self.nvml.calls["nvmlDeviceGetCount"]
        until(lambda: self.nvml.calls["nvmlDeviceGetCount"] >= begun + 2, 5)
        return self.served()

    def served(self) -> dict[str, dict[tuple, float]]:
        return {
            uuid: {(name, *labels): value for name, labels, value in gpu.readings}
            for uuid, gpu in self.sampler.newest().items()
        }


@pytest.fixture
def sampling(monkeypatch):
    monkeypatch.setattr(module, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    begun: list[Sampling] = []
    held: list[threading.Event] = []

    def begin(*gpus: Gpu, errors=None) -> Sampling:
        held.extend(event for gpu in gpus for event in gpu.hangs.values())
        begun.append(Sampling(FakeNvml(*gpus), errors))
        return begun[-1]

    yield begin
    for event in held:
        event.set()
    for one in begun:
        one.sampler.stop()
        assert not one.sampler._thread.is_alive()


def kinds(readings: dict[tuple, float], name: str) -> dict[str, float]:
    return {key[1]: value for key, value in readings.items() if key[0] == name}


# --- the fake and the real module ------------------------------------------------------------------------------------


def test_every_name_used_exists_in_the_real_module():
    source = Path(module.__file__).read_text()
    names = set(re.findall(r"\bnvml\.(\w+)", source)) | set(re.findall(r'"((?:nvml|NVML)\w+)"', source))
    assert {"nvmlInit", "nvmlDeviceGetTemperatureV", "NVMLError_GpuIsLost", "NVML_NVLINK_ERROR_DL_REPLAY"} <= names
    names |= {f"nvmlClocks{kind}Reason{n}" for kind in ("Event", "Throttle") for n in module._THROTTLE_REASONS.values()}
    assert {name for name in names if not hasattr(pynvml, name)} == set()


def test_the_fake_takes_what_the_real_module_takes():
    faked = {name: function for name, function in vars(FakeNvml).items() if name.startswith("nvml")}
    assert len(faked) > 15
    for name, function in faked.items():
        expected = list(inspect.signature(inspect.unwrap(getattr(pynvml, name))).parameters)
        assert list(inspect.signature(function).parameters)[1:] == expected, name


def test_the_field_ids_count_all_links_together():
    """DCGM asks for these with this scope; nvidia-ml-py takes pairs of field and scope."""
    with pytest.raises(pynvml.NVMLError_Uninitialized):  # no driver here: as far as the call gets
        pynvml.nvmlDeviceGetFieldValues(None, [(pynvml.NVML_FI_DEV_NVLINK_COUNT_RCV_ERRORS, module._ALL_LINKS)])
    value = pynvml.c_nvmlFieldValue_t(scopeId=module._ALL_LINKS)
    assert value.scopeId == 2**32 - 1
    assert set(module._FIELD_MEMBERS.values()) <= {name for name, _ in pynvml.c_nvmlValue_t._fields_}


# --- values ----------------------------------------------------------------------------------------------------------


def test_all_that_a_gpu_tells(sampling):
    one = sampling(hopper(A))
    assert one.round() == {
        A: {
            ("gradmon_gpu_device_memory_used_bytes",): 70 * 2**30,
            ("gradmon_gpu_device_memory_capacity_bytes",): 80 * 2**30,
            ("gradmon_gpu_utilisation_ratio",): 0.97,
            ("gradmon_gpu_power_watts",): 650.5,
            ("gradmon_gpu_temperature_celsius",): 61,
            ("gradmon_gpu_throttled", "sw_power_cap"): 1,
            ("gradmon_gpu_throttled", "hw_slowdown"): 0,
            ("gradmon_gpu_throttled", "hw_thermal_slowdown"): 0,
            ("gradmon_gpu_throttled", "sw_thermal_slowdown"): 0,
            ("gradmon_gpu_throttled", "sync_boost"): 0,
            ("gradmon_gpu_ecc_errors_total", "corrected"): 3,
            ("gradmon_gpu_ecc_errors_total", "uncorrected"): 1,
            ("gradmon_gpu_nvlink_errors_total", "replay"): 7,
            ("gradmon_gpu_nvlink_errors_total", "recovery"): 1,
            ("gradmon_gpu_nvlink_errors_total", "crc"): 24,
        }
    }
    assert one.errors["nvml"] == 0


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (
            "nvmlDeviceGetMemoryInfo",
            {"gradmon_gpu_device_memory_used_bytes", "gradmon_gpu_device_memory_capacity_bytes"},
        ),
        ("nvmlDeviceGetUtilizationRates", {"gradmon_gpu_utilisation_ratio"}),
        ("nvmlDeviceGetPowerUsage", {"gradmon_gpu_power_watts"}),
        ("nvmlDeviceGetSupportedClocksEventReasons", set()),  # its older name answers
        ("nvmlDeviceGetTotalEccErrors", {"gradmon_gpu_ecc_errors_total"}),
        ("nvmlDeviceGetNvLinkState", {"gradmon_gpu_nvlink_errors_total"}),
        ("nvmlDeviceGetNvLinkErrorCounter", {"gradmon_gpu_nvlink_errors_total"}),
    ],
)
def test_what_a_gpu_does_not_support_is_absent_and_no_error(sampling, function, missing):
    one = sampling(hopper(A), hopper(B, refuses={function: NOT_SUPPORTED}))
    served = one.round()
    names = {uuid: {key[0] for key in readings} for uuid, readings in served.items()}
    assert names[A] - names[B] == missing
    assert names[B] < names[A] if missing else names[B] == names[A]
    assert one.errors["nvml"] == 0


def test_where_a_gpu_is_plugged_in(sampling):
    """With one that does not tell, and whose other numbers are there all the same."""
    one = sampling(hopper(A), hopper(B, refuses={"nvmlDeviceGetPciInfo": NOT_SUPPORTED}))
    served = one.round()
    assert {uuid: gpu.pci_bus_id for uuid, gpu in one.sampler.newest().items()} == {A: "00000000:00:00.0", B: ""}
    assert served[A].keys() == served[B].keys()
    assert one.errors["nvml"] == 0


def test_an_old_driver_answers_to_the_old_names(sampling):
    new = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons")
    one = sampling(hopper(A), hopper(B, refuses=dict.fromkeys(new, NOT_FOUND)))
    served = one.round()
    assert served[B] == served[A]
    assert one.nvml.calls["nvmlDeviceGetTemperature"] > 0
    assert one.nvml.calls["nvmlDeviceGetCurrentClocksThrottleReasons"] > 0


def test_links_that_are_not_up_have_no_errors(sampling):
    one = sampling(hopper(A, up=False))
    assert kinds(one.round()[A], "gradmon_gpu_nvlink_errors_total") == {}


def test_a_link_that_refuses_leaves_its_kind_out(sampling):
    """A sum over fewer links would be smaller: Prometheus would take that for a restart and count it all again."""
    gpu = hopper(A)
    one = sampling(gpu)
    assert set(kinds(one.round()[A], "gradmon_gpu_nvlink_errors_total")) == {"replay", "recovery", "crc"}
    del gpu.links[3][FLIT]
    assert kinds(one.round()[A], "gradmon_gpu_nvlink_errors_total") == {"replay": 7, "recovery": 1}
    assert {REPLAY, RECOVERY, DATA} == set(gpu.links[3])


def test_nvlink_from_blackwell_on_is_asked_by_field(sampling):
    fields = {
        pynvml.NVML_FI_DEV_NVLINK_COUNT_RCV_ERRORS: 2**40 + 5,
        pynvml.NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_EVENTS: 2,
    }
    blackwell = Gpu(A, links=[{} for _ in range(18)], fields=fields)
    one = sampling(blackwell)
    assert kinds(one.round()[A], "gradmon_gpu_nvlink_errors_total") == {"receive": 2**40 + 5, "recovery": 2}
    del blackwell.fields[pynvml.NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_EVENTS]
    assert kinds(one.round()[A], "gradmon_gpu_nvlink_errors_total") == {"receive": 2**40 + 5}


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_lost_gpu_is_counted_once_and_the_other_goes_on(sampling, caplog):
    a, b = hopper(A), hopper(B)
    one = sampling(a, b)
    assert set(one.round()) == {A, B}
    b.refuses["*"] = LOST
    a.percent = 55
    for _ in range(3):
        served = one.round()
        assert set(served) == {A}
        assert served[A]["gradmon_gpu_utilisation_ratio",] == 0.55
    assert one.errors["nvml"] == 1
    assert [r.message for r in caplog.records] == ["GPU metrics are missing: GPU 1: NVMLError_GpuIsLost: GPU is lost"]
    b.refuses.clear()
    assert set(one.round()) == {A, B}
    b.refuses["nvmlDeviceGetPowerUsage"] = LOST  # this time in the middle of its readings
    assert set(one.round()) == {A}
    assert one.errors["nvml"] == 2


def test_a_failing_sensor_costs_its_own_series_only(sampling):
    gpu = hopper(A)
    one = sampling(gpu)
    before = one.round()[A]
    gpu.refuses["nvmlDeviceGetPowerUsage"] = UNKNOWN
    for _ in range(3):
        after = one.round()[A]
    assert before.keys() - after.keys() == {("gradmon_gpu_power_watts",)}
    assert one.errors["nvml"] == 1


def test_a_gpu_that_this_container_may_not_open_is_no_error(sampling):
    one = sampling(hopper(A), hopper(B, refuses={"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_NO_PERMISSION}))
    assert set(one.round()) == {A}
    assert one.errors["nvml"] == 0


def test_a_driver_that_fails_as_a_whole_is_opened_again(sampling):
    one = sampling(hopper(A))
    assert one.round()
    one.nvml.refuses["nvmlDeviceGetCount"] = UNKNOWN
    until(lambda: one.nvml.calls["nvmlInit"] > 3, 5)
    assert one.errors["nvml"] == 1
    assert one.nvml.opened <= 1
    one.nvml.refuses.clear()
    assert until(one.round, 5)[A]["gradmon_gpu_power_watts",] == 650.5


def test_a_hung_call_makes_series_absent_and_no_scrape_slow(tmp_path, sampling, monkeypatch):
    monkeypatch.setattr(exporter_module, "CACHE_SECONDS", 0.0)
    rank = FakeRank(tmp_path, identity(gpu_uuid=A)).step(record(1))
    store = Store(tmp_path)
    store.refresh()
    gpu = hopper(A)
    one = sampling(gpu, errors=store.errors)
    one.round()
    exporter = Exporter(store, one.sampler.newest)

    def scrape() -> tuple[float | None, float | None]:
        began = time.perf_counter()
        text = exporter.render("")[0].decode()
        assert time.perf_counter() - began < 1.0
        assert value(text, "gradmon_steps_total", run="demo", rank="0") == 1
        power = value(text, "gradmon_gpu_power_watts", run="demo", rank="0")
        return power, value(text, "gradmon_agent_errors_total", part="nvml")

    assert scrape() == (650.5, 0)
    release = threading.Event()
    gpu.hangs["nvmlDeviceGetTemperatureV"] = release
    assert one.nvml.hanging.wait(5)
    one.clock.now += STALE_SECONDS - 1
    assert scrape() == (650.5, 0)  # the newest finished sample
    one.clock.now += 2
    assert scrape() == (None, 1)
    one.clock.now += 1000
    assert scrape() == (None, 1)  # one failure, however often it is looked at
    del gpu.hangs["nvmlDeviceGetTemperatureV"]
    release.set()
    one.round()
    assert scrape() == (650.5, 1)
    rank.end()


def test_a_hang_while_opening_is_counted_too(monkeypatch):
    release, clock, errors = threading.Event(), Clock(), Counter()

    def load():
        release.wait(60)
        raise ImportError

    sampler = GpuSampler(errors, load=load, clock=clock)
    sampler.start()
    clock_began = until(lambda: sampler._newest[0], 5)
    clock.now = clock_began + STALE_SECONDS + 1
    assert sampler.newest() == {}
    assert errors["nvml"] == 1
    began = time.perf_counter()
    sampler.stop(0.1)  # leaves the thread behind
    assert time.perf_counter() - began < 2
    release.set()
    sampler.stop(5)


def test_stop_closes_nvml(sampling):
    one = sampling(hopper(A))
    one.round()
    assert one.nvml.opened == 1
    one.sampler.stop()
    assert one.nvml.opened == 0
    assert one.nvml.calls["nvmlShutdown"] == 1


# --- absent hardware -------------------------------------------------------------------------------------------------


def no_module():
    raise ImportError("No module named 'pynvml'")


def no_driver():
    nvml = FakeNvml(hopper(A))
    nvml.refuses["nvmlInit"] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    return nvml


@pytest.mark.parametrize("load", [no_module, no_driver, module._load], ids=["no module", "no driver", "this machine"])
def test_without_a_driver_there_is_silence(monkeypatch, caplog, load):
    caplog.set_level(logging.DEBUG, "gradmon.agent")
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    tries, errors, clock = [], Counter(), Clock()

    def counted():
        tries.append(1)
        return load()

    sampler = GpuSampler(errors, load=counted, clock=clock)
    sampler.start()
    until(lambda: len(tries) >= 3, 5)
    clock.now += 1000
    until(lambda: sampler._newest[0] is None, 5)
    sampler.stop(5)
    assert sampler.newest() == {}
    assert not errors
    assert [(r.levelname, r.message.partition(":")[0]) for r in caplog.records] == [("DEBUG", "no GPU metrics")]


def test_a_driver_that_comes_later_is_found(sampling):
    one = sampling(hopper(A))
    one.sampler.stop()
    one.nvml.refuses["nvmlInit"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    late = Sampling(one.nvml)
    until(lambda: one.nvml.calls["nvmlInit"] > 3, 5)
    assert late.served() == {}
    one.nvml.refuses.clear()
    assert set(late.round()) == {A}
    assert late.errors["nvml"] == 0
    late.sampler.stop()


# --- joined to the ranks ---------------------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, frozenset], float]:
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    keyed = {(s.name, frozenset(s.labels.items())): s.value for s in found}
    assert len(keyed) == len(found), "a label set is there twice"
    return keyed


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


def exposition(directory, one: Sampling) -> str:
    store = Store(directory)
    store.refresh()
    return Exporter(store, one.sampler.newest).render("")[0].decode()


def test_each_rank_shows_its_own_gpu(tmp_path, sampling):
    one = sampling(
        hopper(A, milliwatts=100_000), hopper(B, milliwatts=200_000, refuses={"nvmlDeviceGetTotalEccErrors": 3})
    )
    one.round()
    ranks = [  # not in the order of NVML, and one without a GPU
        FakeRank(tmp_path, identity(rank=0, world_size=3, gpu_uuid=B)).step(record(1)),
        FakeRank(tmp_path, identity(rank=1, world_size=3, gpu_uuid=A)).step(record(1)),
        FakeRank(tmp_path, identity(rank=2, world_size=3)).step(record(1)),
    ]
    text = exposition(tmp_path, one)
    for rank in ranks:
        rank.end()
    watts = [value(text, "gradmon_gpu_power_watts", run="demo", rank=str(rank)) for rank in range(3)]
    assert watts == [200, 100, None]
    ecc = [value(text, "gradmon_gpu_ecc_errors_total", run="demo", rank=str(r), kind="corrected") for r in range(3)]
    assert ecc == [None, 3, None]
    assert value(text, "gradmon_gpu_throttled", run="demo", rank="0", reason="sw_power_cap") == 1
    info = {dict(labels)["rank"]: dict(labels)["gpu_uuid"] for n, labels in samples(text) if n == "gradmon_rank_info"}
    assert info == {"0": B, "1": A, "2": ""}
    for name, labels in samples(text):
        assert {key for key, _ in labels} == set(METRICS_BY_NAME[name].labels), name


def test_an_ended_rank_keeps_its_gpu_until_another_uses_it(tmp_path, sampling):
    one = sampling(hopper(A))
    one.round()
    now = time.time()

    def users(text: str) -> set[str]:
        return {dict(labels)["run"] for name, labels in samples(text) if name == "gradmon_gpu_power_watts"}

    for i, run in enumerate(("first", "second")):
        FakeRank(tmp_path, identity(run=run, gpu_uuid=A, started_seconds=now + i)).step(record(1)).end()
    assert users(exposition(tmp_path, one)) == {"second"}
    ranks = [FakeRank(tmp_path, identity(run=run, gpu_uuid=A, started_seconds=now - 9)) for run in ("third", "fourth")]
    assert users(exposition(tmp_path, one)) == {"third", "fourth"}  # two processes may share a GPU
    for rank in ranks:
        rank.end()


# --- the whole agent -------------------------------------------------------------------------------------------------

PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_nvml import A, FakeNvml, hopper
sys.modules['pynvml'] = FakeNvml(hopper(A))
"""


def test_the_agent_serves_them(tmp_path):
    rank = FakeRank(tmp_path, identity(gpu_uuid=A)).step(record(1))
    with AgentProcess(tmp_path, prelude=PRELUDE) as agent:
        text = until(lambda: "gradmon_gpu_power_watts{" in (t := agent.get("/metrics")) and t)
        assert value(text, "gradmon_gpu_power_watts", run="demo", rank="0") == 650.5
        assert value(text, "gradmon_agent_errors_total", part="nvml") == 0
        assert agent.end()[0] == 0
    rank.end()


def test_an_agent_on_this_machine_has_none(tmp_path):
    """With the real nvidia-ml-py: no driver, no series, no error, nothing in the log."""
    rank = FakeRank(tmp_path, identity(gpu_uuid=A)).step(record(1))
    with AgentProcess(tmp_path) as agent:
        text = until(lambda: "gradmon_steps_total{" in (t := agent.get("/metrics")) and t)
        assert not [name for name, _ in samples(text) if name.startswith("gradmon_gpu_")]
        assert value(text, "gradmon_agent_errors_total", part="nvml") == 0
        code, log = agent.end()
    rank.end()
    assert code == 0
    assert "GPU" not in log
