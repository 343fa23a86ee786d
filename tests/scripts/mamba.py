"""A decoder whose attention is Mamba's layer, against the same model put together from transformers' MambaMixer, MLP and norms: one
sequence, batches padded on both sides, fed to the cache one token and three tokens at a time. Then what verbs make of such a model.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

try:
    from transformers import DynamicCache, LlamaConfig, MambaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
    from transformers.models.mamba.modeling_mamba import MambaMixer
except ImportError:
    print("skipped: transformers has no Mamba")
    sys.exit(77)

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
ROWS = [[5, 9, 31, 2, 17, 8, 8, 3, 30, 12, 1], [7, 21, 4], [1, 2, 3, 4, 5, 6, 7]]
TOLERANCE = 1e-5  # of logits of unit scale: both compute in f32


class Reference(torch.nn.Module):
    def __init__(self, llama, mamba):
        super().__init__()
        self.cache_config = mamba
        self.embed = torch.nn.Embedding(llama.vocab_size, llama.hidden_size)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"input_layernorm": LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps), "self_attn": MambaMixer(mamba, i),
                                 "post_attention_layernorm": LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps), "mlp": LlamaMLP(llama)})
            for i in range(llama.num_hidden_layers))
        self.norm = LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps)

    def forward(self, ids, mask=None, cache=None):
        x = self.embed(ids)
        for b in self.blocks:
            x = x + b["self_attn"](b["input_layernorm"](x), cache=cache, attention_mask=mask)
            x = x + b["mlp"](b["post_attention_layernorm"](x))
        return self.norm(x) @ self.embed.weight.T

    def stored(self):
        out = {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        for i, b in enumerate(self.blocks):
            out |= {f"model.layers.{i}.{name}": t for name, t in b.state_dict().items()}
        return {name: t.detach().clone().contiguous() for name, t in out.items()}


def run(*words, fails=False):
    done = subprocess.run([MOIETY, *map(str, words)], text=True, capture_output=True, timeout=600)
    assert (done.returncode != 0) == fails, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert done.returncode in (0, 1, 2), (words, done.returncode, done.stderr)  # an error, no crash
    return done.stderr if fails else done.stdout


def padded(side):
    width = max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.long), torch.zeros(len(ROWS), width, dtype=torch.long)
    for i, row in enumerate(ROWS):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def compare(folder, reference, name):
    def logits(*words):
        out = folder / "out.safetensors"
        run("logits", folder, "--dtype", "f32", "-o", out, *words)
        return load_file(out)["logits"]

    def check(got, want, mask, what):
        error = ((got - want)[mask.bool()].abs().max() / want[mask.bool()].std()).item()
        assert got.shape == want.shape and error < TOLERANCE, f"{name}, {what}: off by {error}"

    batch = folder / "batch.txt"
    batch.write_text("".join(" ".join(map(str, row)) + "\n" for row in ROWS))
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = padded(side)
            if reference.cache_config.use_bias:
                # To transformers padding is not nothing then: the convolution sees the bias of in_proj. Each row alone.
                want = torch.zeros(*ids.shape, reference.embed.num_embeddings)
                for i, row in enumerate(ROWS):
                    want[i, mask[i].bool()] = reference(torch.tensor([row]))[0]
            else:
                want = reference(ids, mask)
            for more in ([], ["--cache", "1"], ["--cache", "3"], ["--cache", "4", "--cache-type", "q8_0"]):
                check(logits("--batch", batch, "--pad-side", side, *more), want, mask, f"padded on the {side} {more}")
        # transformers token by token; padding and its cache do not go together.
        one = torch.tensor(ROWS[:1])
        cache = DynamicCache(config=reference.cache_config)
        steps = torch.cat([reference(one[:, t:t + 1], cache=cache) for t in range(one.shape[1])], 1)
        for more in ([], ["--cache", "1"]):
            check(logits("--ids", " ".join(map(str, ROWS[0])), *more), steps, torch.ones_like(one), f"one sequence {more}")


with tempfile.TemporaryDirectory() as top:
    torch.manual_seed(3)
    for name, settings, theirs in (
            ("as it is", {}, {}),
            ("small", {"state": 5, "expand": 3, "kernel": 2, "rank": 3, "bias": True, "conv_bias": False},
             {"state_size": 5, "expand": 3, "conv_kernel": 2, "time_step_rank": 3, "use_bias": True, "use_conv_bias": False})):
        llama = LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True)
        mamba = MambaConfig(hidden_size=24, num_hidden_layers=2, **theirs)
        assert settings or (mamba.state_size, mamba.expand, mamba.conv_kernel, mamba.time_step_rank) == (16, 2, 4, 2), mamba
        reference = Reference(llama, mamba).eval()
        # Their initialisation is nearly without memory.
        for parameter in reference.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        folder = Path(top) / name.replace(" ", "-")
        folder.mkdir()
        config = llama.to_dict() | {"moiety": {"parts": [{"slug": "mamba"} | settings]}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(reference.stored(), folder / "model.safetensors")
        compare(folder, reference, name)

    # Verbs on such a model, trained for a moment.
    top = Path(top)
    (top / "text.txt").write_text("one two three four five six seven\n" * 200)
    (top / "run.yaml").write_text(f"""
model:
  tokenizer: bytes
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           max_position_embeddings: 256, tie_word_embeddings: true}}
parts: [{{slug: mamba}}]
data: {{sources: [{{path: {top}/text.txt}}], length: 64}}
train: {{steps: 30, batch: 8}}
optimizer: {{lr: 1.0e-2}}
output: {{folder: {top}/run}}
""")
    run("train", top / "run.yaml")
    model = top / "run" / "last"
    whole = run("generate", model, "-p", "one two", "--max-tokens", "12", "--greedy")
    assert "three" in whole, whole
    for words in (["--cache-type", "q8_0"], ["--dtype", "bf16"], ["--threads", "1"]):
        assert run("generate", model, "-p", "one two", "--max-tokens", "12", "--greedy", *words) == whole, words
    run("eval", model, "--text", top / "text.txt", "--limit-tokens", "500", "--context", "64")
    run("info", model)
    said = run("generate", model, "-p", "one", "--max-tokens", "2", "--offload", "lru", "--memory", "1G", fails=True)
    assert "no expert layers" in said, said
    for kind in ("q8_0", "f16"):
        said = run("convert", model, "-o", top / f"model-{kind}.gguf", "--type", kind, fails=True)
        assert "A_log' has no place in a GGUF file" in said, said
    run("bench", model, "-p", "8", "-n", "4", "--depth", "8", "-r", "2")
    talk = subprocess.run([MOIETY, "chat", model, "--template", "plain", "--max-tokens", "4", "--greedy"], input="one\ntwo\n", text=True,
                          capture_output=True, timeout=600)
    assert talk.returncode == 0, talk.stderr
    run("convert", model, "-o", top / "copy")
    assert run("generate", top / "copy", "-p", "one two", "--max-tokens", "12", "--greedy") == whole
    for bad, part in (("{slug: mamba, state: 0}", "state"), ("{slug: mamba, kernel: many}", "kernel"), ("{slug: mamba, layers: 7}", "7"),
                      ("{slug: mamba, stat: 4}", "state")):
        (top / "bad.yaml").write_text((top / "run.yaml").read_text().replace("{slug: mamba}", bad).replace("/run}", "/bad}"))
        assert part in run("train", top / "bad.yaml", fails=True), bad
print("mamba: as transformers computes it")
