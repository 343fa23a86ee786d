"""A MoLM checkpoint (IBM/ModuleFormer's names and layout) with random weights: moiety's logits against a plain reference here, which
knows no sorting, no cache and no blocks; with each kind of gate. It trains, and modules that are added to it can be joined.

transformers has no class of this family: the reference is written from the definition, token by token.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
CONFIG = {"model_type": "moduleformer", "architectures": ["ModuleFormerForCausalLM"], "vocab_size": 40, "n_embd": 16, "n_layer": 2,
          "n_head": 2, "att_hidden": 12, "ffd_hidden": 10, "gating_size": 6, "n_att_experts": 5, "k_att": 2, "n_mlp_experts": 4, "k_mlp": 3,
          "activation_function": "gelu_new", "block_size": 32, "history_length": 32, "tie_word_embeddings": False}


def weights(config, gate):
    c, out = config, {}
    draw = lambda *shape, std=0.3: std * torch.randn(*shape)  # noqa: E731
    d, a, f, r = c["n_embd"], c["att_hidden"], c["ffd_hidden"], c["gating_size"]

    def gate_of(at, count):
        if gate == "mlp":
            out[at + "w_gate.0.weight"], out[at + "w_gate.0.bias"], out[at + "w_gate.3.weight"] = draw(r, d), draw(r), draw(count, r, std=1)
        elif gate == "linear":
            out[at + "w_gate.weight"] = draw(count, d)
        else:
            out[at + "w_gate.weight"], out[at + "expert_centroids"], out[at + "temperature"] = draw(r, d), draw(count, r, std=1), draw(1)

    out["transformer.wte.weight"], out["lm_head.weight"] = draw(c["vocab_size"], d, std=1), draw(c["vocab_size"], d)
    for name in ["ln_f"] + [f"h.{i}.ln_{n}" for i in range(c["n_layer"]) for n in (1, 2)]:
        out[f"transformer.{name}.weight"], out[f"transformer.{name}.bias"] = 1 + draw(d), draw(d)
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        gate_of(at + "attn.q_proj.gate.", c["n_att_experts"])
        gate_of(at + "mlpf.gate.", c["n_mlp_experts"])
        out[at + "attn.q_proj.experts.weight"] = draw(c["n_att_experts"], d, a)
        out[at + "attn.q_proj.output_experts.weight"] = draw(c["n_att_experts"], a, d)
        for name in ("k_proj", "v_proj"):
            out[at + f"attn.{name}.weight"], out[at + f"attn.{name}.bias"] = draw(a, d), draw(a)
        out[at + "mlpf.experts.weight"], out[at + "mlpf.output_experts.weight"] = draw(c["n_mlp_experts"], d, f), draw(c["n_mlp_experts"], f, d)
        # Tables that the released model saves, too.
        out[at + "attn.mask"] = torch.ones(4, 4, dtype=torch.int8)
        out[at + "attn.cum_weight"] = torch.ones(4, 4)
    return out


def reference(c, w, gate, ids):
    """Logits [T, V] of one row."""
    norm = lambda x, at: torch.nn.functional.layer_norm(x, x.shape[-1:], w[at + ".weight"], w[at + ".bias"], 1e-5)  # noqa: E731

    def chosen(x, at, k):
        if gate == "mlp":
            z = torch.nn.functional.gelu(x @ w[at + "w_gate.0.weight"].T + w[at + "w_gate.0.bias"]) @ w[at + "w_gate.3.weight"].T
        elif gate == "linear":
            z = x @ w[at + "w_gate.weight"].T
        else:
            unit = lambda t: torch.nn.functional.normalize(t, dim=-1)  # noqa: E731
            z = unit(x @ w[at + "w_gate.weight"].T) @ unit(w[at + "expert_centroids"]).T * w[at + "temperature"].exp()
        p = z.softmax(-1)
        best = p.topk(k)
        return list(zip(best.indices.tolist(), best.values))

    h = w["transformer.wte.weight"][ids]
    heads, size = c["n_head"], c["att_hidden"] // c["n_head"]
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        x = norm(h, at + "ln_1")
        keys, values = (x @ w[at + f"attn.{n}.weight"].T + w[at + f"attn.{n}.bias"] for n in ("k_proj", "v_proj"))
        out = torch.zeros_like(h)
        for t in range(len(ids)):
            for m, g in chosen(x[t], at + "attn.q_proj.gate.", c["k_att"]):
                q, y = x[t] @ w[at + "attn.q_proj.experts.weight"][m], torch.zeros(c["att_hidden"])
                for head in range(heads):
                    part, left = slice(head * size, (head + 1) * size), 1.0
                    for j in range(t, -1, -1):  # the stick breaks from the token's own position backwards
                        beta = torch.sigmoid(q[part] @ keys[j, part] / size ** 0.5)
                        y[part] += left * beta * values[j, part]
                        left = left * (1 - beta)
                out[t] += g * (y @ w[at + "attn.q_proj.output_experts.weight"][m])
        h = h + out
        x = norm(h, at + "ln_2")
        h = h + torch.stack([sum(g * (torch.nn.functional.gelu(x[t] @ w[at + "mlpf.experts.weight"][m], approximate="tanh")
                                      @ w[at + "mlpf.output_experts.weight"][m])
                                 for m, g in chosen(x[t], at + "mlpf.gate.", c["k_mlp"])) for t in range(len(ids))])
    return norm(h, "transformer.ln_f") @ w["lm_head.weight"].T


def moiety(*arguments, cwd):
    result = subprocess.run([MOIETY, *map(str, arguments)], cwd=cwd, text=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    return result.stdout


def logits_of(folder, model, ids, *options):
    moiety("logits", model, "--ids", " ".join(map(str, ids)), "--dtype", "f32", "-o", "logits.safetensors", *options, cwd=folder)
    return load_file(folder / "logits.safetensors")["logits"][0]


def parity(folder):
    worst = 0.0
    for gate in ("mlp", "linear", "gmm"):
        torch.manual_seed(5)
        model = folder / gate
        model.mkdir()
        config = dict(CONFIG, gate_type=gate)
        w = weights(config, gate)
        (model / "config.json").write_text(json.dumps(config))
        save_file(w, model / "model.safetensors")
        ids = torch.randint(0, config["vocab_size"], (9,)).tolist()
        wanted = reference(config, w, gate, ids)
        for options in ([], ["--cache", "1"]):
            distance = (logits_of(folder, gate, ids, *options) - wanted).abs().max().item()
            assert distance < 2e-4 * wanted.abs().max().item(), (gate, options, distance)
            worst = max(worst, distance)
    print(f"MoLM: largest difference of a logit {worst:.1e}")


def grow(folder):
    (folder / "text.txt").write_text("".join(map(chr, range(97, 123))) * 40)
    settings = "{slug: moduleformer, modules: 4, top_k: 3, width: 10, gating_size: 6, new_modules: 2}"
    (folder / "base.yaml").write_text("""
