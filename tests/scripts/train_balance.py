"""The balance loss of a family's own mixture is the one of transformers, and its gradient too.

For small random models of several families: one step of `moiety train` at rate 0 logs the loss, the balance loss and the norm of all
gradients; transformers computes all three from the same tokens with output_router_logits.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
SIZES = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, num_experts_per_tok=2, router_aux_loss_coef=0.3,
             pad_token_id=None, bos_token_id=None, eos_token_id=None)
FAMILIES = {
    "mixtral": dict(num_local_experts=6),
    "qwen3_moe": dict(num_experts=6, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1], decoder_sparse_step=1),
    "qwen2_moe": dict(num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=24, decoder_sparse_step=1),
    "olmoe": dict(num_experts=6),
    "granitemoe": dict(num_local_experts=6),
    "gpt_oss": dict(num_local_experts=6, layer_types=["full_attention"] * 3, initializer_range=0.3, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0}),
}
LENGTH, ROWS = 32, 3


def train(folder, name, *more):
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({
        "model": {"checkpoint": str(folder / name), "tokenizer": "bytes"},
        "data": {"sources": [{"path": "text.txt"}], "length": LENGTH, "shuffle": False},
        "train": {"steps": 1, "batch": ROWS}, "optimizer": {"lr": 0.0, "clip": 0}, "output": f"run-{name}"}))
    result = subprocess.run([MOIETY, "train", file, "--quiet", "--restart", *more], cwd=folder, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / f"run-{name}" / "log.jsonl").read_text().splitlines()[0])


def compare(folder, family, settings):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **SIZES, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Routers that are sure enough for the balance to be uneven.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder / family)
    record = train(folder, family)
    tokens = Tokenizer.from_file(str(folder / f"run-{family}/last/tokenizer.json")).encode((folder / "text.txt").read_text()).ids
    ids = torch.tensor(tokens[:ROWS * LENGTH]).view(ROWS, LENGTH)
    out = model.train()(ids, labels=ids, output_router_logits=True)
    weighted = 0.3 * out.aux_loss.item()
    out.loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    found = record["auxiliary"]["balance"]
    print(f"{family}: balance {found:.6f}, transformers {weighted:.6f}; gradient {record['grad_norm']:.5f} and {norm:.5f}")
    assert abs(found - weighted) < 1e-5 * weighted, (found, weighted)
    assert abs(record["loss"] - (out.loss.item() - weighted)) < 1e-4
    assert abs(record["grad_norm"] - norm) < 1e-4 * norm, (record["grad_norm"], norm)
    # Without the loss the gradient is another one.
    without = train(folder, family, "--set", "routing.balance=none")
    assert "auxiliary" not in without and without["loss"] == record["loss"]
    assert abs(without["grad_norm"] - norm) > 1e-4 * norm
    # The same rule with another weight, and a z loss beside it.
    other = train(folder, family, "--set", "routing.coef=0.6", "--set", "routing.z_coef=0.01")["auxiliary"]
    assert abs(other["balance"] - 2 * found) < 1e-5 * found and other["router_z"] > 0


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    with tempfile.TemporaryDirectory(prefix="moiety-balance-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("".join(c for c in topics["lambda"] + topics["with"] if ord(c) < 128))
        for family, settings in FAMILIES.items():
            compare(folder, family, settings)


if __name__ == "__main__":
    main()
