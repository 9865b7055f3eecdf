"""What a measurement was made on, for the first line of its table."""

import os
import platform
from pathlib import Path


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    kernel, python = platform.release().partition("-")[0], platform.python_version()
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, Linux {kernel}, Python {python}"
