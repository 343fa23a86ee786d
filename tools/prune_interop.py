#!/usr/bin/env python3
"""Mixtures that `moiety compress` made smaller, in transformers and llama.cpp: the same logits as in moiety. Prints a table.

    tools/setup.sh parity
    python3 tools/prune_interop.py                       every mixture of tools/make_fixtures.py, half of its experts taken out
    python3 tools/prune_interop.py --families mixtral    some of them
    python3 tools/prune_interop.py --out FILE            also as JSON
    tools/setup.sh peer                                  llama.cpp takes part where it is installed

`effect` is how far the smaller model is from the whole one, in transformers: a comparison that could not fail would have none. Figures are the
largest differences between logits, in their standard deviations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_fixtures  # starts again with .venv/bin/python when needed
import parity
from machine import stamp
from peer_gguf import ALTERED, REFUSED, Refused, altered, llama_logits
from peer_perplexity import peer_python

LIMIT = 1e-4


def theirs(path, ids):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def difference(a, b):
    return ((a - b).abs().max() / b.std()).item()


def kept(config):
    """How many experts of a layer stay: half, or as many as a token takes of its groups; None where none can go."""
    groups = config.get("n_group") or 1
    if groups == 1:
        return "0.5"
    size = config["n_routed_experts"] // groups
    each = max(2, (size + 1) // 2, -(-config["num_experts_per_tok"] // config["topk_group"]))
    return None if each == size else str(groups * each)


def check(binary, fixture, keep, ids, peer):
    import torch

    result = {"name": fixture["name"], "family": fixture["family"]}
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        said = json.loads(parity.run([binary, "compress", fixture["path"], "--method", "random", "--keep", keep, "-o", str(small), "--json"]))
        result.update(experts=said["experts"], left=said["left"], standard=said["standard"])
        ours = parity.moiety_logits(binary, str(small), "single", [ids], "f32")["logits"][0].float()
        expected = theirs(small, ids)
        result["effect"] = difference(expected, theirs(fixture["path"], ids))
        result["transformers"] = difference(ours, expected)
        name = fixture["name"].removesuffix("-sparse").removesuffix("-fused")
        # A sparse config.json has no setting to alter.
        changes = ALTERED.get(name.split("-")[0])
        if peer and fixture["gguf"] and name not in REFUSED and not (changes and fixture["name"].endswith("-sparse")):
            file = Path(folder) / "small.gguf"
            # That setting has no key in the file: it counts on our side only.
            if changes:
                ours = parity.moiety_logits(binary, str(altered(small, changes, folder)), "single", [ids], "f32")["logits"][0].float()
            parity.run([binary, "convert", str(small), "-o", str(file), "--type", "f32"])
            try:
                result["llama.cpp"] = difference(torch.from_numpy(llama_logits(file, ids, folder)), ours)
            except Refused as error:
                result["refused"] = str(error)
    compared = [result[k] for k in ("transformers", "llama.cpp") if k in result]
    result["passed"] = result["standard"] and result["effect"] > 1e-2 and all(d <= LIMIT for d in compared) and "refused" not in result
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated model types or starts of fixture names")
    parser.add_argument("--out", metavar="FILE")
    args = parser.parse_args()
    binary = parity.moiety_binary()
    found, _ = make_fixtures.make(quiet=True)
    wanted = args.families.split(",") if args.families else None
    peer = subprocess.run([peer_python(), "-c", "import llama_cpp"], capture_output=True).returncode == 0
    results = []
    print(f"{'checkpoint':32} {'experts':>9} {'effect':>8} {'transformers':>12} {'llama.cpp':>10}")
    for f in found:
        config = json.loads((Path(f["path"]) / "config.json").read_text()) if (Path(f["path"]) / "config.json").exists() else {}
        if not any(config.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts")) or f["layout"] == "mxfp4":
            continue
        if wanted and not any(w == f["family"] or f["name"].startswith(w) for w in wanted):
            continue
        keep = kept(config)
        if keep is None:
            continue
        try:
            r = check(binary, f, keep, parity.rows_of(f, 300)[0], peer)
        except RuntimeError as error:
            r = {"name": f["name"], "family": f["family"], "passed": False, "error": str(error)}
        results.append(r)
        figures = f"{r['left']:>4}/{r['experts']:<4} {r['effect']:8.2f} {r['transformers']:12.1e}" if "effect" in r else r["error"]
        last = f"{r['llama.cpp']:10.1e}" if "llama.cpp" in r else r.get("refused", "")
        print(f"{r['name']:32} {figures} {last} {'' if r['passed'] else 'FAILED'}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": stamp(), "limit": LIMIT, "cases": results}, indent=1) + "\n")
    failed = [r["name"] for r in results if not r["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} agree" + ("" if peer else "; llama.cpp is not installed (tools/setup.sh peer)"))
    sys.exit(1 if failed or not results else 0)


if __name__ == "__main__":
    main()
