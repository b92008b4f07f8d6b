"""Result files, and the tables that they fill in the documentation.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in a Markdown
file. Benchmarks write it; a test compares it with the result file.
"""

from __future__ import annotations

import json
import platform
import re
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, str]:
    """The machine and the date of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def save(name: str, results: dict) -> None:
    """Writes ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def load(name: str) -> dict:
    """Reads ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin -->\n)(.*?)(<!-- {name}:end -->)", re.DOTALL)


def read_table(path: Path, name: str) -> str:
    """The text between the markers of ``name``."""
    found = _pattern(name).search(path.read_text())
    if found is None:
        raise ValueError(f"{path} has no markers for {name!r}.")
    return found[2].strip()


def write_table(path: Path, name: str, text: str) -> None:
    """Replaces the text between the markers of ``name``."""
    read_table(path, name)
    replaced = _pattern(name).sub(lambda m: f"{m[1]}{text.strip()}\n{m[3]}", path.read_text())
    path.write_text(replaced)
