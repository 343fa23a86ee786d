#!/usr/bin/env python3
"""Does llama.cpp load the GGUF files that `moiety convert` writes, and does it compute what moiety computes? Prints a table.

    python3 tools/peer_gguf.py [--families llama,qwen2] [--type f32]

Converts every fixture (tools/make_fixtures.py) whose architecture the format has, and the real SmolLM2 to a few quantized types. The
number is the largest difference between llama.cpp's and moiety's logits for one sequence, on logits of unit scale. llama.cpp keeps keys
and values in f16 and, for block formats, rounds activations to 8 bits, so the tolerance is 0.02 for f32 files and 0.35 for quantized ones
(the mean must stay below a tenth of that): a wrong tensor order or a wrong setting shows as a difference of the order of one.
Exit code 77 without llama-cpp-python (tools/setup.sh peer).
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
from peer_perplexity import model_file, peer_python

ROOT = make_fixtures.ROOT
F32_TOLERANCE, BLOCK_TOLERANCE = 0.02, 0.35


def llama_logits(file, ids, folder):
    import numpy

    out = Path(folder) / "peer.npy"
    done = subprocess.run([peer_python(), str(ROOT / "tools/peer_llama.py"), "logits", str(file), " ".join(map(str, ids)), str(out)],
                          capture_output=True, text=True)
    if done.returncode == 77:
        print("llama-cpp-python is not installed: tools/setup.sh peer", file=sys.stderr)
        sys.exit(77)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise RuntimeError("llama.cpp: " + (lines[-1] if lines else f"exit code {done.returncode}"))
    return numpy.load(out)


def check(binary, path, ids, kind, tolerance):
    import numpy

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        parity.run([binary, "convert", str(path), "-o", str(file), "--type", kind])
        ours = parity.moiety_logits(binary, file, "single", [ids], "f32")["logits"][0].numpy()
        theirs = llama_logits(file, ids, folder)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"llama.cpp gives logits {theirs.shape}, moiety {ours.shape}")
    difference = numpy.abs(ours - theirs) / ours.std()
    worst, mean = float(difference.max()), float(difference.mean())
    return worst, mean, worst <= tolerance and mean <= tolerance / 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated model types or starts of fixture names")
    parser.add_argument("--type", default="f32", help="type to convert the fixtures to")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    binary = parity.moiety_binary()
    found, _ = make_fixtures.make(quiet=True)
    found = [f for f in found if f["gguf"] and f["layout"] != "fused"]
    if args.families:
        wanted = args.families.split(",")
        found = [f for f in found if any(w == f["family"] or f["name"].startswith(w) for w in wanted)]
    jobs = [(f["name"], f["gguf"], f["path"], parity.rows_of(f, 300)[0], args.type, F32_TOLERANCE if args.type in ("f32", "bf16", "f16") else BLOCK_TOLERANCE)
            for f in found]
    if not args.families or "smollm2" in args.families:
        ids = [1, 504, 3575, 282, 4649, 314, 260, 6330, 282, 4649, 30, 216, 1] + list(range(1000, 1040))
        jobs += [(f"SmolLM2-135M as {kind}", "llama", model_file("smollm2"), ids, kind, BLOCK_TOLERANCE) for kind in ("q8_0", "q4_k", "q6_k")]
    print(f"{'checkpoint':28} {'architecture':12} {'type':6} {'largest':>9} {'mean':>9}")
    results = []
    for name, architecture, path, ids, kind, tolerance in jobs:
        entry = {"name": name, "architecture": architecture, "type": kind, "tolerance": tolerance}
        try:
            entry["max"], entry["mean"], entry["passed"] = check(binary, path, ids, kind, tolerance)
            print(f"{name:28} {architecture:12} {kind:6} {entry['max']:9.1e} {entry['mean']:9.1e}  {'ok' if entry['passed'] else 'FAIL'}", flush=True)
        except Exception as error:
            entry.update(passed=False, error=str(error))
            print(f"{name:28} {architecture:12} {kind:6} {'error':>9} {'':>9}  FAIL\n    {error}", flush=True)
        results.append(entry)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    good = sum(r["passed"] for r in results)
    print(f"{good} of {len(results)} files agree with llama.cpp")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
