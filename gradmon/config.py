"""Configuration: frozen dataclasses, filled from an argument, the environment, a YAML file and a preset, in that order.

Every field carries its own range, so that an error can name the field, the value, the range and the cure.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Mode = Literal["guard", "observe"]
Preset = Literal["gentle", "default", "strict"]
Start = Literal["auto", "off"]
MicroSteps = Literal["auto", "off"]
MetricsLevel = Literal["core", "layers", "params"]

ENVIRONMENT_PREFIX = "GRADMON_"
#: Environment variables that other parts read, so that a misspelt setting can still be told from them.
_OTHER_VARIABLES = frozenset({"GRADMON_CONFIG", "GRADMON_TEST_ALL"})
_SHORT_VARIABLES = {"GRADMON_AGENT": "agent.start"}


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, or lies outside its range."""


def _setting(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    pattern: bool = False,
) -> Any:
    """A field with its description and the range `low <= value <= high` (`low < value` if `above`).

    A text with `pattern` is a regular expression.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "pattern": pattern}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The process that serves /metrics and the live page of this node."""

    start: Start = _setting("auto", "auto: attach() starts an agent on local rank 0 where none runs; off: never")
    listen: str = _setting("127.0.0.1", "address the agent listens on")
    port: int = _setting(10855, "first port to try; the next free one is taken", low=0, high=65535)
    linger_seconds: float | None = _setting(
        None, "how long the agent serves on after the last rank; null: 600, and 0 in Slurm and containers", low=0
    )
    token_file: str | None = _setting(None, "file with the bearer tokens that may read, one per line; null: none asked")
    basic_auth_file: str | None = _setting(None, "file with a user:password per line; browsers ask for it; null: none")
    tls_cert: str | None = _setting(None, "PEM file with the certificate to serve HTTPS with; null: plain HTTP")
    tls_key: str | None = _setting(None, "PEM file with its key; null: it is in the certificate's file")
    sd_dir: str | None = _setting(None, "directory in which the agent tells Prometheus of itself (file_sd); null: none")


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """What is measured beyond norm and finiteness, which are measured in every step."""

    detail_every: int = _setting(10, "steps between full statistics of every parameter; 0: after incidents only", low=0)
    zeros_every: int = _setting(100, "steps between counts of zeros on CPU (GPUs count in passing); 0: never", low=0)
    updates_every: int = _setting(100, "steps between measurements of the update-to-weight ratio; 0: never", low=0)
    micro_steps: MicroSteps = _setting("auto", "auto: find the backward that broke, where gradients accumulate; off")


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """When a gradient is scaled down."""

    max_norm: float | None = _setting(None, "fixed clip, as clip_grad_norm_ does; null: none", low=0, above=True)
    spike_ratio: float = _setting(4.0, "a norm this many times the running median is a spike", low=1, above=True)
    spike_sigmas: float = _setting(6.0, "and at least this many of the noise's standard deviations", low=1)
    rescale_first: int = _setting(1, "spikes in a row that are rescaled before the next are skipped", low=0)
    skip_next: int = _setting(3, "spikes skipped after those, before they are rescaled again; 0: never skip one", low=0)


@dataclass(frozen=True, slots=True)
class TrendConfig:
    """What no single step shows: gradients that grow or fade, a loss that rises. Told; only a rollback acts on it."""

    drift_ratio: float = _setting(
        10.0, "recent norms this many times their lowest level are a drift", low=1, above=True
    )
    drift_steps: int = _setting(2000, "steps over which that lowest level is looked for", low=32)
    vanish_ratio: float = _setting(
        1000.0, "recent norms this many times smaller than their highest level have vanished", low=1, above=True
    )
    vanish_steps: int = _setting(500, "steps over which that highest level is looked for", low=32)
    vanish_after: int = _setting(1000, "no gradient is said to vanish before this step", low=0)
    loss_ratio: float = _setting(1.15, "a running loss this far above its best (1: at it) has risen", low=1, above=True)


