"""Who may import whom, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradmon
from gradmon.agent.exporter import SAMPLE_METRICS
from gradmon.metrics import METRICS
from gradmon.record import STEP_FIELDS

ROOT = Path(gradmon.__file__).parent
#: Module -> floor. A module imports only from lower floors, or from its own where it is listed as an exception.
FLOORS = {
    "record": 0, "metrics": 0, "config": 0, "log": 0, "layers": 0, "locks": 0, "importing": 0,
    "kernels": 1, "_triton_kernels": 1, "stats": 1, "rows": 1, "backward": 1, "local": 1, "sharding": 1, "topology": 1,
    "measuring": 1, "updates": 1, "detector": 1, "policy": 1, "actions": 1, "noise": 1, "stepping": 1, "landing": 1,
    "losses": 1, "resources": 1, "clipping": 1, "scaler": 1, "handshake": 1, "exits": 1, "replicas": 1, "snapshot": 1,
    "guard": 1, "health": 1, "rules": 1, "counting": 1, "timing": 1, "sinks": 1,
    "loss_watch": 1, "inputs": 1, "loaded": 1, "data_watch": 1, "weight_watch": 1,
    "journal": 2, "identity": 2,
    "agent": 3, "plan": 3, "reporter": 3, "diagnose": 3, "watches": 3,
    "monitor": 4,
    "stack": 5, "integrations": 5, "cli": 5, "demo": 5, "__main__": 6,
}  # fmt: skip
#: Within a floor, read downwards: these may import those.
WITHIN = {
    "kernels": {"_triton_kernels"}, "stats": {"kernels"}, "rows": {"stats"}, "backward": {"rows", "stats"},
    "local": {"backward", "rows", "stats", "timing"}, "sharding": {"rows", "stats"}, "topology": {"local", "sharding"},
    "measuring": {"backward", "local", "replicas", "rows", "sharding", "stats", "timing", "topology"},
    "updates": {"stats"},
    "actions": {"detector", "stats"}, "stepping": {"actions", "detector", "measuring", "updates"},
    "landing": {"actions", "detector", "measuring", "noise", "policy", "replicas", "rows", "stats", "stepping",
                "timing"},
    "guard": {"actions", "detector", "landing", "loss_watch", "policy", "snapshot", "topology"},
    "scaler": {"topology"}, "losses": {"landing", "rows"}, "layers": {"record"},
    "cli": {"demo", "integrations", "stack"},
    "demo": {"stack"}, "diagnose": {"agent"},
    "plan": {"agent"}, "watches": {"diagnose", "plan", "reporter"},
    "data_watch": {"inputs", "landing", "loaded", "loss_watch"},
    "inputs": {"stats"}, "loaded": {"inputs"},
    "weight_watch": {"stats"},
}  # fmt: skip
PURE = {"record", "metrics", "detector", "policy", "layers", "noise", "counting", "rules", "loss_watch"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


SOURCES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    assert module in FLOORS, "give the new module a floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gradmon" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != module:
            lower = FLOORS[parts[1]] < FLOORS[module] or parts[1] in WITHIN.get(module, set())
            assert lower, f"{module} (floor {FLOORS[module]}) imports {parts[1]} (floor {FLOORS[parts[1]]})"


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_have_no_torch_and_no_clock(module: str) -> None:
    paths = [ROOT / f"{module}.py"] if (ROOT / f"{module}.py").exists() else (ROOT / module).glob("*.py")
    tops = {name.partition(".")[0] for path in paths for name in imports(path)}
    assert tops
    assert not tops & {"torch", "time", "random", "os", "threading", "logging"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_has_no_side_effects() -> None:
    code = """
import sys, threading, atexit, signal
def look():
    handlers = signal.getsignal(signal.SIGTERM), sys.excepthook, sys.exit
    return atexit._ncallbacks(), threading.active_count(), handlers
before = look()
import gradmon, gradmon.record, gradmon.config
assert 'torch' not in sys.modules
assert look() == before
import torch, torch.nn.utils.clip_grad as c, torch.distributed
from torch.optim import optimizer as o
inner = c._clip_grads_with_norm_
before = atexit._ncallbacks(), threading.active_count()
import gradmon.monitor
assert (atexit._ncallbacks(), threading.active_count()) == before
assert not o._global_optimizer_pre_hooks and c._clip_grads_with_norm_ is inner
print('fine')
"""
    assert run(code) == "fine\n"


def test_the_training_process_imports_no_more_than_promised() -> None:
    """torch, the standard library, pyyaml and psutil; the agent's libraries stay in the agent."""
    code = """
import sys, torch, yaml, psutil
known = {name.partition('.')[0] for name in sys.modules}
import gradmon, gradmon.monitor, gradmon.agent.launch
new = {name.partition('.')[0] for name in sys.modules} - known - set(sys.stdlib_module_names)
print(sorted(new))
"""
    assert run(code) == "['gradmon']\n"


def test_metrics_are_named_by_the_rules() -> None:
    for metric in METRICS:
        assert metric.name.startswith("gradmon_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert metric.unit not in ("seconds", "bytes", "ratio") or metric.unit in metric.name, metric.name
        assert not {"job", "instance", "node", "cluster"} & set(metric.labels), "Prometheus renames those"
    assert len({m.name for m in METRICS}) == len(METRICS)
    assert set(SAMPLE_METRICS.values()) <= {m.name for m in METRICS}
    assert len(set(STEP_FIELDS)) == len(STEP_FIELDS)
