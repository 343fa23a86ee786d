"""EdgeMoE, as a user runs it: a search goes on from what was measured, files shrink as the tolerance rises, experts on disk give the
output of the model in memory, files are what other programs read, and what goes wrong is said in one sentence.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MOIETY = str(Path(os.environ["MOIETY_BIN"]).resolve() / "moiety")
RUN = """
model:
  tokenizer: bytes
  config: {model_type: olmoe, hidden_size: 64, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4,
           num_key_value_heads: 4, num_experts: 4, num_experts_per_tok: 1, norm_topk_prob: false, max_position_embeddings: 128,
           tie_word_embeddings: true}
data: {sources: [{path: text.txt}], length: 64}
train: {steps: STEPS, batch: 8, seed: SEED}
optimizer: {lr: 8.0e-3}
output: {folder: NAME}
"""


def moiety(*args, ok=True):
    done = subprocess.run([MOIETY, *map(str, args)], text=True, capture_output=True, timeout=300)
    assert (done.returncode == 0) == ok, (args, done.returncode, done.stderr[-2000:])
    return done


def refused(text, *args):
    error = moiety(*args, ok=False).stderr.strip().splitlines()[-1]
    assert text in error, (text, error)


def generate(model, *args):
    done = moiety("generate", model, "-p", "The", "--greedy", "--ignore-eos", "-n", 24, "--json", *args)
    out = json.loads(done.stdout)
    return out["completions"][0]["ids"], out.get("offload")


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MOIETY_CACHE"] = f"{folder}/cache"
        Path("text.txt").write_text(moiety("methods", "--json").stdout)
        for name, steps, seed in (("run", 40, 1), ("other", 2, 2)):
            Path("run.yaml").write_text(RUN.replace("STEPS", str(steps)).replace("SEED", str(seed)).replace("NAME", name))
            moiety("train", "run.yaml", "--quiet")
        moiety("convert", "run/last", "-o", "m.gguf")

        def compress(tolerance, out, *args):
            return json.loads(moiety("compress", "m.gguf", "--method", "edgemoe", "--tolerance", tolerance, "--eval", "text.txt", "--limit-tokens",
                                     1500, "--context", 64, "-o", out, "--json", *args).stdout)

        # Losses are kept: another tolerance measures its own walk alone. The larger it is, the smaller the files.
        sizes, first = [], None
        for i, tolerance in enumerate((0.0, 0.001, 0.01, 0.1, 0.5)):
            r = compress(tolerance, f"e{i}.gguf")
            assert len(r["bits"]) == 12 and r["loss_of_experts"] <= tolerance, r
            assert set(r["bits"]) <= set(r["bounds"])
            assert Path(f"e{i}.experts.safetensors").stat().st_size > r["expert_bytes"]
            sizes.append(r["expert_bytes"])
            first = first or r
            assert r["sensitivity"] == first["sensitivity"] and r["uniform_loss"]["32"] == 0
            if i > 0:
                assert r["evaluations"] <= 12, r["evaluations"]
            else:
                assert r["evaluations"] >= 8, r["evaluations"]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1], sizes

        # The written model has the loss that was said: 1 / perplexity against the whole one's.
        def perplexity(model):
            out = json.loads(moiety("eval", model, "--text", "text.txt", "--limit-tokens", 1500, "--context", 64, "--stride", 64, "--json").stdout)
            return out["perplexity"]["perplexity"]

        r = compress(0.01, "e.gguf")
        assert abs((1 - perplexity("m.gguf") / perplexity("e.gguf")) - r["loss"]) < 1e-6, r["loss"]

        # Other programs read the experts: codes, scales, and what they stand for.
        from safetensors.numpy import load_file
        tensors = load_file("e.experts.safetensors")
        for i, bits in enumerate(r["bits"]):
            name = f"blk.{i // 4}.ffn_down.{i % 4}"
            if bits >= 16:
                assert tensors[f"{name}.weight"].shape == (64, 48)
                continue
            assert tensors[f"{name}.q"].shape == (64, -(-48 * bits // 8)) and tensors[f"{name}.scale"].shape == (64,)

        # On disk or in memory, with or without reading ahead: the same.
        moiety("analyze", "expert-paths", "m.gguf", "--text", "text.txt", "--limit-tokens", 1500, "--context", 64, "-o", "p.safetensors")
        assert load_file("p.safetensors")["profile_trace"].shape == (1500, 3, 1)
        for model in ("e.gguf", "m.gguf"):
            whole, _ = generate(model)
            for options in (["--preload", 2], ["--preload", 0], ["--preload", 1, "--io", "sync"], ["--evict", '{"distance": "printed"}']):
                ids, report = generate(model, "--offload", "edgemoe", "--expert-paths", "p.safetensors", "--capacity", 5, *options)
                assert ids == whole, (model, options)
                assert report["lossless"] and report["memory"]["capacity_high"] == 5

        refused("another model", "generate", "other/last", "-p", "x", "--offload", "edgemoe", "--expert-paths", "p.safetensors")
        refused("holds 2 experts, a token needs 3", "generate", "e.gguf", "-p", "x", "--offload", "edgemoe", "--expert-paths", "p.safetensors", "--capacity", 2)
        refused("the smallest that works is", "generate", "e.gguf", "-p", "x", "--offload", "edgemoe", "--expert-paths", "p.safetensors",
                "--memory", "10MiB")
        refused("expert-paths", "generate", "e.gguf", "-p", "x", "--offload", "edgemoe")
        refused("profile_trace", "generate", "m.gguf", "-p", "x", "--offload", "edgemoe", "--expert-paths", "e.experts.safetensors")
        edge = ["compress", "m.gguf", "--method", "edgemoe", "-o", "x.gguf"]
        refused("--eval", *edge)
        refused("at least 0", *edge, "--eval", "text.txt", "--tolerance", "-0.5")
        refused("below 1", *edge, "--eval", "text.txt", "--tolerance", "1")
        refused("2, 4, 8, 16 or 32", *edge, "--eval", "text.txt", "--widths", "2,5")
        refused("already", "compress", "e.gguf", "--method", "edgemoe", "--eval", "text.txt", "-o", "x.gguf")
        Path("e.experts.safetensors").rename("gone")
        refused("e.experts.safetensors", "eval", "e.gguf", "--text", "text.txt")
        assert not list(Path(".").glob(".*gguf*")) and not Path("x.gguf").exists()
    print("ok")


if __name__ == "__main__":
    sys.exit(main())
