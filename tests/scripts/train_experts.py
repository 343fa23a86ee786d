"""Two processes that share the experts of every mixture train as one process that holds them all, and so do four in two groups.

`torchrun --no-python --nproc-per-node 2 moiety train RUN.yaml --set parallel.experts=2`, over Gloo on this machine: the same losses and
weights up to rounding, checkpoints of the same layout, a killed run goes on bit for bit, and what cannot be shared is said.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_ranks import ENVIRONMENT, MOIETY, PYTHON, TORCHRUN, losses, processes_of

RUN = """
model:
  tokenizer: bytes
  config: {model_type: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
           intermediate_size: 64, moe_intermediate_size: 32, num_experts: 12, num_experts_per_tok: 2, norm_topk_prob: true,
           router_aux_loss_coef: 0.05, max_position_embeddings: 64, tie_word_embeddings: true}
data: {sources: [{path: text.txt, document: paragraph}], held_out: 0.1, length: 64}
train: {steps: 12, batch: 4, accumulate: 2, ema: {decay: 0.5}}
routing: {bias_rate: 0.001}
optimizer: {name: sgd, lr: 0.2, clip: 0.5}
evaluation: {every: 5, tokens: 2000}
output: {folder: OUT, every: 4}
"""


def command(folder, name, launcher, *settings):
    file = folder / f"{name}.yaml"
    file.write_text(RUN.replace("OUT", name))
    return [*launcher, MOIETY, "train", file, "--quiet", *(part for s in settings for part in ("--set", s))]


def start(folder, name, launcher, *settings):
    return subprocess.run(command(folder, name, launcher, *settings), cwd=folder, env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=300)


def complete(folder, name, launcher, *settings):
    result = start(folder, name, launcher, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    return losses(folder / name)


def tensors(file):
    from safetensors.torch import load_file
    return load_file(file)


FOUR = [{"2": "4"}.get(word, word) for word in TORCHRUN]  # processes


def same_run(folder, name, *settings, launcher=TORCHRUN):
    """The run of several processes that hold the experts in pairs against that of one."""
    one = complete(folder, f"{name}-one", [], *settings)
    two = complete(folder, f"{name}-two", launcher, "parallel.experts=2", *settings)
    assert [s for s, _ in one] == [s for s, _ in two] and len(one) == 15
    loss = max(abs(a - b) for (_, a), (_, b) in zip(one, two))
    assert loss < 2e-5, (name, loss)
    weight = 0.0
    for file in ("model.safetensors", "training/state.safetensors"):
        a, b = tensors(folder / f"{name}-one/last" / file), tensors(folder / f"{name}-two/last" / file)
        for rank in range(1, 4):
            b.pop(f"random.{rank}", None)  # the other processes have streams of their own
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}, "the layouts differ"
        for key, value in a.items():
            if not key.startswith("random"):
                weight = max(weight, (value.float() - b[key].float()).abs().max().item())
    assert weight < 2e-5, (name, weight)
    print(f"{name}: largest difference of a loss {loss:.1e}, of a weight {weight:.1e}")


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    with tempfile.TemporaryDirectory(prefix="moiety-experts-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("\n\n".join(topics.values())[:60000])
        same_run(folder, "plain")
        same_run(folder, "capacity", "routing.capacity_factor=0.8", "train.checkpoint_activations=true", "train.dtype=f32")
        same_run(folder, "part", "parts=[{slug: chain-of-experts, experts: 6, top_k: 2}]", "routing.bias_rate=0")
        same_run(folder, "groups", "train.accumulate=4", launcher=FOUR)
        # Killed, and on.
        adam = ("optimizer.name=adamw", "optimizer.lr=3e-3", "train.steps=40", "parallel.experts=2")
        whole = complete(folder, "whole", TORCHRUN, *adam)
        process = subprocess.Popen(command(folder, "killed", TORCHRUN, *adam), cwd=folder, env=ENVIRONMENT, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log, deadline = folder / "killed/log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 9):
            assert time.monotonic() < deadline and process.poll() is None, "no step in two minutes"
            time.sleep(0.02)
        for pid in processes_of(folder / "killed.yaml"):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert complete(folder, "killed", TORCHRUN, *adam) == whole
        for file in ("model.safetensors", "training/state.safetensors"):
            assert (folder / "killed/last" / file).read_bytes() == (folder / "whole/last" / file).read_bytes(), file
        # One process goes on from what two have written.
        more = complete(folder, "whole", [], *adam[:2], "train.steps=42")
        assert more[-1][0] == 42
        for settings, launcher, part in [
            (["model.config.num_experts=5", "parallel.experts=2"], TORCHRUN, "5 experts"),
            (["parallel.experts=2"], [], "torchrun --no-python"),
            (["parallel.experts=4"], TORCHRUN, "2 processes"),
            (["parallel.experts=3", "train.accumulate=4"], FOUR, "4 processes"),
        ]:
            result = start(folder, "wrong", launcher, *settings, "output=wrong")
            assert result.returncode != 0 and part in result.stderr, (settings, result.stderr[-2000:])
        # One process goes on from what four have written in two groups, and four from that.
        for launcher, spread, steps in (([], 1, 14), (FOUR, 2, 16), (FOUR, 4, 18)):
            on = complete(folder, "groups-two", launcher, "train.accumulate=4", f"parallel.experts={spread}", f"train.steps={steps}")
            assert on[-1][0] == steps, on[-1]
        print("killed and resumed: the same run; one process went on; errors name what is wrong")


if __name__ == "__main__":
    main()
