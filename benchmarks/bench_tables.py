"""The tables of the benchmark, from its result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import workloads
from figures import has_figure

from mfac_jax.incremental import ON_CPU_FROM
from mfac_jax.optimizer._precondition import INCREMENTAL_FROM

Results = dict[str, Any]

NAMES = {
    "diagonal": "inverse diagonal",
    "static": "static precomputation",
}


def machines(files: Sequence[Results]) -> str:
    """A row for each machine: its description and its measured speed."""
    return _table(
        ["device", "cores", "free memory", "reads", "copies", "matrix products", "software"],
        [
            [
                _device(r),
                str(r["environment"]["cores"]),
                f"{r['environment']['free_memory_gib']} GiB",
                f"{r['machine']['read_bandwidth'] / 1e9:,.1f} GB/s",
                f"{r['machine']['copy_bandwidth'] / 1e9:,.1f} GB/s",
                f"{r['machine']['matrix_rate'] / 1e9:,.0f} GFLOP/s",
                _software(r),
            ]
            for r in files
        ],
    )


def operations(files: Sequence[Results]) -> str:
    """Whole windows: one table for each device."""
    return _for_each(files, _operations, "operations")


def blocks(files: Sequence[Results]) -> str:
    """The block-wise inverse: one table for each device."""
    return _for_each(files, _blocks, "operations")


def small_steps(files: Sequence[Results]) -> str:
    """The n x n step: one table for each device."""
    return _for_each(files, _small_steps, "small_steps")


def training(files: Sequence[Results]) -> str:
    """Training steps: one table for each device."""
    return _for_each(files, _training, "training")


def scaling(files: Sequence[Results]) -> str:
    """Time against d: one table for each device."""
    return _for_each(files, _scaling, "scaling")


def figures(files: Sequence[Results]) -> str:
    """The figures: one for each device."""
    return "\n\n".join(
        f"![Roofline and time against d on {_device(r)}](assets/roofline-{r['slug']}.png)"
        for r in files
        if has_figure(r)
    )


def bars(files: Sequence[Results]) -> str:
    """The bars and the measured values: one table for each device."""
    if not files:
        return "No machine has been measured yet."
    return _for_each(files, _bars, "machine")


def _for_each(files: Sequence[Results], table: Callable[[Results], str], part: str) -> str:
    """The tables of the files that have the part; a run that was stopped lacks some."""
    return "\n\n".join(f"{table(r)}\n\n{_setting(r)}" for r in files if r.get(part))


def _operations(r: Results) -> str:
    records = [record for record in r["operations"] if record["block"] is None]
    others = [name for name in _contenders(records) if name.startswith("library, ")]
    head = {name: name.removeprefix("library, ").upper() + " on the same rows" for name in others}
    columns = {**head, "plain": "plain XLA", "sequential": "sequential, JAX"}
    columns["PyTorch"] = "sequential, PyTorch"
    lines = [
        [
            record["workload"],
            NAMES.get(record["operation"], record["operation"]),
            *_library(record, r),
            *[_alternative(record, name) for name in columns],
        ]
        for record in records
    ]
    width = len(columns) + 4
    lines += [
        [w["name"], *["-"] * (width - 2), w["reason"]] for w in r["left_out"] if not w["block"]
    ]
    return _table(["workload", "operation", "time", "of the floor", *columns.values()], lines)


def _blocks(r: Results) -> str:
    columns = {
        "plain": "plain XLA",
        "sequential": "sequential, JAX, all blocks at once",
        "block by block": "sequential, JAX, block by block",
        "PyTorch": "sequential, PyTorch",
    }
    lines = [
        [
            record["workload"],
            NAMES.get(record["operation"], record["operation"]),
            *_library(record, r),
            *[_alternative(record, name) for name in columns],
        ]
        for record in r["operations"]
        if record["block"] is not None
    ]
    lines += [[w["name"], *["-"] * 6, w["reason"]] for w in r["left_out"] if w["block"]]
    return _table(["workload", "operation", "time", "of the floor", *columns.values()], lines)


def _small_steps(r: Results) -> str:
    lines = []
    for step in r["small_steps"]:
        times = step["times"]
        whole = times["push + direction"]["median"]
        lines.append(
            [
                str(step["m"]),
                _time(times["refactor"]),
                _time(times["update factor"]),
                _time(times["update inverse"]),
                "the last" if _is_incremental(r, step) else "the first",
                _time(times["push + direction"]),
                f"{100 * _own_small_step(r, step)['median'] / whole:.1f} %",
            ]
        )
    return _table(
        [
            "m",
            "factored again",
            "factor updated",
            "inverse updated",
            "the library takes",
            f"push + direction, d = {r['small_steps'][0]['d']:,}",
            "share of the n x n step",
        ],
        lines,
    )


def _is_incremental(r: Results, step: Results) -> bool:
    """Whether the library updates the inverse of a matrix of this size on this device."""
    return step["m"] >= (ON_CPU_FROM if r["environment"]["platform"] == "cpu" else INCREMENTAL_FROM)


def _own_small_step(r: Results, step: Results) -> Results:
    return step["times"]["update inverse" if _is_incremental(r, step) else "refactor"]


def _training(r: Results) -> str:
    lines = [
        [
            name,
            _time(optimizer["time"]),
            f"{100 * _overhead(r, name):+.1f} %",
            f"{optimizer['state_bytes'] / 2**20:.1f} MiB",
        ]
        for name, optimizer in r["training"]["optimizers"].items()
    ]
    return _table(["optimizer", "a step", "over SGD + momentum", "state"], lines)


def _scaling(r: Results) -> str:
    lines = [
        [
            f"{point['d']:,}",
            _time(point["time"]),
            f"{1e9 * point['time']['median'] / point['d']:.2f}",
        ]
        for point in r["scaling"]["points"]
    ]
    slope = f"Slope of log time against log d: {r['scaling']['slope']:.3f}."
    return _table(["d", "push + direction", "ns a coordinate"], lines) + f"\n\n{slope}"


class Bar(NamedTuple):
    """A bar and how the results are compared with it.

    Attributes:
        what: the measured quantity, in words.
        wanted: the wanted value, in words.
        measured: takes the results and returns the measured value in words, and whether the bar
            is met; None if the results lack it.
    """

    what: str
    wanted: str
    measured: Callable[[Results], tuple[str, bool] | None]


def _bars(r: Results) -> str:
    lines, missing = [], []
    for bar in _bars_of(r):
        found = bar.measured(r)
        if found is None:
            missing.append(bar.what)
            continue
        verdict = "-" if bar.wanted == "-" else "met" if found[1] else "**not met**"
        lines.append([bar.what, bar.wanted, found[0], verdict])
    table = _table(["what", "wanted", "measured", ""], lines) if lines else ""
    rest = f"Not measured yet: {'; '.join(missing)}." if missing else ""
    return "\n\n".join(part for part in (table, rest) if part)


def _bars_of(r: Results) -> list[Bar]:
    d20, d50 = workloads.RESNET20, workloads.RESNET50
    common = [
        Bar("operations slower than plain XLA, or the slowest if none is", "<= 1 x", _slowest),
        Bar("slope of log time against log d, push + direction", "0.95 to 1.05", _slope),
    ]
    if r["environment"]["platform"] == "cpu":
        return [
            Bar(
                "push + direction against two plain matrix-vector products, the worst of all "
                "float32 windows",
                "<= 1.25 x",
                lambda r: _worst_ratio(r, "push + direction", most=1.25),
            ),
            Bar(
                "static precomputation against the paper's sequential one, ResNet-20, n = 512",
                ">= 7 x",
                lambda r: _gain(r, d20, 512, None, 7.0),
            ),
            Bar(
                "block-wise (B = 128) against the same for blocks, ResNet-20, n = 256",
                ">= 8 x",
                lambda r: _gain(r, d20, 256, workloads.BLOCK, 8.0),
            ),
            *common,
            Bar(
                "training step of ResNet-20 with M-FAC, m = 512, over SGD + momentum",
                "-",
                lambda r: _training_overhead(r, None),
            ),
        ]
    if r["environment"]["platform"] == "gpu":
        return [
            Bar(
                "push + direction, ResNet-50, m = 512, of the read bandwidth",
                ">= 90 %",
                lambda r: _fraction(r, "push + direction", d50, 512, 0.90),
            ),
            Bar(
                "push + direction, ResNet-50, m = 512, bfloat16, of the read bandwidth",
                ">= 85 %",
                lambda r: _fraction(r, "push + direction", d50, 512, 0.85, "bfloat16"),
            ),
            Bar("n x n step, m = 512", "<= 100 µs", lambda r: _small_step(r, 512, 1e-4)),
            Bar(
                "static precomputation, ResNet-20, n = 1,024, of the rate of matrix products",
                ">= 60 %",
                lambda r: _fraction(r, "static", d20, 1024, 0.60),
            ),
            Bar(
                "static precomputation, ResNet-20, n = 1,024, against the paper's sequential one",
                ">= 20 x",
                lambda r: _gain(r, d20, 1024, None, 20.0),
            ),
            *common,
            Bar(
                "training step of ResNet-20 with M-FAC, m = 512, over SGD + momentum",
                "<= 5 %",
                lambda r: _training_overhead(r, 0.05),
            ),
        ]
    return common


def _find(
    r: Results, operation: str, d: int, m: int, block: int | None, dtype: str = "float32"
) -> Results | None:
    for record in r.get("operations", []):
        key = tuple(record[name] for name in ("operation", "d", "m", "block", "dtype"))
        if key == (operation, d, m, block, dtype) and "median" in record["times"]["library"]:
            return record
    return None


def _worst_ratio(r: Results, operation: str, *, most: float) -> tuple[str, bool] | None:
    ratios = [
        (record["times"]["library"]["median"] / record["times"]["plain"]["median"], record)
        for record in r.get("operations", [])
        if record["operation"] == operation
        and record["dtype"] == "float32"
        and all("median" in record["times"][name] for name in ("library", "plain"))
    ]
    if not ratios:
        return None
    ratio, record = max(ratios, key=lambda pair: pair[0])
    return f"{ratio:.2f} x ({record['workload']})", ratio <= most


def _gain(r: Results, d: int, m: int, block: int | None, least: float) -> tuple[str, bool] | None:
    record = _find(r, "static", d, m, block)
    if record is None:
        return None
    own = record["times"]["library"]["median"]
    labels = {"sequential": "JAX", "PyTorch": "PyTorch"}
    gains = {
        label: record["times"][name]["median"] / own
        for name, label in labels.items()
        if "median" in record["times"].get(name, {})
    }
    if not gains:
        return None
    words = "; ".join(f"{gain:.2f} x ({label})" for label, gain in gains.items())
    return words, min(gains.values()) >= least


def _fraction(
    r: Results, operation: str, d: int, m: int, least: float, dtype: str = "float32"
) -> tuple[str, bool] | None:
    record = _find(r, operation, d, m, None, dtype)
    if record is None:
        return None
    fraction = floor_seconds(record, r) / record["times"]["library"]["median"]
    return f"{100 * fraction:.0f} %", fraction >= least


def _small_step(r: Results, m: int, most: float) -> tuple[str, bool] | None:
    for step in r.get("small_steps", []):
        if step["m"] == m:
            time = _own_small_step(r, step)
            return _time(time), time["median"] <= most
    return None


def _training_overhead(r: Results, most: float | None) -> tuple[str, bool] | None:
    name = "M-FAC, m = 512"
    if name not in r.get("training", {"optimizers": ()})["optimizers"]:
        return None
    overhead = _overhead(r, name)
    return f"{100 * overhead:+.1f} %", most is None or overhead <= most


def _slope(r: Results) -> tuple[str, bool] | None:
    if "scaling" not in r:
        return None
    slope = r["scaling"]["slope"]
    return f"{slope:.3f}", 0.95 <= slope <= 1.05


def _slowest(r: Results) -> tuple[str, bool] | None:
    """All slower operations whose quartiles do not overlap; push + direction has its own bar."""
    ratios, slower = [], []
    for record in r.get("operations", []):
        times = record["times"]
        comparable = all("median" in times[name] for name in ("library", "plain"))
        if record["operation"] == "push + direction" or not comparable:
            continue
        ratio = times["library"]["median"] / times["plain"]["median"]
        words = f"{ratio:.2f} x ({record['operation']}, {record['workload']})"
        ratios.append((ratio, words))
        if times["library"]["low"] > times["plain"]["high"]:
            slower.append((ratio, words))
    if not ratios:
        return None
    shown = sorted(slower, reverse=True) or [max(ratios)]
    return "; ".join(words for _, words in shown), not slower


def _overhead(r: Results, name: str) -> float:
    optimizers = r["training"]["optimizers"]
    own, baseline = optimizers[name]["time"], optimizers[r["training"]["baseline"]]["time"]
    return own["median"] / baseline["median"] - 1


def floor_seconds(record: Results, r: Results) -> float:
    """The least time the operation's bytes or flops take on the machine."""
    machine = r["machine"]
    return max(
        record["bytes"] / machine["read_bandwidth"], record["flops"] / machine["matrix_rate"]
    )


