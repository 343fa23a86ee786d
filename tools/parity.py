#!/usr/bin/env python3
"""Compares logits of `moiety` with transformers' on a tiny random checkpoint of every model family, and prints a table.

    python3 tools/parity.py                          all families
    python3 tools/parity.py --families llama,mixtral only these (a name, or the start of a fixture's name)
    python3 tools/parity.py --gguf                   also: checkpoint -> `moiety convert` -> GGUF -> logits
    python3 tools/parity.py --json FILE              also write the numbers

Columns: one sequence; a batch of unequal rows padded on the left, and on the right; the left-padded batch fed to the key/value cache
one token at a time, the right-padded one three at a time (transformers is fed the same pieces). Other layouts and config spellings of
a checkpoint are checked with the left-padded batch only. A number is the largest absolute
difference over all real positions, divided by the standard deviation of transformers' logits: logits of unit scale.

Tolerance: 1e-4 in f32, in whatever type the checkpoint is stored. Checkpoints in bf16 are compared once more with both sides
computing in bf16, each against the f32 result. Roundings differ by the order of sums and by where attention rounds, and a near tie
between experts may fall either way. A token whose experts flip is off by ten times the error of its neighbours, so that means over
positions say who had more flips: transformers' own eager and sdpa attention differ by a factor of 1.6 there (qwen3_moe: 0.015 and
0.025), while their medians agree. So the median position must be as good as transformers' (within 1.25 times the larger of the two
attentions, plus 0.001), and the mean within 1.5 times the larger of the two, plus 0.002.
Sentence encoders are compared with sentence-transformers (embeddings, 1e-5).
"""

import argparse
import concurrent.futures
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
import make_fixtures  # starts again with .venv/bin/python when needed

F32_TOLERANCE = 1e-4
EMBED_TOLERANCE = 1e-5
BF16_MEDIAN, BF16_MEAN = (1.25, 0.001), (1.5, 0.002)  # factor of the error of transformers, and what is added
LENGTHS = (40, 17, 29, 1, 33)
LOADING = threading.Lock()  # transformers patches torch while it loads: two threads at once leave tied weights undefined
MODES = ("single", "left", "right", "cache1", "cache3")


def moiety_binary():
    for place in (os.environ.get("MOIETY"), os.environ.get("MOIETY_BIN") and os.environ["MOIETY_BIN"] + "/moiety",
                  make_fixtures.ROOT / "build/bin/moiety"):
        if place and Path(place).exists():
            return str(place)
    sys.exit("parity: build/bin/moiety is missing: run `make build` first")


def rows_of(fixture, vocab):
    """Deterministic ids without the padding id; row lengths are unequal and exceed every window and original context length."""
    import torch

    g = torch.Generator().manual_seed(make_fixtures.seed_of(fixture["name"].split("-")[0]))
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in LENGTHS]


def padded(rows, side):
    import torch

    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return ids, mask


def mode_inputs(mode, rows):
    """rows, padding side, tokens per step (0: all at once)."""
    return {"single": (rows[:1], "right", 0), "left": (rows, "left", 0), "right": (rows, "right", 0), "cache1": (rows, "left", 1),
            "cache3": (rows, "right", 3)}[mode]


def reference_logits(model, mode, rows):
    import torch
    import transformers

    rows, side, step = mode_inputs(mode, rows)
    ids, mask = padded(rows, side)
    model = copy.deepcopy(model)  # rotary embeddings with dynamic scaling remember the longest sequence
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        if not step:
            return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.float(), mask
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        parts = []
        for begin in range(0, ids.shape[1], step):
            piece = slice(begin, begin + step)
            result = model(input_ids=ids[:, piece], attention_mask=mask[:, : begin + step].long(), past_key_values=cache, use_cache=True,
                           position_ids=positions[:, piece])
            parts.append(result.logits.float())
        return torch.cat(parts, 1), mask


def load_reference(fixture, dtype, attention="eager"):
    import torch
    import transformers

    path = Path(fixture["path"]).parent / (fixture["reference"] if fixture["layout"] == "mxfp4" else fixture["name"])
    cls = getattr(transformers, fixture["cls"]) if fixture["cls"] else transformers.AutoModelForCausalLM
    with LOADING:
        return cls.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation=attention).eval()


