#!/usr/bin/env python3
"""The mixture layer of moiety and of transformers, forward and backward, side by side in one run.

    python3 bench/side_by_side_moe.py                      E 8, 32 and 64 in f32 and bf16, three rounds
    python3 bench/side_by_side_moe.py --experts 8 --rounds 5
    python3 bench/side_by_side_moe.py --write              also record it in results/moe_layer.json

Both compute the same layer (hidden 512, expert width 1024, two experts a token, 2048 tokens, silu, gates that sum to one), turn by
turn, each in a process of its own with the same threads. transformers runs its eager loop and its
grouped products (`kept`: the latter with an allocator that keeps memory as moiety's does). A result is the best step of all rounds:
what else the machine does slows single steps. `memory` is what a step adds to the process at its fullest.
Exit code 1 when moiety is slower than the best of transformers, or below twice its eager loop.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed

HIDDEN, WIDTH, TOKENS, CHOSEN = 512, 1024, 2048, 2
# Its third way, batched_mm, copies the matrices of every pair of token and expert: 24 GiB here. A moiety process keeps the memory it
# frees; `kept` does the same to transformers by glibc's variables, to show how much of the difference that is. It is not what users get.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "16777216"}
PEERS = {"eager": ("eager", {}), "grouped_mm": ("grouped_mm", {}), "kept": ("grouped_mm", KEPT)}
AS_THEY_ARE = ("eager", "grouped_mm")


def status_mib(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def peer(implementation, experts, dtype, seconds):
    """One round of transformers' block; runs in a process of its own."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(1)
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=experts, num_experts_per_tok=CHOSEN)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    block.to(kind)
    x = torch.randn(1, TOKENS, HIDDEN, dtype=kind, requires_grad=True)
    out = torch.randn(1, TOKENS, HIDDEN, dtype=kind)

    def step():
        for t in (x, *block.parameters()):
            t.grad = None
        block(x).backward(out)

    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    memory = status_mib("VmHWM") - before
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": min(times), "memory_mib": memory, "threads": torch.get_num_threads()}))


def run_peer(name, experts, dtype, seconds):
    implementation, environment = PEERS[name]
    done = subprocess.run([sys.executable, __file__, "--peer", implementation, "--experts", str(experts), "--dtypes", dtype, "--seconds", str(seconds)],
                          capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def run_moiety(binary, names, seconds):
    out = {}
    for name in names:
        # A process each: what another measurement left with the allocator would hide the memory of this one.
        done = subprocess.run([binary, f"--benchmark_filter=^{name}/real_time$", "--benchmark_min_time=0.05", f"--benchmark_repetitions={max(2, round(4 * seconds))}",
                               "--benchmark_format=json"], capture_output=True, text=True, check=True)
        runs = [b for b in json.loads(done.stdout)["benchmarks"] if b["run_type"] == "iteration"]
        b = min(runs, key=lambda b: b["real_time"])
        out[name] = {"seconds": b["real_time"] / 1e3, "gflops": b["gflops"], "memory_mib": runs[0].get("peak_mib", 0.0)}
    return out


def best(rounds):
    rounds = [r for r in rounds if "seconds" in r]
    return min(rounds, key=lambda r: r["seconds"]) if rounds else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=lambda s: [int(n) for n in s.split(",")], default=[8, 32, 64])
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring in a round")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer, args.experts[0], args.dtypes[0], args.seconds)
    binary = str(Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")) / "bench_moe_layer")
    import transformers

    results, failed = [], False
    print(f"{'type':<6}{'E':>4}  {'moiety':>9}{'dense':>9}{'of dense':>9}{'of peak':>9}  " + "".join(f"{p:>12}" for p in PEERS) + f"{'memory':>10}{'theirs':>10}")
    for dtype in args.dtypes:
        for experts in args.experts:
            ours, theirs = [], {p: [] for p in PEERS}
            for _ in range(args.rounds):
                ours.append(run_moiety(binary, [f"mixture/{dtype}/{experts}", f"dense/{dtype}", f"peak/{dtype}"], args.seconds))
                for p in PEERS:
                    theirs[p].append(run_peer(p, experts, dtype, args.seconds))
            mixture, dense, peak = (best([r[n] for r in ours]) for n in (f"mixture/{dtype}/{experts}", f"dense/{dtype}", f"peak/{dtype}"))
            peers = {p: best(r) or r[0] for p, r in theirs.items()}
            ratios = {p: r["seconds"] / mixture["seconds"] for p, r in peers.items() if "seconds" in r}
            # Memory is that of the fastest peer.
            fastest = min((p for p in AS_THEY_ARE if p in ratios), key=ratios.get)
            row = {"dtype": dtype, "experts": experts, "seconds": mixture["seconds"], "gflops": mixture["gflops"],
                   "of_dense": dense["seconds"] / mixture["seconds"], "of_peak": mixture["gflops"] / peak["gflops"], "peak_gflops": peak["gflops"],
                   "memory_mib": mixture["memory_mib"], "peers": peers, "ratios": ratios, "fastest_peer": fastest}
            results.append(row)
            failed |= ratios.get("eager", 9) < 2.0 or ratios[fastest] < 1.0
            print(f"{dtype:<6}{experts:>4}  {mixture['seconds'] * 1e3:>7.0f}ms{dense['seconds'] * 1e3:>7.0f}ms{row['of_dense']:>9.2f}{row['of_peak']:>9.2f}  "
                  + "".join(f"{ratios[p]:>11.2f}x" if p in ratios else f"{'-':>12}" for p in PEERS)
                  + f"{mixture['memory_mib']:>7.0f}MiB{peers[fastest]['memory_mib']:>7.0f}MiB", flush=True)
    if args.write:
        import torch

        path = ROOT / "results/moe_layer.json"
        record = {"hidden": HIDDEN, "width": WIDTH, "tokens": TOKENS, "chosen": CHOSEN, "rounds": args.rounds, "transformers": transformers.__version__,
                  "torch": torch.__version__, **machine.stamp()}
        # Rows are measured one by one: those of an earlier run of the same day, machine and versions stay.
        old = json.loads(path.read_text()) if path.exists() else {}
        kept = old.get("results", []) if all(old.get(k) == v for k, v in record.items()) else []
        rows = {(r["dtype"], r["experts"]): r for r in kept + results}
        record["results"] = [rows[k] for k in sorted(rows, key=lambda k: (k[0] != "f32", k[1]))]
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
