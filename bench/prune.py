#!/usr/bin/env python3
"""Half of the experts of a mixture far larger than memory, taken out under a hard memory limit, beside a plain copy of as many bytes.

    python3 bench/prune.py                        a 24 GB Mixtral of random weights, in shards, under 3 GB; needs 40 GB of disk
    python3 bench/prune.py --write                record it in results/prune.json
    python3 bench/prune.py --params 1B --memory 512MiB --folder /tmp/x

The model is written by `moiety make-model` and removed at the end (--keep leaves it). Both runs begin with the model dropped from the page cache
and end when everything is on disk; the limit counts page cache too. The ratio is copy time over pruning time: 1 is the speed of the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "bench"))
import machine
from limits import Group, forget, size_of

BINARY = str(Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")) / "moiety")


def bytes_of(folder):
    return sum(f.stat().st_size for f in Path(folder).iterdir())


def cold(folder):
    for file in Path(folder).iterdir():
        forget(file)


def sync(folder):
    for file in Path(folder).iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def timed(group, command, out, model):
    cold(model)
    begin = time.perf_counter()
    done = group.run(command, timeout=3600)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    sync(out)
    return time.perf_counter() - begin, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="12B")
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--folder", default=str(ROOT / "build/bench-prune"), help="where the models lie while it runs")
    parser.add_argument("--keep", action="store_true", help="leave the model for another run")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    limit = int(float(args.memory[:-2]) * 1e9) if args.memory.endswith("GB") else size_of(args.memory)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, half, copy = folder / "model", folder / "half", folder / "copy"
    if not model.exists():
        subprocess.run([BINARY, "make-model", "--family", "mixtral", "--params", args.params, "-o", str(model), "--quiet"], check=True)
    sync(model)
    for old in (half, copy):
        shutil.rmtree(old, ignore_errors=True)
    with Group(limit) as group:
        seconds, text = timed(
            group, [BINARY, "compress", str(model), "--method", "random", "--keep", "0.5", "-o", str(half), "--json"], half, model)
        report = json.loads(text)
        peak, killed = group.peak(), group.killed()
    written = bytes_of(half)
    shutil.rmtree(half)
    # The same number of bytes from the same shards, in the order of the file.
    copy.mkdir()
    script = f"head -c {written} <(cat {model}/*.safetensors) > {copy}/bytes"
    with Group(limit) as group:
        plain, _ = timed(group, ["bash", "-c", script], copy, model)
    shutil.rmtree(copy)
    record = {
        "model_bytes": bytes_of(model), "written_bytes": written, "experts": report["experts"], "left": report["left"],
        "limit_bytes": limit, "peak_bytes": peak, "killed": killed, "seconds": seconds, "copy_seconds": plain,
        "ratio_to_copy": plain / seconds, "bytes_a_second": written / seconds, "machine": machine.stamp(),
    }
    if not args.keep:
        shutil.rmtree(folder)
    print(json.dumps(record, indent=1))
    if args.write:
        (ROOT / "results/prune.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