def _library(record: Results, r: Results) -> list[str]:
    time = record["times"]["library"]
    if "left_out" in time:
        return [time["left_out"], "-"]
    return [_time(time), f"{100 * floor_seconds(record, r) / time['median']:.0f} %"]


def _alternative(record: Results, name: str) -> str:
    """The time of an alternative, also as a multiple of the library's time."""
    time, own = record["times"].get(name), record["times"]["library"]
    if time is None:
        return "-"
    if "left_out" in time:
        return time["left_out"]
    ratio = "" if "left_out" in own else f" ({time['median'] / own['median']:.2f} x)"
    return _seconds(time["median"]) + ratio


def _contenders(records: Sequence[Results]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["times"]))


def _time(time: Results) -> str:
    """Median and quartiles."""
    unit, factor = _unit(time["median"])
    low, median, high = (_digits(factor * time[key]) for key in ("low", "median", "high"))
    return f"{median} {unit} ({low}-{high})"


def _seconds(value: float) -> str:
    unit, factor = _unit(value)
    return f"{_digits(factor * value)} {unit}"


def _unit(value: float) -> tuple[str, float]:
    if value >= 1:
        return "s", 1.0
    return ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)


def _digits(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _device(r: Results) -> str:
    where = r["environment"]
    return where["processor"] if where["platform"] == "cpu" else where["device"]


def _software(r: Results) -> str:
    where = r["environment"]
    torch = f", PyTorch {where['torch']}" if where["torch"] else ""
    return f"jax {where['jax']}, Python {where['python']}{torch}"


def _setting(r: Results) -> str:
    return (
        f"{_device(r)}, {r['environment']['cores']} cores, {_software(r)}, "
        f"{r['environment']['date']}."
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
