"""What the benchmarks under a memory limit share: control groups, sizes, and files dropped from the page cache."""

import os
import subprocess
import sys
import time
from pathlib import Path


def size_of(text):
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text[:-3]) * factor)
    return int(text)


class Group:
    """A memory control group that a child enters before it begins."""

    def __init__(self, limit):
        name = f"moiety-bench-{os.getpid()}"
        v1, v2 = Path("/sys/fs/cgroup/memory") / name, Path("/sys/fs/cgroup") / name
        self.path, self.v1 = None, False
        for path, file, old in ((v1, "memory.limit_in_bytes", True), (v2, "memory.max", False)):
            try:
                path.mkdir()
                (path / file).write_text(str(limit))
                self.path, self.v1 = path, old
                break
            except OSError:
                if path.exists():
                    path.rmdir()
        if self.path is None:
            print("no memory control group can be made here", file=sys.stderr)
            sys.exit(77)
        swap = self.path / ("memory.memsw.limit_in_bytes" if self.v1 else "memory.swap.max")
        try:
            swap.write_text(str(limit) if self.v1 else "0")
        except OSError:
            pass  # a system without swap accounting; this machine's swap is in the record

    def run(self, command, timeout):
        def enter():
            (self.path / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, preexec_fn=enter)

    def peak(self):
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (self.path / name).exists():
                return int((self.path / name).read_text())
        return None

    def killed(self):
        """How often the limit killed something."""
        file = self.path / ("memory.oom_control" if self.v1 else "memory.events")
        for line in file.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def forget(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
