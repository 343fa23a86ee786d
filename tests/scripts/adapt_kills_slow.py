"""A run of two mixtures of LoRA experts beside a frozen model, one with a bias that every pass moves, over 1,000 steps,
killed at random moments: same log, same adapter."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train

BASE = """
model:
  tokenizer: bytes
  config: {model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
           intermediate_size: 48, max_position_embeddings: 64, tie_word_embeddings: true}
data: {sources: [{path: text.txt, document: paragraph}], length: 32}
train: {steps: STEPS, batch: 4}
output: {folder: OUT}
"""
RUN = """
model: base/last
parts:
  - {slug: mola, target: [q_proj, v_proj], experts: 3, top_k: 2, rank: 2, dropout: 0.1, coef: 0.01}
  - {slug: smora, target: [up_proj, down_proj], rank: 6, active: 2, bias_rate: 0.001}
data: {sources: [{path: text.txt, document: paragraph}], held_out: 0.1, length: 32, shuffle_tokens: 4000}
train: {steps: STEPS, batch: 2, log_every: 5}
optimizer: {lr: 3e-3}
schedule: {name: wsd, warmup: 20}
evaluation: {every: 200, tokens: 1000}
output: {folder: OUT, every: 20, keep: 2}
"""

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moiety-adapt-kills-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("\n\n".join(topics.values())[:60000])
        result = train.train(train.run_file(folder, "base", 20, BASE), "--quiet", cwd=folder)
        assert result.returncode == 0, result.stderr
        train.kill_and_resume(folder, kills=8, steps=1000, least=6, run=RUN, files=train.ADAPTER, buffer=b".bias")
