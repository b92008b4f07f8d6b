"""The verdict of ``gpu_check.py`` and its tables, from the result file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def wrong(results: dict[str, Any]) -> list[str]:
    """The items whose answer is wrong, and why."""
    return [
        f"{part}: {item['name']}"
        for part, found in results["parts"].items()
        for item in found["items"]
        if not item.get("ok", True)
    ]


def left_out(results: dict[str, Any]) -> list[str]:
    """The items that were not measured, because time was short for example."""
    return [f"{part}: {name}" for part, p in results["parts"].items() for name in p["left_out"]]


def show_time(seconds: float) -> str:
    """A time in a suitable unit."""
    unit, scale = next(
        ((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if abs(seconds) >= s), ("µs", 1e-6)
    )
    return f"{seconds / scale:.3g} {unit}"


def _items(results: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [i for i in results["parts"].get(part, {"items": []})["items"] if "error" not in i]


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def table(results: dict[str, Any] | None) -> str:
    """The results as a Markdown table."""
    if results is None:
        return "No GPU has been checked: answers and speed on a GPU stay unmeasured."
    bandwidth = {item["name"]: item["rate"] for item in _items(results, "bandwidth")}
    return "\n\n".join(
        text
        for text in (
            _summary(results, bandwidth),
            _kernels(results),
            _scans(results, bandwidth.get("read")),
            _steps(results),
            _products(results),
        )
        if text
    )


def _summary(results: dict[str, Any], bandwidth: dict[str, float]) -> str:
    e, faults = results["environment"], wrong(results)
    missing = [
        f"{part} ({len(found['left_out'])} of {len(found['left_out']) + len(found['items'])})"
        for part, found in results["parts"].items()
        if found["left_out"]
    ]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GB/s" for name, rate in bandwidth.items())
    text = f"{e['device']}, jax {e['jax']}, {results['date']}. "
    text += f"Bandwidth: {rates}. " if rates else ""
    text += f"Wrong: {'; '.join(faults)}." if faults else "No answer was wrong."
    return text + (f" Not measured: {', '.join(missing)}." if missing else "")


def _kernels(results: dict[str, Any]) -> str:
    lines = {}
    for item in results["parts"].get("kernels", {"items": []})["items"]:
        kernel = item.get("kernel", item["name"].rpartition(", ")[0].rpartition(", ")[0])
        lines.setdefault(kernel, []).append(item)
    for item in _items(results, "optimizer"):
        lines.setdefault("optimizer, against XLA", []).append(item)
    if not lines:
        return ""
    return _rows(
        ["kernel", "right", "largest error, of what is allowed"],
        [
            [
                kernel,
                f"{sum(item['ok'] for item in items)} of {len(items)}",
                f"{max(map(_error, items), key=lambda error: (error != error, error)):.2g}",
            ]
            for kernel, items in lines.items()
        ],
    )


def _error(item: dict[str, Any]) -> float:
    if "error_of_allowed" in item:
        return item["error_of_allowed"]
    return item["largest_difference"] / item["allowed"] if "allowed" in item else float("nan")


def _scans(results: dict[str, Any], read: float | None) -> str:
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for item in _items(results, "scans"):
        key = item["workload"], item["dtype"], item["operation"]
        found.setdefault(key, {})[item["implementation"]] = item

    def products(key: tuple[str, str, str]) -> float | None:
        """The two plain products that a step is compared with."""
        names = ("dots", "combine") if key[2] == "step" else (key[2],)
        parts = [found.get((*key[:2], name), {}).get("plain") for name in names]
        return None if None in parts else sum(part["seconds"] for part in parts if part)

    lines = []
    for key, by in found.items():
        kernel = by.get("kernel")
        share = "-"
        if kernel and read:
            share = f"{kernel['bytes'] / kernel['seconds'] / read:.0%}"
        plain, xla = products(key), by.get("xla")
        lines.append(
            [
                f"{key[0]}, {key[1]}",
                key[2],
                show_time(kernel["seconds"]) if kernel else "-",
                share,
                show_time(xla["seconds"]) if xla else "-",
                show_time(plain) if plain else "-",
            ]
        )
    head = ["gradients", "operation", "kernels", "of the read bandwidth", "XLA", "plain products"]
    return _rows(head, lines) if lines else ""


def _steps(results: dict[str, Any]) -> str:
    lines = [
        [
            "no" if "without" in part else "yes",
            str(item["m"]),
            f"{item['d']:,}",
            *(show_time(item[key]) for key in ("step", "beside_scans", "called")),
        ]
        for part in ("steps", "steps without CUDA graphs")
        for item in _items(results, part)
    ]
    head = ["CUDA graphs", "m", "d", "step, in a loop", "of it beside the scans", "step, called"]
    return _rows(head, lines) if lines else ""


def _products(results: dict[str, Any]) -> str:
    items = _items(results, "products")
    best = {i["workload"]: i["rate"] for i in items if i["operation"] == "one product"}
    lines = [
        [
            item["workload"],
            item["operation"],
            show_time(item["seconds"]),
            f"{item['rate'] / 1e12:.3g} TFLOP/s",
            f"{item['rate'] / best[item['workload']]:.0%}" if item["workload"] in best else "-",
        ]
        for item in items
    ]
    head = ["gradients", "operation", "time", "rate", "of one product's rate"]
    return _rows(head, lines) if lines else ""