@dataclass(frozen=True, slots=True)
class BackoffConfig:
    """When the learning rate is lowered, and how it comes back."""

    after_spikes: int = _setting(
        4, "spikes within a few steps that lower the rate, each further one again; 0: never", low=0
    )
    within_steps: int = _setting(16, "how many steps those are", low=1)
    factor: float = _setting(0.3, "factor on the learning rate, each time", low=0, high=1, above=True)
    floor: float = _setting(0.05, "the scale never goes below this", low=0, high=1, above=True)
    rewarm: float = _setting(1.05, "factor per healthy step, back to 1", low=1, above=True)


@dataclass(frozen=True, slots=True)
class RollbackConfig:
    """Snapshots of model and optimizer in host memory, and when the oldest is put back. Needs an observed loss."""

    every_steps: int = _setting(
        0, "healthy steps between snapshots, three are kept in host memory; 0: no rollback", low=0
    )
    max: int = _setting(3, "rollbacks of a run; when they are used up and the next is due, the run stops", low=1)
    near_best: float = _setting(1.05, "no snapshot while the running loss is this far above its best (1: at it)", low=1)
    cooldown_steps: int = _setting(32, "steps after a rollback before the next", low=0)


@dataclass(frozen=True, slots=True)
class LeaveOutConfig:
    """Averaging without the ranks whose gradients are not finite. DDP only."""

    bad_rank: bool = _setting(False, "true: such a rank counts for nothing in the average; false: the step is skipped")
    report_after: int = _setting(10, "a rank left out this many steps in a row is an event", low=1)


@dataclass(frozen=True, slots=True)
class ReplicasConfig:
    """Whether all ranks still hold the same weights. DDP only."""

    check_every: int = _setting(100, "steps between comparisons of all ranks' weights, bit for bit; 0: never", low=0)


@dataclass(frozen=True, slots=True)
class StopConfig:
    """When all ranks end with an error, because training on is a waste. 0: never."""

    after_skips: int = _setting(10, "steps in a row skipped as not finite before the run stops; 0: never", low=0)
    after_scaler_skips: int = _setting(
        10, "steps in a row skipped by the script's GradScaler before the run stops; 0: never", low=0
    )
    on_divergence: bool = _setting(False, "true: stop when ranks no longer hold the same weights")