def bf16_attentions(fixture):
    """transformers refuses sdpa where attention has sinks or caps its logits."""
    return ("eager",) if fixture["family"] in ("gpt_oss", "gemma2") else ("eager", "sdpa")


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).strip().splitlines() if line]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def moiety_logits(binary, path, mode, rows, dtype):
    from safetensors.torch import load_file

    rows, side, step = mode_inputs(mode, rows)
    with tempfile.TemporaryDirectory() as folder:
        batch, out = Path(folder) / "batch.txt", Path(folder) / "out.safetensors"
        batch.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
        run([binary, "logits", str(path), "--batch", str(batch), "--pad-side", side, "--dtype", dtype, "--threads", "1", "-o", str(out)]
            + (["--cache", str(step)] if step else []))
        return load_file(out)


def position_errors(logits, expected, mask):
    """Mean difference of every real position, on logits of unit scale."""
    errors = ((logits - expected)[mask].abs() / expected[mask].std()).mean(-1)
    return errors.nan_to_num(nan=float("inf"))


def compare(got, expected, mask):
    """Largest difference at real positions on logits of unit scale."""
    import torch

    logits = checked(got, expected, mask)
    real = expected[mask]
    worst = ((logits[mask] - real).abs() / real.std()).max().item()
    return worst if worst == worst else float("inf")


def checked(got, expected, mask):
    """The logits of moiety, when they have the shape and the mask of transformers' ones."""
    import torch

    logits = got["logits"].float()
    if logits.shape != expected.shape:
        raise RuntimeError(f"logits have shape {list(logits.shape)}, expected {list(expected.shape)}")
    if "mask" in got and not torch.equal(got["mask"].bool(), mask):
        raise RuntimeError("the padding mask differs")
    return logits


def check_causal(binary, fixture, gguf):
    result = {"name": fixture["name"], "family": fixture["family"], "dtype": fixture["dtype"], "extra": fixture["extra"],
              "layout": fixture["layout"], "config_style": fixture["config_style"], "errors": {}, "tolerance": F32_TOLERANCE}
    model = load_reference(fixture, "float32")
    rows = rows_of(fixture, model.config.get_text_config().vocab_size)
    references = {}
    # Another layout or spelling of one checkpoint changes what is loaded, not what is computed: one mode tells.
    variant = fixture["layout"] == "fused" or fixture["config_style"] != "current"
    modes = ("left",) if variant else MODES
    for mode in modes:
        references[mode] = reference_logits(model, mode, rows)
        try:
            got = moiety_logits(binary, fixture["path"], mode, rows, "f32")
            result[mode] = compare(got, *references[mode])
        except Exception as error:
            result[mode] = None
            result["errors"][mode] = str(error)
    passed = all(result[m] is not None and result[m] <= F32_TOLERANCE for m in modes)
    if fixture["dtype"] == "bfloat16":
        expected, mask = references["left"]
        theirs = [position_errors(reference_logits(load_reference(fixture, "bfloat16", attention), "left", rows)[0], expected, mask)
                  for attention in bf16_attentions(fixture)]
        median, mean = max(e.median().item() for e in theirs), max(e.mean().item() for e in theirs)
        result["bf16_limit"] = BF16_MEDIAN[0] * median + BF16_MEDIAN[1]
        result["bf16_mean_limit"] = BF16_MEAN[0] * mean + BF16_MEAN[1]
        try:
            ours = position_errors(checked(moiety_logits(binary, fixture["path"], "left", rows, "bf16"), expected, mask), expected, mask)
            result["bf16"], result["bf16_mean"] = ours.median().item(), ours.mean().item()
        except Exception as error:
            result["bf16"] = None
            result["errors"]["bf16"] = str(error)
        passed = passed and result["bf16"] is not None and result["bf16"] <= result["bf16_limit"] \
            and result["bf16_mean"] <= result["bf16_mean_limit"]
    if gguf and fixture["gguf"]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = Path(folder) / "x.gguf"
                run([binary, "convert", fixture["path"], "-o", str(file), "--type", "f32"])
                got = moiety_logits(binary, file, "left", rows, "f32")
                result["gguf"] = compare(got, *references["left"])
            except Exception as error:
                result["gguf"] = None
                result["errors"]["gguf"] = str(error)
        passed = passed and result["gguf"] is not None and result["gguf"] <= F32_TOLERANCE
    result["passed"] = passed
    return result


SENTENCES = ["You may reproduce and distribute copies of the Work.", "a", "The license is perpetual, worldwide, and royalty-free; " * 6,
             "Copyright [yyyy] [name of copyright owner]", "Résumé naïve — façade ☃ 你好"]


