"""What sinks have written, read by others' rules: strict JSON, and the file of an offline W&B run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

_BLOCK = 32768


def json_lines(path: Path) -> list[dict[str, Any]]:
    """A bare NaN or Infinity, which Python would read, is an error."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def wandb_rows(folder: Path) -> tuple[list[dict[str, Any]], list[Any], int]:
    """(rows of the history, definitions of metrics, exit records) of an offline run; the file is a log of LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    rows: list[dict[str, Any]] = []
    metrics: list[Any] = []
    exits = 0
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        _crc, length, kind = struct.unpack("<IHB", data[at : at + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:  # padding up to the next block
            at += left
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of it, or its last part
            found, record = Record.FromString(record), b""
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            elif found.WhichOneof("record_type") == "metric":
                metrics.append(found.metric)
            exits += found.WhichOneof("record_type") == "exit"
    return rows, metrics, exits
