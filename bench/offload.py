#!/usr/bin/env python3
"""A mixture of four times the memory it may have: moiety's experts on disk beside llama.cpp with its mapped file, under one hard limit.

    python3 bench/offload.py                      a 2.1 GB mixture (Q8_0, 32 experts, 4 a token) under 500 MiB
    python3 bench/offload.py --write              record it in results/offload.json
    python3 bench/offload.py --peer --write       llama.cpp alone, into the same record
    python3 bench/offload.py --model m.gguf --memory 1GiB --tokens 64

Every run has a memory control group of its own with that limit (version 1 or 2; needs the right to make one, else exit code 77), and begins
with the model's pages dropped from the page cache. Decoding speed is measured behind a prompt of a few tokens.

A disk is not equally fast from one minute to the next. So the kinds of runs alternate over several rounds, and directly before and after each
run, in its control group, the same file is read with nothing else going on: direct reads as large as the run's own, as many in flight, at
random places. The mean of the two is the disk's speed for this run. A run around which the disk's speed changed by more than CHANGE, or during
which this program was stopped, is measured again. Medians count; the spread is recorded beside them.

llama.cpp runs by llama-cpp-python (tools/setup.sh peer), mapped and not locked, with the same threads. Where it is not installed, what is
recorded of it for the same model, memory and threads stays, with its date.
"""

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
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
BLOCK = 4096
IN_FLIGHT = 5      # the store's buffers but for the one that is being unpacked
PROBE = 768 << 20  # bytes
CHANGE = 1.5
TRIES = 4