@dataclass(frozen=True, slots=True)
class IncidentConfig:
    """The bundle that the culprit of an incident saves, for `gradmon replay`."""

    bundles: int = _setting(4, "bundles a rank keeps of one attempt, the first and the newest; 0: none", low=0)
    max_mib: int = _setting(64, "size of one bundle; what does not fit is left out, and it says what", low=1)
    batches: int = _setting(8, "micro-batches of a step to which references are kept, not copies", low=1)
    weights: bool = _setting(False, "true: the weights go into the bundle too, so that replay needs no checkpoint")
    redact: str | None = _setting(
        None,
        "module:function(args, kwargs, loaded) that returns what may be saved of the three, loaded being what the "
        "DataLoader gave (left out if the function takes two arguments and returns two); null: all",
    )


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What of the observed losses is told. Only `overtraining_patience` asks for an end, by `monitor.should_stop`."""

    nonfinite: bool = _setting(True, "true: tell of a loss that is NaN or Inf, and of which ranks; false: never")
    spike_ratio: float = _setting(1.5, "a loss this many times its running median is a spike; 0: never", low=0)
    spike_sigmas: float = _setting(10.0, "and at least this many of the noise's standard deviations", low=1)
    low_ratio: float = _setting(10.0, "a loss that falls at once by this factor is too low; 0: never", low=0)
    low_floor: float = _setting(1e-5, "a running loss from 0 to here is too low; 0: never", low=0)
    flat_steps: int = _setting(1000, "observed losses over which it has to fall; 0: never told", low=0)
    flat_fall: float = _setting(0.001, "by this share of itself, from one half of them to the other", low=0, high=1)
    rise: float = _setting(0.05, "share by which the running loss may rise above its best; 0: never told", low=0)
    constant_steps: int = _setting(20, "exactly equal losses in a row that are told; 0: never", low=0)
    overfit_gap: float = _setting(0.1, "share by which validation may be above training; 0: never told", low=0)
    overfit_patience: int = _setting(3, "validation losses in a row that have to be so far above, and no best", low=1)
    overtraining_patience: int = _setting(
        5, "validation losses in a row without a new best that ask for an end; 0: never", low=0
    )
    overtraining_delta: float = _setting(0.01, "share by which a new best has to be better", low=0, high=1)
    outlier_ratio: float = _setting(
        2.0, "a rank's loss this many times the other ranks', up or down, stands out; 0: never", low=0
    )


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is looked at in the batches that leave a DataLoader."""

    every: int = _setting(50, "batches between looks at one and the next; 0: never look", low=0)
    nonfinite: bool = _setting(True, "true: tell of NaN and Inf in the inputs, and in which sample; false: never")
    range_ratio: float = _setting(
        10.0, "a value this many widths of the usual range outside of it is told; 0: never", low=0
    )
    constant: bool = _setting(True, "true: tell of float inputs with the same value everywhere; false: never")
    duplicate_share: float = _setting(
        0.5, "share of a batch's samples that are like another's, or the batch before's; 0: never", low=0, high=1
    )
    imbalance_ratio: float = _setting(10.0, "most frequent class over the least frequent; 0: never", low=0)
    imbalance_samples: int = _setting(500, "labels to be seen before the classes are judged", low=1)
    token_share: float = _setting(0.8, "share of all tokens that one token may be; 0: never", low=0, high=1)
    label_range: bool = _setting(True, "true: tell of labels below 0, but for -1 and -100; false: never")


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """What is told of weights, gradients and optimizer, by what `measure` measures of each parameter at its cadence."""

    update_large: float = _setting(
        0.1, "update-to-weight ratio above which a matrix moves too fast, three times in a row; 0: never", low=0
    )
    update_small: float = _setting(
        1e-8, "update-to-weight ratio below which a matrix stands still, three times in a row; 0: never", low=0
    )
    unchanged_looks: int = _setting(
        3, "measurements in a row in which weights with a gradient did not change at all; 0: never told", low=0
    )
    zero_looks: int = _setting(3, "measurements in a row in which a whole gradient was 0; 0: never told", low=0)
    tiny_gradient: float = _setting(
        1e-8, "root mean square of a gradient that has vanished, three times in a row; 0: never", low=0
    )
    moments: bool = _setting(True, "true: measure the optimizer's moments, tell if they are not finite; false: never")


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """How finely Prometheus is told of the parameters' gradients. The journal holds them all, whatever is set here."""

    level: MetricsLevel = _setting("layers", "core: no values per layer; layers: per layer; params: per parameter")
    layers: str | None = _setting(
        None,
        "regular expression on parameter names, its first group names the layer; null: up to the first number",
        pattern=True,
    )
    series_budget: int = _setting(2000, "most series of values per layer that one run may have", low=10)


