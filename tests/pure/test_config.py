from __future__ import annotations

from pathlib import Path

import pytest

from gradmon.config import BackoffConfig, ClipConfig, Config, ConfigError, describe, load


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"mod": "guard"}, r"unknown setting mod \(from argument\); did you mean mode\?"),
        ({"clip": {"spike_rato": 4}}, r"unknown setting clip.spike_rato .* did you mean clip.spike_ratio\?"),
        ({"clip": 4}, r"clip \(from argument\) must be a group of settings \(got 4\)"),
        ({"mode": "watch"}, r"mode must be one of guard \| observe \(got 'watch'\)"),
        ({"preset": "wild"}, r"preset must be one of gentle \| default \| strict \(got 'wild'\)"),
        ({"backoff": {"factor": 0}}, r"backoff.factor must be above 0 and at most 1 \(got 0.0\)"),
        ({"backoff": {"factor": "half"}}, r"backoff.factor must be a number \(got 'half'\)"),
        ({"backoff": {"after_spikes": 1.5}}, r"backoff.after_spikes must be a whole number \(got 1.5\)"),
        ({"backoff": {"rewarm": 1}}, r"backoff.rewarm must be above 1 \(got 1.0\)"),
        ({"clip": {"spike_ratio": float("nan")}}, r"clip.spike_ratio must be above 1 \(got nan\)"),
        ({"clip": {"max_norm": float("inf")}}, r"clip.max_norm must be above 0 \(got inf\)"),
        ({"agent": {"port": 70000}}, r"agent.port must be at least 0 and at most 65535 \(got 70000\)"),
        ({"agent": {"token_file": 7}}, r"agent.token_file must be a text \(got 7\): file with the bearer tokens"),
        ({"archive": ["a"]}, r"archive must be a text \(got \['a'\]\): directory that outlives the node's"),
        ({"agent": {"port": True}}, r"agent.port must be a whole number \(got True\)"),
        ({"run": 7}, r"run must be a text \(got 7\)"),
        ({"sinks": {"wandb": True}}, r"sinks.wandb must be a text \(got True\): project in Weights & Biases"),
        ({"sinks": {"json": "a"}}, r"unknown setting sinks.json .* did you mean sinks.jsonl\?"),
        ({"metrics": {"level": "all"}}, r"metrics.level must be one of core \| layers \| params \(got 'all'\)"),
        ({"metrics": {"series_budget": 3}}, r"metrics.series_budget must be at least 10 \(got 3\)"),
        ({"metrics": {"layers": 3}}, r"metrics.layers must be a text \(got 3\)"),
        (
            {"metrics": {"layers": r"blocks.(\d+"}},
            r"metrics.layers must be a regular expression \(got 'blocks.\(\\\\d\+': missing \), unterminated.*"
            r"write \\\. .* or null for the built-in rule \[from argument\]",
        ),
    ],
)
def test_bad_settings_are_named_with_value_and_cure(settings: dict, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(settings, environ={})


def test_constructor_checks_too() -> None:
    with pytest.raises(ConfigError, match=r"clip.spike_ratio must be above 1 \(got 0.5\)"):
        Config(clip=ClipConfig(spike_ratio=0.5))


def test_order_is_argument_environment_file_preset(tmp_path: Path) -> None:
    file = tmp_path / "gradmon.yaml"
    file.write_text("preset: strict\nrun: from-file\nbackoff: {factor: 0.4, floor: 0.1}\n")
    environ = {"GRADMON_CONFIG": str(file), "GRADMON_RUN": "123", "GRADMON_BACKOFF__FACTOR": "0.3"}
    loaded = load(environ=environ)
    assert loaded.config.run == "123", "a run that looks like a number stays a text"
    assert (loaded.config.backoff.factor, loaded.config.backoff.floor) == (0.3, 0.1)
    assert loaded.config.clip.spike_ratio == 3.0
    assert loaded.origins["backoff.factor"] == "environment GRADMON_BACKOFF__FACTOR"
    assert loaded.origins["backoff.floor"] == str(file)
    assert loaded.origins["clip.spike_ratio"] == "preset strict"
    assert loaded.origins["backoff.rewarm"] == "default"
    assert load({"run": "mine"}, environ={"GRADMON_RUN": "theirs"}).config.run == "mine"
    assert load(file, environ={"GRADMON_RUN": "theirs"}).config.run == "theirs"


def test_files_of_the_agent_can_be_named_in_the_environment() -> None:
    environ = {"GRADMON_AGENT__TOKEN_FILE": "/run/token", "GRADMON_AGENT__SD_DIR": "/sd", "GRADMON_ARCHIVE": "/kept"}
    config = load(environ=environ).config
    assert (config.agent.token_file, config.agent.sd_dir, config.archive) == ("/run/token", "/sd", "/kept")


def test_finished_config_is_taken_as_it_is() -> None:
    config = Config(backoff=BackoffConfig(factor=0.9))
    assert load(config, environ={"GRADMON_BACKOFF__FACTOR": "0.1"}).config is config


def test_off_is_no_boolean(tmp_path: Path) -> None:
    """YAML reads a bare `off` as false."""
    file = tmp_path / "gradmon.yaml"
    file.write_text("agent: {start: off}\n")
    assert load(file, environ={}).config.agent.start == "off"
    assert load(environ={"GRADMON_AGENT": "off"}).config.agent.start == "off"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", r"must hold `name: value` lines \(got a list\)"),
        ("agent: {prot: 1}", r"unknown setting agent.prot \(from .*bad.yaml\); did you mean agent.port"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load(file, environ={})


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"config file /nonexistent\.yaml does not exist"):
        load("/nonexistent.yaml", environ={})


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load(file, environ={}).config == Config()


def test_misspelt_environment_variable() -> None:
    with pytest.raises(ConfigError, match=r"unknown environment variable GRADMON_RUNN; did you mean GRADMON_RUN\?"):
        load(environ={"GRADMON_RUNN": "x"})


def test_described_config_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = load({"clip": {"max_norm": 1.5}, "run": "a: b"}, environ={})
    file = tmp_path / "described.yaml"
    file.write_text(describe(loaded))
    assert load(file, environ={}).config == loaded.config


def test_a_number_may_have_an_exponent(tmp_path: Path) -> None:
    """PyYAML reads `1e-8` as a text."""
    file = tmp_path / "gradmon.yaml"
    file.write_text("weights: {tiny_gradient: 1e-8, update_small: 2.E-7}\n")
    loaded = load(file, {"GRADMON_CLIP__MAX_NORM": "1e3"}).config
    assert (loaded.weights.tiny_gradient, loaded.weights.update_small, loaded.clip.max_norm) == (1e-8, 2e-7, 1000.0)
    with pytest.raises(ConfigError, match="tiny_gradient must be a number"):
        load({"weights": {"tiny_gradient": "1e-8 or so"}}, {})
