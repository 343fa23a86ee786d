"""Which machine measured something: every result file says it."""

import os
import platform
from datetime import date
from pathlib import Path


def cpu_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def stamp():
    """{"machine": {...}, "date": "YYYY-MM-DD"}, to be merged into a result."""
    return {"machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": f"{platform.system()} {platform.machine()}"},
            "date": date.today().isoformat()}
