#!/usr/bin/env python3
"""A mixture of four times the memory it may have: moiety's experts on disk beside llama.cpp with its mapped file, under one hard limit.

    python3 bench/offload.py                      a 2.1 GB mixture (Q8_0, 32 experts, 4 a token) under 500 MiB
    python3 bench/offload.py --write              record it in results/offload.json
    python3 bench/offload.py --model m.gguf --memory 1GiB --tokens 64

Every run has a memory control group of its own with that limit (version 1 or 2; needs the right to make one, else exit code 77), and begins
with the model's pages dropped from the page cache. Decoding speed is measured behind a prompt of a few tokens. The disk's own speed is measured
with direct reads of the same file. llama.cpp runs by llama-cpp-python (tools/setup.sh peer), mapped and not locked, with the same threads.
"""

import argparse
import json
import mmap
import os
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
CACHE = Path(os.environ.get("MOIETY_CACHE", Path.home() / ".cache/moiety"))
PEER = CACHE / "peer/bin/python"
THREADS = len(os.sched_getaffinity(0))
PROMPT = "O"


def disk_rate(path, most=512 << 20, piece=1 << 20):
    """Bytes a second of direct reads, four at a time, spread over the file."""
    from concurrent.futures import ThreadPoolExecutor

    forget(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    total = os.path.getsize(path) // piece
    count = min(total, most // piece)
    offsets = [(i * 7919 % total) * piece for i in range(count)]

    def read(share):
        buffer = mmap.mmap(-1, piece)
        return sum(os.preadv(fd, [buffer], at) for at in share)

    begin = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(read, [offsets[i::4] for i in range(4)]))
    os.close(fd)
    return done / (time.perf_counter() - begin)


def ours(model, memory, tokens, options, timeout):
    forget(model)
    command = [BINARY, "generate", model, "-p", PROMPT, "--temperature", "2", "--seed", "7", "--ignore-eos", "-n", str(tokens), "--memory", str(memory), "--json", "-q", *options]
    with Group(memory) as group:
        done = group.run(command, timeout)
        killed, peak = group.killed(), group.peak()
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], "killed": killed}
    out = json.loads(done.stdout)
    s, o = out["stats"], out["offload"]
    return {"tokens_per_second": (s["generated_tokens"] - 1) / s["decode_seconds"], "decode_seconds": s["decode_seconds"], "ids": out["completions"][0]["ids"],
            "peak_resident": o["memory"]["peak_resident"], "group_peak": peak, "killed": killed,
            "memory": o["memory"], "whole": {k: o[k] for k in ("bytes_read", "hit_rate")},
            **{k: o["decode"][k] for k in ("hit_rate", "lossless", "altered_share", "bytes_read", "read_seconds", "stall_seconds", "guess_precision")}}


THEIRS = """
import json, sys, time
import llama_cpp
model, tokens, threads, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
m = llama_cpp.Llama(model_path=model, n_ctx=256, n_batch=32, n_ubatch=32, use_mmap=True, use_mlock=False, verbose=False, n_threads=threads,
                    n_threads_batch=threads)
m.eval(list(range(70, 86)))
begin = time.perf_counter()
done = 0
while done < tokens and (done < 2 or time.perf_counter() - begin < limit):
    m.eval([(done * 37 + 80) % 250])
    done += 1
print(json.dumps({"tokens_per_second": done / (time.perf_counter() - begin), "tokens": done, "version": llama_cpp.__version__}))
"""


def theirs(model, memory, tokens, timeout):
    if not PEER.exists():
        return None
    forget(model)
    with Group(memory) as group:
        try:
            done = group.run([str(PEER), "-c", THEIRS, model, str(tokens), str(THREADS), str(timeout / 3)], timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not through after {timeout} s"}
        killed, peak = group.killed(), group.peak()
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], "killed": killed}
    return {**json.loads(done.stdout.splitlines()[-1]), "group_peak": peak, "killed": killed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; otherwise one is made and kept in the cache")
    parser.add_argument("--memory", default="500MiB", type=size_of)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--timeout", type=float, default=180)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    folder = CACHE / "peer-models"
    folder.mkdir(parents=True, exist_ok=True)
    model = args.model
    if not model:
        model = str(folder / "mixtral-2b-q8_0.gguf")
        if not Path(model).exists():
            subprocess.run([BINARY, "make-model", "--family", "mixtral", "--params", "2B", "--format", "q8_0", "-o", model, "-q"], check=True)
    low = model.removesuffix(".gguf") + ".hobbit.gguf"
    if not Path(low).exists():
        subprocess.run([BINARY, "compress", model, "--add-low-experts", "q4_0", "-o", low, "-q"], check=True)
    size = os.path.getsize(model)
    disk = disk_rate(model)
    print(f"{model}: {size / args.memory:.1f} times the memory of {args.memory >> 20} MiB; the disk reads {disk * 1e-6:.0f} MB/s")
    runs = {}
    cases = [("lru", model, ["--offload", "lru"]), ("lfu", model, ["--offload", "lfu"]),
             ("hobbit, lossless", model, ["--offload", "hobbit", "--t1", "1", "--t2", "1"]), ("hobbit", low, ["--offload", "hobbit"])]
    for name, file, options in cases:
        r = runs[name] = ours(file, args.memory, args.tokens, options, args.timeout)
        if "error" in r:
            print(f"{name:<18} {r['error']}")
            continue
        # What the misses alone would take at the disk's speed.
        r["of_disk"] = r["bytes_read"] / disk / r["decode_seconds"]
        print(f"{name:<18} {r['tokens_per_second']:7.2f} tokens/s, {100 * r['hit_rate']:.0f} % in memory, {r['bytes_read'] / 1e6:.0f} MB read, "
              f"{100 * r['of_disk']:.0f} % of the disk's limit, at most {r['peak_resident'] / 2**20:.0f} MiB resident"
              f"{'' if r['lossless'] else ', not lossless'}", flush=True)
    same = {tuple(r["ids"]) for n, r in runs.items() if "ids" in r and r["lossless"]}
    for r in runs.values():
        r.pop("ids", None)
    peer = theirs(model, args.memory, args.tokens, args.timeout)
    if peer:
        print(f"{'llama.cpp, mapped':<18} " + (peer["error"] if "error" in peer else f"{peer['tokens_per_second']:7.2f} tokens/s"))
    record = {"model": "mixtral 2B Q8_0, 32 experts, 4 a token" if not args.model else Path(args.model).name, "bytes": size, "memory": args.memory,
              "times": size / args.memory, "tokens": args.tokens, "threads": THREADS, "disk_bytes_per_second": disk, "runs": runs, "llama_cpp": peer,
              "lossless_runs_agree": len(same) == 1, **machine.stamp()}
    if args.write:
        (ROOT / "results/offload.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