model: {tokenizer: bytes, config: {model_type: moduleformer, n_embd: 16, n_layer: 2, n_head: 2, att_hidden: 12, ffd_hidden: 10, gating_size: 6,
        n_att_experts: 5, k_att: 2, n_mlp_experts: 4, k_mlp: 3, aux_loss_weight: 0.001, block_size: 32, history_length: 32}}
data: {sources: [{path: text.txt}], length: 32}
train: {steps: 5, batch: 4}
optimizer: {lr: 3.0e-3}
output: {folder: base}
""")
    moiety("train", "base.yaml", "--quiet", cwd=folder)
    attention = "{slug: moduleformer-attention, modules: 5, top_k: 2, width: 12, heads: 2, gating_size: 6, new_modules: 1}"
    (folder / "grow.yaml").write_text(f"""
model: base/last
parts: [{settings}, {attention}]
data: {{sources: [{{path: text.txt}}], length: 32}}
train: {{steps: 5, batch: 4}}
optimizer: {{lr: 3.0e-3}}
output: {{folder: grown}}
""")
    moiety("train", "grow.yaml", "--quiet", cwd=folder)
    old, new = load_file(folder / "base/last/model.safetensors"), load_file(folder / "grown/last/model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old), "what was trained has changed"
    assert sorted({name.split(".new.")[1] for name in new if name not in old}) == \
        ["experts.weight", "gate.weight", "output_experts.weight"]
    moiety("compress", "grown/last", "--prune", "moduleformer", "--tau", "0", "--calibration", "text.txt", "--limit-tokens", "64",
           "--context", "32", "-o", "joined", cwd=folder)
    ids = [97, 98, 99, 100, 101, 102]
    distance = (logits_of(folder, "grown/last", ids) - logits_of(folder, "joined", ids)).abs().max().item()
    assert distance < 1e-5, distance
    modules = {(p["slug"], p["modules"]) for p in json.loads((folder / "joined/config.json").read_text())["moiety"]["parts"]}
    assert modules == {("moduleformer", 6), ("moduleformer-attention", 6)}, modules
    print("modules were added, learned alone, and were joined to the others")


def wrong(folder):
    for changes, part in [({"att_hidden": 13}, "att_hidden"), ({"k_mlp": 9}, "k_mlp"), ({"gate_type": "linear"}, "w_gate"),
                          ({"aux_loss_type": "mutual"}, "mutual"), ({"att_hidden": 16, "n_head": 1}, "not projected")]:
        config = dict(json.loads((folder / "mlp/config.json").read_text()), **changes)
        other = folder / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps(config))
        (other / "model.safetensors").write_bytes((folder / "mlp/model.safetensors").read_bytes())
        result = subprocess.run([MOIETY, "logits", "other", "--ids", "1 2", "-o", "other.safetensors"], cwd=folder, text=True, capture_output=True)
        assert result.returncode == 1 and part in result.stderr and result.stderr.count("\n") == 1, (changes, result.stderr)


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    with tempfile.TemporaryDirectory(prefix="moiety-moduleformer-") as name:
        folder = Path(name)
        parity(folder)
        grow(folder)
        wrong(folder)


if __name__ == "__main__":
    main()
