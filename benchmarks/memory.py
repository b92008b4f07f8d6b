"""Free memory, and how the C library manages it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import jax

# If less than this share of memory is free, the C library returns what it keeps.
_LOW = 1 / 3


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep freed memory for the next array.

    By default it returns large arrays to the system, and every result costs the page faults of
    new memory: for a vector of 100 MB here as much as a scan over 64 of them.
    """
    m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def return_freed_memory() -> None:
    """Returns the memory that the C library keeps to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def make_room() -> None:
    """Returns kept memory to the system if little is free.

    Arrays of many sizes, each a little larger, leave holes that fit no other array.
    """
    fields = _meminfo()
    if fields and fields["MemAvailable"] < _LOW * fields["MemTotal"]:
        return_freed_memory()


def free_memory() -> int | None:
    """The free bytes where JAX puts its arrays; None if they are unknown.

    On a CPU the memory that the C library keeps is first returned to the system.
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
    """The memory figures of Linux in bytes; empty on other systems."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return {}
    lines = (line.split(":") for line in info.read_text().splitlines())
    return {name: 1024 * int(value.split()[0]) for name, value in lines}
