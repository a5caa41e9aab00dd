"""What a benchmark ran on, for the head of its table."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform


def machine(*packages: str) -> dict[str, str]:
    """Machine, Python, our version and those of these packages, as far as they are installed."""
    from evolink_async import __version__  # not above: what is measured may need less

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), model)
    versions = {"python": platform.python_version(), "evolink_async": __version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"machine": f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}", **versions}
