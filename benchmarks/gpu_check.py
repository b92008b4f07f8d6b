"""The first minutes on a GPU: is every kernel right, and how close is it to the bandwidth?

    python benchmarks/gpu_check.py [--output FILE [--only PART ...]] [--docs]

Takes at most eight minutes on an H100. Needs jax 0.10.2 or newer with CUDA, numpy, optax,
jaxtyping and tqdm, and installs nothing. Every part runs in its own process with a time limit, so
a kernel that crashes or hangs loses only its own item. The result file is written after every
item. ``--docs`` only writes the table of ``docs/performance.md`` from the existing file.

The exit status is 0 if no answer is wrong, 1 if one is wrong, and 2 if nothing was checked,
because no supported GPU was found or the options are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_tables import left_out, show_time, table, wrong

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # not installed

PAGE = ROOT / "docs" / "performance.md"
OUTPUT = ROOT / "benchmarks" / "results" / "gpu_check.json"

# The seconds that each part may take; its remaining items are not measured. Together with
# the look at the device they make eight minutes.
LIMITS = {
    "bandwidth": 15,
    "kernels": 90,
    "optimizer": 60,
    "scans": 110,
    "steps": 45,
    "steps without CUDA graphs": 45,
    "products": 55,
}
_FIRST_LOOK = 60  # CUDA's first start on a machine may be slow

# An item without an answer in this time counts as hanging.
_ITEM_LIMIT = 60

RIGHT, WRONG, NO_GPU = 0, 1, 2

# The compute capabilities that the kernels support.
_FROM, _BELOW = 9.0, 11.0


# The process that runs one part.


def work(part: str, first: int, record: Path, *, kernel: str, small: bool) -> None:
    """Runs ``items[first:]`` of a part and adds two lines for each item to a file."""
    if part == "environment":
        record.write_text(json.dumps(_look()) + "\n")
        return
    import gpu_parts

    if kernel == "interpreted":
        gpu_parts.interpret_kernels()
    name = "xla" if kernel == "xla" else "mosaic_gpu"
    with record.open("a") as lines:

        def say(line: Any) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        items = gpu_parts.PARTS[part](gpu_parts.Setting(name, small))
        say({"items": [name for name, _ in items]})
        for name, function in items[first:]:
            say({"began": name})
            try:
                say({"done": function()})
            except Exception as error:
                # A GPU that has failed once may fail at everything: the next item gets a
                # process of its own.
                traceback.print_exc()
                say({"done": {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}})
                return


def _look() -> dict[str, Any]:
    """The device, or ``{"none": reason}``."""
    try:
        import gpu_parts

        return gpu_parts.environment()
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed" if error.name else str(error)
        return {"none": f"{reason} ({sys.executable})"}
    except Exception as error:
        return {"none": f"JAX does not start: {type(error).__name__}: {error}"}


# The process that starts the parts.


class Runner:
    """Runs parts and keeps the result file up to date."""

    def __init__(self, output: Path, options: Sequence[str], env: dict[str, str]):
        self.output, self._options, self._env = output, options, env
        self.results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "parts": {}}

    def save(self) -> None:
        """Writes the results so far."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.results, indent=1) + "\n")

    def environment(self, limit: float) -> dict[str, Any]:
        """The device, or ``{"none": reason}``."""
        lines, fault = self._child("environment", 0, time.monotonic() + limit)
        if lines:
            return lines[0]
        if fault is None:
            return {"none": f"JAX did not name a device within {limit:g} s"}
        return {"none": f"JAX does not start: {fault}"}

    def part(self, part: str, limit: float) -> None:
        """Runs the items of a part; after a failure a new process continues."""
        start = time.monotonic()
        records: list[dict[str, Any]] = []
        found: dict[str, Any] = {"seconds": 0.0, "items": records, "left_out": []}
        self.results["parts"][part] = found
        names = None
        while names is None or len(records) < len(names):
            before = len(records)
            lines, fault = self._child(part, before, start + limit, records)
            names = next((line["items"] for line in lines if "items" in line), names)
            if fault is None:
                break
            if names is None:  # not one item ran: nothing of this part can run
                names = [part]
            if len(records) == before:
                records.append({"name": names[before], "ok": False, "error": fault})
                print(f"  {names[before]}: WRONG: {fault.splitlines()[-1]}", flush=True)
        found["left_out"] = (names or ["all items"])[len(records) :]
        found["seconds"] = round(time.monotonic() - start, 1)
        self.save()

    def _child(
        self, part: str, first: int, deadline: float, records: list[dict[str, Any]] | None = None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """The lines of a child, and its exit status; ``None`` if the deadline ended it."""
        env = dict(self._env)
        if part == "steps without CUDA graphs":
            env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
        with tempfile.TemporaryDirectory() as folder:
            record, errors = Path(folder) / "record", Path(folder) / "errors"
            record.touch()
            command = [sys.executable, __file__, "--child", part, "--first", str(first)]
            command += ["--record", str(record), *self._options]
            lines: list[dict[str, Any]] = []
            with errors.open("w") as stderr:
                child = subprocess.Popen(command, env=env, stdout=stderr, stderr=stderr)
                changed = time.monotonic()
                while True:
                    ended = child.poll() is not None
                    for line in _whole_lines(record)[len(lines) :]:
                        lines.append(line)
                        changed = time.monotonic()
                        if "done" in line and records is not None:
                            self._take(lines[-2]["began"], line["done"], records)
                    if ended:
                        break
                    now = time.monotonic()
                    if now > min(deadline, changed + _ITEM_LIMIT):
                        child.kill()
                        child.wait()
                        hangs = f"no answer within {_ITEM_LIMIT} s"
                        return lines, hangs if now <= deadline else None
                    time.sleep(0.05)
            said = errors.read_text()[-2000:].strip()
            return lines, f"{said}\nended with status {child.returncode}".strip()

    def _take(self, name: str, record: dict[str, Any], records: list[dict[str, Any]]) -> None:
        records.append({"name": name, **record})
        self.save()
        verdict = "" if record.get("ok", True) else "WRONG: "
        shown = record.get("error", ", ".join(_figures(record)))
        print(f"  {name}: {verdict}{shown.splitlines()[0] if shown else 'right'}", flush=True)


def _whole_lines(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines(True) if line[-1] == "\n"]


def _figures(record: dict[str, Any]) -> list[str]:
    """A short form of a record."""
    found = []
    if "error_of_allowed" in record:
        found.append(f"error {record['error_of_allowed']:.1e} of what is allowed")
    if "largest_difference" in record:
        found.append(f"differs by {record['largest_difference']:.1e}")
    bits = ("same_bits", "row_written", "same_rows")
    found += [f"{key} is false" for key in bits if not record.get(key, True)]
    times = {"seconds": "", "step": "step ", "beside_scans": "beside scans ", "called": "called "}
    found += [word + show_time(record[key]) for key, word in times.items() if key in record]
    if "bytes" in record:
        found.append(f"{record['bytes'] / record['seconds'] / 1e9:,.1f} GB/s")
    return found


def _unsupported(environment: dict[str, Any]) -> str | None:
    """Why the kernels cannot run on this device, or ``None``."""
    name, capability = environment["device"], environment["capability"]
    if environment["platform"] not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, got {name} ({environment['platform']})"
    # A GPU of another vendor has a name in place of the number.
    if not isinstance(capability, float) or not _FROM <= capability < _BELOW:
        return (
            f"the kernels need compute capability {_FROM} to below {_BELOW}, such as H100, H200 "
            f"or B200; got {name} with {capability}"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Checks, saves and reports; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"the result file (default: {OUTPUT})")
    only = f"only these parts, into a file named by --output: {'; '.join(LIMITS)}"
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="PART", help=only)
    parser.add_argument("--docs", action="store_true", help="only write the documentation's table")
    # For the tests: kernels interpreted on a CPU, or XLA's forms in their place.
    parser.add_argument("--kernel", default="native", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        work(args.child, args.first, args.record, kernel=args.kernel, small=args.small)
        return RIGHT
    if args.only and args.output is None:
        parser.error(f"--only needs --output, or it would replace what {OUTPUT} says of all parts")
    output = args.output or OUTPUT
    if args.docs:
        if not output.exists():
            parser.error(f"--docs needs a result file; {output} is not there: run the check first")
        import report

        report.write_table(PAGE, "gpu-check", table(json.loads(output.read_text())))
        return RIGHT

    options = ["--kernel", args.kernel] + ["--small"] * args.small
    env = dict(os.environ)
    if args.kernel != "native":
        env["JAX_PLATFORMS"] = "cpu"
    runner = Runner(output, options, env)
    environment = runner.environment(_FIRST_LOOK)
    reason = environment.get("none")
    if reason is None and args.kernel == "native":
        reason = _unsupported(environment)
    if reason is not None:
        print(f"No GPU to check: {reason}.")
        return NO_GPU
    runner.results["environment"] = environment
    runner.save()
    print(f"{environment['device']}, jax {environment['jax']}", flush=True)
    for part in args.only or LIMITS:
        print(f"{part} (at most {LIMITS[part]} s)", flush=True)
        runner.part(part, LIMITS[part])
    faults = wrong(runner.results)
    print("\n" + table(runner.results))
    print(f"\n{output}: {len(faults)} wrong, {len(left_out(runner.results))} not measured.")
    return WRONG if faults else RIGHT


if __name__ == "__main__":
    sys.exit(main())