def disk_rate(path, piece, most=PROBE):
    """Bytes a second of direct reads of `piece` bytes at random places of the file, IN_FLIGHT at a time."""
    forget(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    places = range(0, os.path.getsize(path) - piece, BLOCK)
    offsets = iter(random.Random(os.getpid()).choices(places, k=max(IN_FLIGHT, most // piece)))
    lock, done = threading.Lock(), [0] * IN_FLIGHT

    def read(worker):
        buffer = mmap.mmap(-1, piece)
        while True:
            with lock:
                at = next(offsets, None)
            if at is None:
                return
            done[worker] += os.preadv(fd, [buffer], at)

    workers = [threading.Thread(target=read, args=(i,)) for i in range(IN_FLIGHT)]
    begin = time.perf_counter()
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    took = time.perf_counter() - begin
    os.close(fd)
    return sum(done) / took


class Stopped:
    """Notices whether this process stood still for a while."""

    def __enter__(self):
        self.longest, self.through = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        last = time.monotonic()
        while not self.through.wait(0.05):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def __exit__(self, *_):
        self.through.set()
        self.thread.join()

    def __bool__(self):
        return self.longest > 0.5


def generate(group, model, memory, tokens, options, timeout):
    forget(model)
    command = [BINARY, "generate", model, "-p", PROMPT, "--temperature", "2", "--seed", "7", "--ignore-eos", "-n", str(tokens), "--memory", str(memory), "--json", "-q", *options]
    done = group.run(command, timeout)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], "killed": group.killed()}
    return json.loads(done.stdout)


def piece_of(model, memory, options, timeout):
    """Bytes of a read of such a run, widened to whole blocks as direct reads are."""
    with Group(memory) as group:
        out = generate(group, model, memory, 4, options, timeout)
    if "error" in out:
        return 1 << 20
    o = out["offload"]
    return (o["bytes_read"] // o["reads"] // BLOCK + 2) * BLOCK


def ours(model, memory, tokens, options, piece, timeout):
    """One run between two measurements of the disk, or the error it ended with."""
    for attempt in range(TRIES):
        with Stopped() as stopped, Group(memory) as group:
            probe = [sys.executable, __file__, "--model", model, "--probe", str(piece)]
            before = float(group.run(probe, timeout).stdout)
            out = generate(group, model, memory, tokens, options, timeout)
            if "error" in out:
                return out
            after = float(group.run(probe, timeout).stdout)
            killed, peak = group.killed(), group.peak()
        if not stopped and max(before, after) <= CHANGE * min(before, after):
            break
    else:
        return {"error": f"the machine was not quiet in any of {TRIES} tries"}
    s, o = out["stats"], out["offload"]
    disk, read = (before + after) / 2, o["decode"]["bytes_read"]
    return {"tokens_per_second": (s["generated_tokens"] - 1) / s["decode_seconds"], "decode_seconds": s["decode_seconds"],
            # What the bytes that were read would take at the disk's speed, of the time that passed.
            "of_disk": read / disk / s["decode_seconds"], "disk_bytes_per_second": disk, "disk_before": before, "disk_after": after, "tries": attempt + 1,
            "ids": out["completions"][0]["ids"], "peak_resident": o["memory"]["peak_resident"], "group_peak": peak, "killed": killed,
            **{k: o["decode"][k] for k in ("hit_rate", "lossless", "altered_share", "bytes_read", "reads", "read_seconds", "disk_seconds", "stall_seconds", "guess_precision",
                                           "read_ahead", "read_ahead_used", "read_ahead_unused", "read_ahead_cancelled")},
            "memory": o["memory"]}


SPREAD = ("tokens_per_second", "of_disk", "disk_bytes_per_second")


def summary(rounds):
    """The medians of several runs, the worst of what a limit holds for, and between which bounds the speeds lie."""
    for r in rounds:
        if "error" in r:
            return r
    out = {}
    for key, first in rounds[0].items():
        values = [r[key] for r in rounds]
        if key in ("peak_resident", "group_peak", "killed"):
            out[key] = max(values)
        elif key == "lossless":
            out[key] = all(values)
        elif key != "ids" and key != "tries" and isinstance(first, (int, float)):
            out[key] = statistics.median(values)
    out["spread"] = {key: [min(r[key] for r in rounds), max(r[key] for r in rounds)] for key in SPREAD}
    out["memory"] = rounds[0]["memory"]
    out["rounds"] = [{k: v for k, v in r.items() if k in (*SPREAD, "decode_seconds", "bytes_read", "disk_before", "disk_after", "tries")} for r in rounds]
    return out


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


def kept_peer(old):
    """What is recorded of llama.cpp, with its date."""
    return {"date": old["date"], **old["llama_cpp"]} if old.get("llama_cpp") else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file; otherwise one is made and kept in the cache")
    parser.add_argument("--memory", default="500MiB", type=size_of)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180)
    parser.add_argument("--only", help="of the runs, that one")
    parser.add_argument("--peer", action="store_true", help="measure llama.cpp alone")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(disk_rate(args.model, args.probe))
        return 0
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
    file = ROOT / "results/offload.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    record = {"model": "mixtral 2B Q8_0, 32 experts, 4 a token" if not args.model else Path(args.model).name, "bytes": size, "memory": args.memory,
              "times": size / args.memory, "tokens": args.tokens, "threads": THREADS, **machine.stamp()}
    print(f"{model}: {record['times']:.1f} times the memory of {args.memory >> 20} MiB")
    if any(old.get(k) != record[k] for k in ("model", "bytes", "memory", "threads", "machine")):
        old = {}
    if args.peer:
        if not old:
            sys.exit(f"{file} is of another model, memory or machine: measure all of it")
        record = old
    else:
        cases = {"lru": (model, ["--offload", "lru"]), "lfu": (model, ["--offload", "lfu"]),
                 "hobbit, lossless": (model, ["--offload", "hobbit", "--t1", "1", "--t2", "1"]), "hobbit": (low, ["--offload", "hobbit"])}
        cases = {k: v for k, v in cases.items() if args.only in (None, k)}
        pieces = {name: piece_of(of, args.memory, options, args.timeout) for name, (of, options) in cases.items()}
        all_rounds = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, (of, options) in cases.items():
                r = ours(of, args.memory, args.tokens, options, pieces[name], args.timeout)
                all_rounds[name].append(r)
                if "error" in r:
                    print(f"{name:<18} {r['error']}", flush=True)
                    continue
                print(f"{name:<18} {r['tokens_per_second']:7.2f} tokens/s, {100 * r['hit_rate']:.0f} % in memory, {r['bytes_read'] / 1e6:.0f} MB read, "
                      f"disk {r['disk_before'] / 1e6:.0f} and {r['disk_after'] / 1e6:.0f} MB/s, {100 * r['of_disk']:.0f} % of it, at most "
                      f"{r['peak_resident'] / 2**20:.0f} MiB resident{'' if r['lossless'] else ', not lossless'}", flush=True)
        same = {tuple(r["ids"]) for rounds in all_rounds.values() for r in rounds if r.get("lossless")}
        record.update(rounds=args.rounds, reads={name: {"bytes": piece, "in_flight": IN_FLIGHT} for name, piece in pieces.items()},
                      runs={name: summary(rounds) for name, rounds in all_rounds.items()}, lossless_runs_agree=len(same) == 1)
    peer = theirs(model, args.memory, args.tokens, args.timeout)
    if peer:
        print(f"{'llama.cpp, mapped':<18} " + (peer["error"] if "error" in peer else f"{peer['tokens_per_second']:7.2f} tokens/s"))
        peer["date"] = machine.stamp()["date"]
    record["llama_cpp"] = peer or kept_peer(old)
    if args.write:
        file.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
