#!/usr/bin/env python3
"""A training step of a small mixture model with moiety and with transformers + torch, side by side in one run.

    python3 bench/side_by_side_train.py                    f32 and bf16, three rounds
    python3 bench/side_by_side_train.py --dtypes f32 --rounds 5
    python3 bench/side_by_side_train.py --write            also record it in results/train_step.json

Both train the same Mixtral of about 30 million parameters on the same number of tokens a step, turn by turn, each in a process of
its own with the same threads: forward, backward, gradients clipped to norm 1, AdamW (fused). moiety runs as `moiety train` does,
data, log and all; transformers in a bare loop over random tokens, with its loop over experts (eager) and with its grouped products (its
default). bf16: moiety's dtype bf16, torch's autocast; weights and optimizer are f32 in both. A result is the best
step of all rounds: what else the machine does slows single steps. Beside it stands what share of the fastest matrix product of the same
run the whole step reaches, counting the products of the model alone, not clipping, optimizer, norms and softmax.
Exit code 1 when moiety is below 1.5 times transformers' eager loop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed

BATCH, LENGTH = 4, 256
CONFIG = {"model_type": "mixtral", "hidden_size": 384, "intermediate_size": 480, "num_hidden_layers": 6, "num_attention_heads": 6,
          "num_key_value_heads": 6, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
          "tie_word_embeddings": False}
VOCABULARY = 258  # bytes, begin and end
PEERS = ("eager", "grouped_mm")


def peer(implementation, dtype, steps):
    """One round of transformers; runs in a process of its own."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}, vocab_size=VOCABULARY)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": min(times[2:]), "parameters": sum(p.numel() for p in parameters), "threads": torch.get_num_threads()}))


def run_peer(implementation, dtype, steps):
    done = subprocess.run([sys.executable, __file__, "--peer", implementation, "--dtypes", dtype, "--steps", str(steps)], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def run_moiety(dtype, steps):
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        # Any text of some hundred kilobytes: the speed of a step does not depend on it.
        (at / "text.txt").write_text("\n\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))) * 4, encoding="utf-8")
        run = {"model": {"tokenizer": "bytes", "config": CONFIG}, "data": {"sources": [{"path": str(at / "text.txt")}], "length": LENGTH},
               "train": {"steps": steps, "batch": BATCH, "dtype": dtype},
               "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip": 1.0}, "output": {"folder": str(at / "run")}}
        (at / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
        binary = str(Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")) / "moiety")
        subprocess.run([binary, "train", str(at / "run.yaml")], check=True, capture_output=True, text=True)
        records = [json.loads(line) for line in (at / "run/log.jsonl").read_text().splitlines()]
        rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        return {"seconds": BATCH * LENGTH / max(rates[2:])}


def flops():
    """Of the products of a step: forward, and twice as much backward."""
    c = CONFIG
    matrices = 4 * c["hidden_size"] ** 2 + c["num_experts_per_tok"] * 3 * c["hidden_size"] * c["intermediate_size"] + c["hidden_size"] * c["num_local_experts"]
    # Half of the scores are masked.
    attention = LENGTH * c["hidden_size"]
    return 6 * BATCH * LENGTH * (c["num_hidden_layers"] * (matrices + attention) + VOCABULARY * c["hidden_size"])


def peak(dtype):
    """The fastest product of any size here, in operations a second."""
    import torch

    kind, fastest = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype], 0.0
    for rows, inner, columns in [(1024, 1024, 1024), (2048, 2048, 2048), (1024, 384, 1536), (1024, 1024, 4096)]:
        a, b = torch.randn(rows, inner).to(kind), torch.randn(inner, columns).to(kind)
        for _ in range(12):
            begin = time.perf_counter()
            a @ b
            fastest = max(fastest, 2 * rows * inner * columns / (time.perf_counter() - begin))
    return fastest


def best(rounds):
    rounds = [r for r in rounds if "seconds" in r]
    return min(rounds, key=lambda r: r["seconds"]) if rounds else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of a round; the first two do not count")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer, args.dtypes[0], args.steps)
    import transformers

    results, failed, tokens = [], False, BATCH * LENGTH
    print(f"{'type':<6}{'moiety':>16}" + "".join(f"{p:>16}{'':>8}" for p in PEERS))
    for dtype in args.dtypes:
        ours, theirs = [], {p: [] for p in PEERS}
        limit = 0.0
        for _ in range(args.rounds):
            limit = max(limit, peak(dtype))
            ours.append(run_moiety(dtype, args.steps))
            for p in PEERS:
                theirs[p].append(run_peer(p, dtype, args.steps))
        own, peers = best(ours), {p: best(r) or r[0] for p, r in theirs.items()}
        ratios = {p: r["seconds"] / own["seconds"] for p, r in peers.items() if "seconds" in r}
        reached = flops() / own["seconds"]
        results.append({"dtype": dtype, "seconds": own["seconds"], "tokens_per_second": tokens / own["seconds"], "peers": peers, "ratios": ratios,
                        "gflops": reached / 1e9, "peak_gflops": limit / 1e9, "of_peak": reached / limit})
        failed |= ratios.get("eager", 9) < 1.5
        print(f"{dtype:<6}{tokens / own['seconds']:>10.0f} tok/s"
              + "".join(f"{tokens / r['seconds']:>10.0f} tok/s{ratios[p]:>7.2f}x" if "seconds" in r else f"{'-':>24}" for p, r in peers.items()) + f"   {100 * reached / limit:.0f} % of {limit / 1e9:.0f} GFLOP/s", flush=True)
    if args.write:
        import torch

        path = ROOT / "results/train_step.json"
        path.write_text(json.dumps({"config": CONFIG, "vocabulary": VOCABULARY, "batch": BATCH, "length": LENGTH, "rounds": args.rounds, "steps": args.steps,
                                    "results": results, "transformers": transformers.__version__, "torch": torch.__version__, **machine.stamp()}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
