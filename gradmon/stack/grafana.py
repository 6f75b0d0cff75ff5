"""Grafana, where it is installed: provisioned with Prometheus as its source and gradmon's dashboards."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from gradmon.stack.servers import Server, find_program, free_port, write_yaml

#: Where distributions and Grafana's own packages put what is not configuration.
_HOMES = ("/usr/share/grafana", "/usr/local/share/grafana", "/opt/homebrew/share/grafana")


def dashboards_directory() -> Path | None:
    """Folder of the dashboards' JSON: of the installed package, or of the checkout it runs from."""
    candidates = (
        Path(sysconfig.get_path("data")) / "share" / "gradmon" / "dashboards",
        Path(__file__).resolve().parents[2] / "dashboards",
    )
    return next((path for path in candidates if any(path.glob("*.json"))), None)


def start_grafana(directory: Path, prometheus: str, *, port: int = 0) -> Server | None:
    """Start it for whoever is on this machine, as viewer without a password; None if it is not installed."""
    program = find_program("grafana")
    if program is None:
        return None
    port = free_port(port)
    provisioning = directory / "grafana" / "provisioning"
    write_yaml(
        provisioning / "datasources" / "gradmon.yaml",
        {
            "apiVersion": 1,
            "datasources": [
                {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
            ],
        },
    )
    dashboards = dashboards_directory()
    providers = [] if dashboards is None else [_provider(dashboards)]
    write_yaml(provisioning / "dashboards" / "gradmon.yaml", {"apiVersion": 1, "providers": providers})
    environment = {
        **os.environ,
        "GF_PATHS_DATA": str(directory / "grafana" / "data"),
        "GF_PATHS_LOGS": str(directory / "grafana" / "logs"),
        "GF_PATHS_PLUGINS": str(directory / "grafana" / "plugins"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    command = [program, *(["server"] if Path(program).name == "grafana" else [])]
    home = next((path for path in _HOMES if Path(path).is_dir()), None)
    command += [] if home is None else [f"--homepath={home}"]
    return Server("grafana", command, directory, port=port, ready="/api/health", environment=environment)


def _provider(dashboards: Path) -> dict[str, object]:
    return {
        "name": "gradmon",
        "folder": "gradmon",
        "folderUid": "gradmon",
        "type": "file",
        "allowUiUpdates": True,
        "options": {"path": str(dashboards)},
    }
