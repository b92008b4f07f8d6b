"""Free memory, and what the C library makes of it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import jax

# Below this share of all memory, what the C library keeps is given back.
_LOW = 1 / 3


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep what is freed for the next array.

    It would hand large arrays back, and every result would cost the page faults of memory
    that is new: for a vector of 100 MB here as much as a scan over 64 of them.
    """
    m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def return_freed_memory() -> None:
    """Gives back what the C library keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def make_room() -> None:
    """Gives it back where little is left.

    Arrays of many sizes, a little larger each time, leave holes that fit no other.
    """
    fields = _meminfo()
    if fields and fields["MemAvailable"] < _LOW * fields["MemTotal"]:
        return_freed_memory()


def free_memory() -> int | None:
    """Bytes that are free where JAX puts its arrays, None where nobody says.

    On a CPU what the C library keeps is given back first.
    """
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu":
        return None
    return_freed_memory()
    fields = _meminfo()
    if fields:
        return fields["MemAvailable"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo() -> dict[str, int]:
    """Linux's own account, in bytes; empty elsewhere."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return {}
    lines = (line.split(":") for line in info.read_text().splitlines())
    return {name: 1024 * int(value.split()[0]) for name, value in lines}