def check_encoder(binary, fixture):
    import numpy
    from sentence_transformers import SentenceTransformer

    result = {"name": fixture["name"], "family": fixture["family"], "dtype": fixture["dtype"], "extra": fixture["extra"], "layout": fixture["layout"],
              "config_style": fixture["config_style"], "errors": {}, "tolerance": EMBED_TOLERANCE}
    reference = SentenceTransformer(fixture["path"], device="cpu").encode(SENTENCES, convert_to_numpy=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = Path(folder) / "lines.txt"
            text.write_text("\n".join(SENTENCES) + "\n")
            out = json.loads(run([binary, "embed", fixture["path"], "--file", str(text), "--dtype", "f32", "--threads", "1", "--json"]))
            got = numpy.array(embeddings_of(out), dtype=numpy.float64)
            if got.shape != reference.shape:
                raise RuntimeError(f"embeddings have shape {got.shape}, expected {reference.shape}")
            result["single"] = float(numpy.abs(got - reference).max())
        except Exception as error:
            result["single"] = None
            result["errors"]["single"] = str(error)
    result["passed"] = result["single"] is not None and result["single"] <= EMBED_TOLERANCE
    return result


def embeddings_of(out):
    """The rows of `moiety embed --json`."""
    if isinstance(out, dict):
        out = out.get("embeddings", out)
    return [row["embedding"] if isinstance(row, dict) else row for row in out]


def cell(result, column):
    if column not in result:
        return "-"
    value = result[column]
    return "error" if value is None else f"{value:.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated model types, fixture names, or starts of them")
    parser.add_argument("--gguf", action="store_true", help="also convert each to GGUF and compare")
    parser.add_argument("--no-extra", action="store_true", help="only the promised families")
    parser.add_argument("--json", metavar="FILE", help="write the numbers ('-': to standard output instead of the table)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    binary = moiety_binary()

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    begin = time.time()
    found, failed = make_fixtures.make(quiet=True)
    if args.families:
        wanted = [w.strip() for w in args.families.split(",")]
        found = [f for f in found if any(w == f["family"] or f["name"].startswith(w) for w in wanted)]
        if not found:
            sys.exit(f"parity: no fixture or family is called {args.families}")
    if args.no_extra:
        found = [f for f in found if not f["extra"]]

    def check(fixture):
        try:
            return check_encoder(binary, fixture) if fixture["encoder"] else check_causal(binary, fixture, args.gguf)
        except Exception as error:
            return {"name": fixture["name"], "family": fixture["family"], "dtype": fixture["dtype"], "extra": fixture["extra"],
                    "errors": {"reference": f"{type(error).__name__}: {error}"}, "passed": False}

    columns = list(MODES) + ["bf16"] + (["gguf"] if args.gguf else [])
    table = args.json != "-"
    if table:
        print(f"{'checkpoint':30} {'family':16} {'stored':8} " + " ".join(f"{c:>8}" for c in columns), flush=True)
    results = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(check, found):
            results.append(result)
            if table:
                stored = {"float32": "f32", "bfloat16": "bf16"}[result["dtype"]]
                print(f"{result['name']:30} {result['family']:16} {stored:8} " + " ".join(f"{cell(result, c):>8}" for c in columns)
                      + ("  ok" if result["passed"] else "  FAIL"), flush=True)
                for column, text in result["errors"].items():
                    print(f"    {column}: {text}", flush=True)
    # Families beyond the promised list may be missing; those that are there must agree.
    absent = [r["name"] for r in results if r["extra"] and any("is not supported" in e and "model_type" in e for e in r["errors"].values())]
    results = [r for r in results if r["name"] not in absent]
    good = sum(r["passed"] for r in results)
    families = {r["family"] for r in results}
    bad_families = {r["family"] for r in results if not r["passed"]}
    summary = {"checkpoints": len(results), "passed": good, "families": len(families), "families_passed": len(families - bad_families),
               "worst_f32": max((r[m] for r in results for m in MODES if r.get(m) is not None and r["tolerance"] == F32_TOLERANCE), default=None),
               "tolerance_f32": F32_TOLERANCE, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
               "seconds": round(time.time() - begin, 1)}
    if args.json:
        text = json.dumps({"summary": summary, **machine.stamp(), "results": results}, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")
    if table:
        print(f"{good} of {len(results)} checkpoints agree ({len(families - bad_families)} of {len(families)} families) with "
              f"transformers {transformers.__version__}; f32 within {F32_TOLERANCE:g}, {summary['seconds']:.0f} s")
        if absent:
            print(f"not supported, and not promised: {', '.join(absent)}")
        for name in failed:
            print(f"not generated: {name}")
    return 0 if good == len(results) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