@dataclass(frozen=True, slots=True)
class SinksConfig:
    """Where rank 0 also writes steps and events. A sink whose library is missing warns, and training goes on."""

    jsonl: str | None = _setting(None, "file to which each step and event is appended as a line of JSON; null: none")
    tensorboard: str | None = _setting(None, "log directory of TensorBoard, the run gets a folder in it; null: none")
    wandb: str | None = _setting(
        None, "project in Weights & Biases, in which a run is made unless the script has one; null: none"
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All of gradmon's settings. Build it with `load`, or directly with keywords."""

    run: str | None = _setting(None, "name of the run; null: SLURM_JOB_NAME, else the script's name")
    mode: Mode = _setting("guard", "guard: act; observe: measure, and say what would have been done")
    preset: Preset = _setting("default", "gentle | default | strict: the thresholds to start from")
    dir: str | None = _setting(None, "directory of the journals, on a local disk; null: the first that fits")
    attach_timeout_seconds: float = _setting(60.0, "how long attach() waits for the other ranks", low=0, above=True)
    health_file: str | None = _setting(
        None, "marker file that says whether the weights are fit to be kept; null: health.json beside the journals"
    )
    archive: str | None = _setting(
        None, "directory that outlives the node's, to which the agent copies journals on an incident and at their end"
    )
    journal_mib: int = _setting(64, "size of one rank's journal; older steps are forgotten", low=1)
    agent: AgentConfig = field(default_factory=AgentConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    trend: TrendConfig = field(default_factory=TrendConfig)
    backoff: BackoffConfig = field(default_factory=BackoffConfig)
    rollback: RollbackConfig = field(default_factory=RollbackConfig)
    leave_out: LeaveOutConfig = field(default_factory=LeaveOutConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    incident: IncidentConfig = field(default_factory=IncidentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values, the shape of the YAML file."""
        return dataclasses.asdict(self)


#: What a preset changes against the defaults. `gentle` leaves more alone, `strict` steps in sooner.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "gentle": {
        "clip.spike_ratio": 8.0,
        "clip.spike_sigmas": 8.0,
        "backoff.after_spikes": 8,
        "trend.drift_ratio": 30.0,
        "trend.loss_ratio": 1.5,
        "stop.after_skips": 50,
        "stop.after_scaler_skips": 50,
    },
    "default": {},
    "strict": {
        "clip.spike_ratio": 3.0,
        "clip.spike_sigmas": 5.0,
        "backoff.after_spikes": 2,
        "trend.drift_ratio": 5.0,
        "trend.loss_ratio": 1.1,
        "stop.after_skips": 5,
        "stop.on_divergence": True,
    },
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config, and for every field (`clip.spike_ratio`) where its value came from."""

    config: Config
    origins: Mapping[str, str]


def load(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Put the settings together.

    Args:
        config: a finished `Config` (taken as it is), a mapping like the YAML file's, or the path of such a file.
            None: the file named by GRADMON_CONFIG, if any.
        environ: the environment, `os.environ` if None. `GRADMON_BACKOFF__FACTOR=0.3` sets `backoff.factor`.

    Raises:
        ConfigError: names the field, the value and the cure.
    """
    environ = os.environ if environ is None else environ
    if isinstance(config, Config):
        return Loaded(config, dict.fromkeys(_fields(), "argument"))
    settings: dict[str, tuple[Any, str]] = {}
    if config is None and environ.get("GRADMON_CONFIG"):
        config = environ["GRADMON_CONFIG"]
    if isinstance(config, Mapping):
        argument, file = config, None
    else:
        argument, file = {}, config
    if file is not None:
        settings.update(_flatten(_read_file(Path(file)), str(file)))
    settings.update(_from_environment(environ))
    settings.update(_flatten(argument, "argument"))
    preset = str(settings.get("preset", ("default", ""))[0])
    chosen = PRESETS.get(preset, {})  # a bad preset is reported by _check
    for name, value in chosen.items():
        settings.setdefault(name, (value, f"preset {preset}"))
    origins = {name: settings[name][1] if name in settings else "default" for name in _fields()}
    return Loaded(_build({name: value for name, (value, _) in settings.items()}, origins), origins)


def _fields() -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name -> (type, field) of every leaf of `Config`."""
    found: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    for top in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[top.name]
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            found.update({f"{top.name}.{f.name}": (hints[f.name], f) for f in dataclasses.fields(kind)})
        else:
            found[top.name] = (kind, top)
    return found


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `name: value` lines (got a {type(content).__name__})")
    return content


def _flatten(nested: Mapping[str, Any], origin: str) -> dict[str, tuple[Any, str]]:
    names = _fields()
    sections = {name.partition(".")[0] for name in names if "." in name}
    flat: dict[str, tuple[Any, str]] = {}
    for key, value in nested.items():
        if key in sections:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} (from {origin}) must be a group of settings (got {value!r})")
            flat.update({f"{key}.{inner}": (v, origin) for inner, v in value.items()})
        else:
            flat[str(key)] = (value, origin)
    for name in flat:
        if name not in names:
            raise ConfigError(f"unknown setting {name} (from {origin}){_suggest(name, names)}")
    return flat


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known settings: {', '.join(known)}"


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    names = {ENVIRONMENT_PREFIX + name.replace(".", "__").upper(): name for name in _fields()} | _SHORT_VARIABLES
    found: dict[str, tuple[Any, str]] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in names:
            raise ConfigError(f"unknown environment variable {variable}{_suggest(variable, names)}")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        if value is not None and _takes_text(_fields()[names[variable]][0]):
            value = text  # a run called 123 stays a text
        found[names[variable]] = (value, f"environment {variable}")
    return found


def _takes_text(kind: Any) -> bool:
    return kind is str or any(option is str or isinstance(option, str) for option in typing.get_args(kind))


def _build(flat: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, dot, inner = name.partition(".")
        if dot:
            sections.setdefault(section, {})[inner] = value
        else:
            top[name] = value
    kinds = typing.get_type_hints(Config)
    for section, values in sections.items():
        top[section] = kinds[section](**values)
    try:
        return Config(**top)
    except ConfigError as error:
        name = str(error).partition(" ")[0]
        raise ConfigError(f"{error} [from {origins.get(name, 'argument')}]") from None


def _check(config: Config) -> None:
    for name, (kind, spec) in _fields().items():
        section, dot, inner = name.partition(".")
        holder = getattr(config, section) if dot else config
        value = getattr(holder, inner if dot else section)
        fixed = _checked(name, kind, spec, value)
        if fixed is not value:
            object.__setattr__(holder, inner if dot else section, fixed)


def _checked(name: str, kind: Any, spec: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type, or a ConfigError."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    choices = typing.get_args(kind)
    if choices:
        if isinstance(value, bool):  # YAML reads a bare `off` as false
            value = "on" if value else "off"
        if value not in choices:
            shown = " | ".join(map(str, choices))
            raise ConfigError(f"{name} must be one of {shown} (got {value!r})")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name} must be {_NOUNS[kind]} (got {value!r}): {spec.metadata['help']}")
    low, high, above = (spec.metadata[key] for key in ("low", "high", "above"))
    if kind is bool:
        return value
    if kind is str:
        if spec.metadata["pattern"]:
            _check_pattern(name, value)
        return value
    if not ((low < value if above else low <= value) and value <= high and math.isfinite(value)):
        raise ConfigError(f"{name} must be {_range(low, high, above)} (got {value!r}): {spec.metadata['help']}")
    return value


def _check_pattern(name: str, value: str) -> None:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name} must be a regular expression (got {value!r}: {error});"
            r" write \. \( \[ for the characters themselves, or null for the built-in rule"
        ) from None


#: A number in YAML 1.2; PyYAML, which reads 1.1, takes it for a text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _range(low: float, high: float, above: bool) -> str:
    parts = []
    if math.isfinite(low):
        parts.append(f"{'above' if above else 'at least'} {low:g}")
    if math.isfinite(high):
        parts.append(f"at most {high:g}")
    return " and ".join(parts) or "finite"


def describe(loaded: Loaded) -> str:
    """The effective config as YAML, each line with where its value comes from and what it means."""
    lines: list[str] = []
    section = ""
    for name, (_, spec) in _fields().items():
        head, dot, inner = name.partition(".")
        holder = getattr(loaded.config, head) if dot else loaded.config
        value = getattr(holder, inner if dot else head)
        if dot and head != section:
            lines.append(f"{head}:")
        section = head if dot else ""
        shown = yaml.safe_dump(value).splitlines()[0]
        setting = f"{'  ' if dot else ''}{inner if dot else head}: {shown}"
        lines.append(f"{setting:<34} # {loaded.origins[name]}; {spec.metadata['help']}")
    return "\n".join(lines) + "\n"
