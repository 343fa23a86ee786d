#!/usr/bin/env python3
"""Does llama.cpp load the GGUF files that `moiety convert` writes, and does it compute what moiety computes? Prints a table.

    python3 tools/peer_gguf.py [--families llama,qwen2] [--type f32]

Converts every fixture (tools/make_fixtures.py) whose architecture the format has, and the real SmolLM2 to a few types. The number is the
largest difference between llama.cpp's and moiety's logits for one sequence, on logits of unit scale, both with keys and values in f32.
Files of plain types must agree within 1e-4, or 1e-2 where llama.cpp looks GELU up in a table of f16 numbers. With block formats llama.cpp
rounds all activations to 8 bits and moiety most, and small differences grow with depth: moiety must then lie within 0.35, and a tenth of
that in the mean, of its own f32 arithmetic on the same file, nearer than llama.cpp in the mean (or within 1e-3), and within 1 and 0.1 of
llama.cpp. A few files are known to be refused or computed otherwise by llama.cpp: REFUSED and ALTERED say which and why, and a refusal must
be that one.
Exit code 77 without llama-cpp-python (tools/setup.sh peer).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_fixtures  # starts again with .venv/bin/python when needed
import parity
from peer_perplexity import model_file, peer_python

ROOT = make_fixtures.ROOT
PLAIN_TOLERANCE, TABLE_TOLERANCE, BLOCK_TOLERANCE = 1e-4, 1e-2, 1.0
EXACT_TOLERANCE = 0.35  # of block formats against the same file in f32
GELU = {"gemma", "gemma2", "gemma3"}
# What llama.cpp does not load, and what it must say then.
REFUSED = {
    "phi3": ("unordered_map::at", "it looks for the names of Phi-3's own special tokens"),
    "deepseek_v2-lite": ("q_lora_rank", "it knows attention without a query rank by 27 layers only"),
    "deepseek_v3-no-q-lora": ("q_lora_rank", "it knows attention without a query rank by 26 or 27 layers only"),
}
# What llama.cpp computes otherwise, and the setting with which both compute the same: it always rounds the ends of YaRN's ramp.
ALTERED = {"gpt_oss": {"rope_parameters": {"truncate": True}}}


class Refused(Exception):
    pass


def llama_logits(file, ids, folder):
    import numpy

    out = Path(folder) / "peer.npy"
    done = subprocess.run([peer_python(), str(ROOT / "tools/peer_llama.py"), "logits", str(file), " ".join(map(str, ids)), str(out)],
                          capture_output=True, text=True)
    if done.returncode == 77:
        print("llama-cpp-python is not installed: tools/setup.sh peer", file=sys.stderr)
        sys.exit(77)
    if done.returncode != 0:
        said = done.stderr + done.stdout
        errors = [line for line in said.splitlines() if "error" in line.lower()]
        raise Refused(errors[0] if errors else f"exit code {done.returncode}")
    return numpy.load(out)


def altered(path, changes, folder):
    """A copy of the checkpoint with other settings."""
    copy = Path(folder) / "altered"
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def check(binary, path, ids, kind, tolerance, changes):
    """Compares with moiety on the file, or on the altered checkpoint: that setting has no key in the file."""
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        source = altered(path, changes, folder) if changes else path
        parity.run([binary, "convert", str(source), "-o", str(file), "--type", kind])
        blocks = tolerance == BLOCK_TOLERANCE

        def logits(dtype):
            return parity.moiety_logits(binary, source if changes else file, "single", [ids], dtype)["logits"][0].float().numpy()

        exact = logits("f32")
        ours = logits("auto") if blocks else exact
        theirs = llama_logits(file, ids, folder)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"llama.cpp gives logits {theirs.shape}, moiety {ours.shape}")
    difference = numpy.abs(ours - theirs) / ours.std()
    worst, mean = float(difference.max()), float(difference.mean())
    passed = worst <= tolerance and mean <= tolerance / 10
    if blocks:
        own, peer = numpy.abs(ours - exact) / exact.std(), numpy.abs(theirs - exact) / exact.std()
        passed = passed and own.max() <= EXACT_TOLERANCE and own.mean() <= min(EXACT_TOLERANCE / 10, max(peer.mean(), 1e-3))
        if not passed:
            print(f"from f32: moiety {own.max():.1e}, mean {own.mean():.1e}; llama.cpp {peer.max():.1e}, mean {peer.mean():.1e}")
    return worst, mean, passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated model types or starts of fixture names")
    parser.add_argument("--type", default="f32", help="type to convert the fixtures to")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    binary = parity.moiety_binary()
    found, _ = make_fixtures.make(quiet=True)
    # A sparse config.json has no setting to alter.
    found = [f for f in found if f["gguf"] and f["layout"] != "fused" and not (f["family"] in ALTERED and f["config_style"] == "sparse")]
    if args.families:
        wanted = args.families.split(",")
        found = [f for f in found if any(w == f["family"] or f["name"].startswith(w) for w in wanted)]

    def tolerance_of(fixture):
        if args.type not in ("f32", "bf16", "f16"):  # into which blocks of a fixture are decoded, too
            return BLOCK_TOLERANCE
        return TABLE_TOLERANCE if fixture["gguf"] in GELU else PLAIN_TOLERANCE

    jobs = [(f["name"], f["gguf"], f["path"], parity.rows_of(f, 300)[0], args.type, tolerance_of(f)) for f in found]
    if not args.families or "smollm2" in args.families:
        ids = [1, 504, 3575, 282, 4649, 314, 260, 6330, 282, 4649, 30, 216, 1] + list(range(1000, 1040))
        jobs += [(f"SmolLM2-135M as {kind}", "llama", model_file("smollm2"), ids, kind, BLOCK_TOLERANCE if kind != "f32" else PLAIN_TOLERANCE)
                 for kind in ("f32", "q8_0", "q4_0", "q4_k", "q6_k")]
    print(f"{'checkpoint':28} {'architecture':12} {'type':6} {'largest':>9} {'mean':>9}")
    results = []
    for name, architecture, path, ids, kind, tolerance in jobs:
        entry = {"name": name, "architecture": architecture, "type": kind, "tolerance": tolerance}
        known = REFUSED.get(name.removesuffix("-sparse"))
        try:
            entry["max"], entry["mean"], entry["passed"] = check(binary, path, ids, kind, tolerance, ALTERED.get(name.split("-")[0]))
            print(f"{name:28} {architecture:12} {kind:6} {entry['max']:9.1e} {entry['mean']:9.1e}  {'ok' if entry['passed'] else 'FAIL'}", flush=True)
        except Refused as error:
            entry.update(passed=known is not None and known[0] in str(error), error=str(error))
            print(f"{name:28} {architecture:12} {kind:6} {'refused':>9} {'':>9}  {'ok: ' + known[1] if entry['passed'] else 'FAIL'}", flush=True)
            if not entry["passed"]:
                print(f"    llama.cpp: {error}")
        except Exception as error:
            entry.update(passed=False, error=str(error))
            print(f"{name:28} {architecture:12} {kind:6} {'error':>9} {'':>9}  FAIL\n    {error}", flush=True)
        results.append(entry)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    good = sum(r["passed"] for r in results)
    refused = sum(r["passed"] and "error" in r for r in results)
    print(f"{good - refused} of {len(results)} files agree with llama.cpp, {refused} are refused by it as known")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
