"""gradmon: keeps multi-GPU PyTorch training healthy, and says so to Prometheus.

    import gradmon
    monitor = gradmon.attach(model, optimizer)  # after DDP(...)

Importing this package does nothing but define names; torch is imported by `attach`, not here, so that the agent and
the command line run without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "Diagnosis", "Monitor", "TrainingStopped", "__version__", "attach", "doctor"]

if TYPE_CHECKING:
    from gradmon.config import Config, ConfigError
    from gradmon.diagnose.doctor import Diagnosis, doctor
    from gradmon.exits import TrainingStopped
    from gradmon.monitor import Monitor, attach

_HOMES = {
    "attach": "monitor",
    "Monitor": "monitor",
    "TrainingStopped": "exits",
    "doctor": "diagnose.doctor",
    "Diagnosis": "diagnose.doctor",
    "Config": "config",
    "ConfigError": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradmon' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gradmon.{_HOMES[name]}"), name)
