#!/usr/bin/env python3
"""Adapters between `moiety` and PEFT, both ways, on tiny random models: logits of the same adapter have to agree.

    tools/setup.sh parity
    python3 tools/peft_interop.py                 a table
    python3 tools/peft_interop.py --out FILE      also as JSON

from PEFT: PEFT writes an adapter with random matrices, `moiety logits --adapter` reads it.
to PEFT:   `moiety train` writes one after a few steps, PEFT reads it.
merged:    `moiety merge` writes a model, transformers reads it.
The figure is the largest difference over all positions, divided by the standard deviation of PEFT's logits.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
import torch
import transformers
import peft
from safetensors.torch import load_file

from machine import stamp

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "build/bin/moiety"
LIMIT = 1e-4
VOCABULARY = 260

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=VOCABULARY, max_position_embeddings=128)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = ATTENTION + ["gate_proj", "up_proj", "down_proj"]

# name, model, PEFT's settings, the part that moiety trains (none: only from PEFT), through GGUF too
CASES = [
    ("LoRA", "llama", dict(r=4, lora_alpha=8, target_modules=ALL), dict(rank=4, alpha=8, target="all")),
    ("rsLoRA", "llama", dict(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"]),
     dict(rank=8, alpha=4, rslora=True, target=["q_proj", "v_proj"])),
    ("DoRA", "llama", dict(r=4, lora_alpha=8, use_dora=True, target_modules=ALL), dict(rank=4, alpha=8, dora=True, target="all")),
    ("patterns", "llama", dict(r=4, lora_alpha=8, target_modules=ALL, rank_pattern={"layers.1.self_attn.q_proj": 7, "down_proj": 2},
                               alpha_pattern={"v_proj": 3}),
     dict(rank=4, alpha=8, target="all", rank_pattern={r"layers\.1\.self_attn\.q_proj": 7, "down_proj": 2}, alpha_pattern={"v_proj": 3})),
    ("some layers", "llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
     dict(rank=4, alpha=8, target=["q_proj", "down_proj"], layers="0,2")),
    ("biases in the base", "qwen2", dict(r=4, lora_alpha=8, target_modules=ALL), dict(rank=4, alpha=8, target="all")),
    ("DoRA, biases in the base", "qwen2", dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj"]),
     dict(rank=4, alpha=8, dora=True, target=["q_proj", "v_proj"])),
    ("biases of adapted matrices", "qwen2", dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "o_proj"], bias="lora_only"),
     dict(rank=4, alpha=8, target=["q_proj", "k_proj", "o_proj"], bias="lora_only")),
    ("DoRA, biases trained", "qwen2", dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj"], bias="lora_only"),
     dict(rank=4, alpha=8, dora=True, target="q_proj", bias="lora_only")),
    ("all biases", "qwen2", dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], bias="all"),
     dict(rank=4, alpha=8, target=["q_proj", "down_proj"], bias="all")),
    ("all biases, of norms too", "starcoder2", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="all"),
     dict(rank=4, alpha=8, target=["q_proj", "v_proj"], bias="all")),
    ("experts", "mixtral", dict(r=4, lora_alpha=8, target_modules=["q_proj"],
                                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
     dict(rank=4, alpha=8, target=["q_proj", "experts.gate_up_proj", "experts.down_proj"])),
    ("experts, one A for all", "qwen3_moe", None,
     dict(rank=4, alpha=8, target=["experts.gate_up_proj", "experts.down_proj"], experts="shared")),
    ("down of experts only", "qwen3_moe", dict(r=4, lora_alpha=8, target_modules=[], target_parameters=["mlp.experts.down_proj"]),
     dict(rank=4, alpha=8, target=["experts.down_proj"])),
    ("fused matrices", "phi3", dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]), None),
]


def make_model(kind):
    torch.manual_seed(7)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**SIZES)
    elif kind == "starcoder2":
        config = transformers.Starcoder2Config(**SIZES, bos_token_id=0, eos_token_id=0)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    elif kind == "phi3":
        config = transformers.Phi3Config(**SIZES, pad_token_id=0)
    else:
        config = transformers.Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                                             decoder_sparse_step=1, mlp_only_layers=[])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stderr.strip()}")
    return done.stdout


def moiety_logits(model, ids, extra=()):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as out:
        run([BINARY, "logits", model, "--ids", " ".join(str(i) for i in ids), "--dtype", "f32", "-o", out.name, *extra])
        return load_file(out.name)["logits"].float().reshape(len(ids), -1)


def difference(a, b):
    return ((a - b).abs().max() / b.std()).item()


def check(name, kind, settings, part, folder):
    result = {"case": name, "model": kind}
    base = folder / "base"
    model = make_model(kind)
    model.save_pretrained(base)
    ids = torch.randint(0, VOCABULARY, (17,), generator=torch.Generator().manual_seed(3)).tolist()
    if settings is not None:
        config = peft.LoraConfig(**settings)
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
        for n, p in adapted.named_parameters():
            if "lora_B" in n or "lora_A" in n:
                torch.nn.init.normal_(p, std=0.1)
            elif "magnitude" in n:
                p.data *= 1 + 0.3 * torch.rand_like(p)
            elif p.requires_grad:  # a bias
                p.data += 0.3 * torch.randn_like(p)
        adapted.save_pretrained(folder / "theirs")
        expected = adapted(input_ids=torch.tensor([ids])).logits[0].detach()
        plain = model(input_ids=torch.tensor([ids])).logits[0].detach()
        result["effect"] = difference(expected, plain)
        result["from_peft"] = difference(moiety_logits(base, ids, ["--adapter", folder / "theirs"]), expected)
        run([BINARY, "merge", base, "--adapter", folder / "theirs", "-o", folder / "merged"])
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
        result["merged"] = difference(merged(input_ids=torch.tensor([ids])).logits[0].detach(), expected)
        if kind in ("llama", "qwen2"):
            run([BINARY, "convert", base, "-o", folder / "base.gguf", "--type", "f32"])
            result["gguf_base"] = difference(moiety_logits(folder / "base.gguf", ids, ["--adapter", folder / "theirs"]), expected)
    if part is not None:
        (folder / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(3000)))
        run_file = folder / "run.yaml"
        run_file.write_text(json.dumps({
            "model": {"checkpoint": str(base), "tokenizer": "bytes"}, "parts": [{"slug": "lora", **part}],
            "data": {"sources": [{"path": str(folder / "text.txt")}], "length": 32}, "train": {"steps": 6, "batch": 2},
            "optimizer": {"lr": 0.05}, "output": {"folder": str(folder / "run")}}))
        run([BINARY, "train", run_file, "--quiet"])
        last = folder / "run/last"
        theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
                                                str(last.resolve())).eval()
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].detach()
        plain = model(input_ids=torch.tensor([ids])).logits[0].detach()
        result["trained_effect"] = difference(expected, plain)
        result["to_peft"] = difference(moiety_logits(last, ids), expected)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results as JSON")
    parser.add_argument("--only", help="cases whose names contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, bad = [], 0
    print(f"{'case':<26} {'model':<10} {'from PEFT':>10} {'to PEFT':>10} {'merged':>10} {'over GGUF':>10}")
    for name, kind, settings, part in CASES:
        if options.only and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                r = check(name, kind, settings, part, Path(folder))
            except Exception as e:  # noqa: BLE001  every case is reported
                r = {"case": name, "model": kind, "error": str(e)}
        results.append(r)
        if "error" in r:
            print(f"{name:<26} {kind:<10} {r['error'].splitlines()[-1]}")
            bad += 1
            continue
        values = [r.get(k) for k in ("from_peft", "to_peft", "merged", "gguf_base")]
        # An adapter that does nothing would prove nothing.
        fails = any(v is not None and not v <= LIMIT for v in values) or any(r.get(k, 1) < 0.01 for k in ("effect", "trained_effect"))
        bad += fails
        print(f"{name:<26} {kind:<10} " + " ".join(f"{v:>10.1e}" if v is not None else f"{'-':>10}" for v in values) + ("  <-" if fails else ""))
    if options.out:
        Path(options.out).write_text(json.dumps({"limit": LIMIT, "results": results, "peft": peft.__version__,
                                                 "transformers": transformers.__version__, **stamp()}, indent=1) + "\n")
    print(f"{len(results) - bad} of {len(results)} agree within {LIMIT:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
