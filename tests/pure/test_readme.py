"""The README says what is: its metric table is METRICS, its example runs, its settings load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import gradmon
from gradmon.config import Config, load
from gradmon.metrics import METRICS

README = Path(__file__).parent.parent.parent / "README.md"


def metric_table() -> str:
    """METRICS as Markdown."""
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.help} |" for m in METRICS]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])


def block(language: str, containing: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL) if containing in b]
    assert len(found) == 1
    return found[0]


def test_the_metric_table_is_metrics() -> None:
    """To bring it up to date: python tests/pure/test_readme.py"""
    assert metric_table() in README.read_text()


def test_the_settings_shown_are_the_defaults() -> None:
    shown = yaml.safe_load(block("yaml", "backoff"))
    loaded = load({**shown, "run": None}, environ={}).config
    assert loaded == Config()


def test_the_chinese_readme_has_the_same_examples() -> None:
    blocks = [
        re.findall(r"^```.*?^```$", path.read_text(), re.DOTALL | re.MULTILINE)
        for path in (README, README.with_name("README.zh-CN.md"))
    ]
    assert blocks[0]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = README.with_name(name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = README.with_name(name) if not path else README.parent / path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_the_collectors_receiver_is_a_prometheus_config(tmp_path: Path, promtool: str) -> None:
    given = yaml.safe_load(block("yaml", "receivers"))["receivers"]["prometheus"]["config"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(given))
    subprocess.run([promtool, "check", "config", str(tmp_path / "prometheus.yml")], check=True, capture_output=True)
    (target,) = given["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"{Config().agent.listen}:{Config().agent.port}"


def test_the_example_runs(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(block("python", "import gradmon"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "GRADMON_DIR": str(tmp_path), "GRADMON_AGENT": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "guarding run train (2 ranks)" in done.stderr


def test_the_rollback_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMON_DIR", str(tmp_path))
    monkeypatch.setenv("GRADMON_AGENT", "off")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    loss, saved, deleted = torch.ones(()), [], []
    names = {"gradmon": gradmon, "model": model, "optimizer": optimizer, "average": average, "loss": loss}
    names |= {"save": saved.append, "delete_the_oldest": lambda: deleted.append(1)}
    exec(block("python", "monitor.register"), names)
    names["monitor"].detach()
    assert saved == [model]
    assert deleted == [1], "healthy"


def test_the_doctors_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    names = {"gradmon": gradmon, "torch": torch, "model": model, "inputs": torch.randn(32, 8)}
    names |= {"targets": torch.arange(32) % 4, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}
    exec(block("python", "gradmon.doctor("), names)
    assert "nothing found" in capsys.readouterr().out
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    exec(block("python", "gradmon.doctor("), names)
    assert "dead_relu" in capsys.readouterr().out


if __name__ == "__main__":
    text = re.sub(
        r"(<!-- metrics: .*? -->\n).*(<!-- end of metrics -->)",
        lambda match: match[1] + metric_table() + "\n" + match[2],
        README.read_text(),
        flags=re.DOTALL,
    )
    README.write_text(text)
