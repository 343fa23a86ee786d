"""Two processes train as one does: same losses up to rounding, and bit for bit the same after a kill.

`torchrun --no-python --nproc-per-node 2 moiety train RUN.yaml`, over Gloo on this machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
PYTHON = Path(os.environ.get("PYTHON", ROOT / ".venv/bin/python"))
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0"]
RUN = """
model:
  tokenizer: bytes
  config: {model_type: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
           intermediate_size: 64, moe_intermediate_size: 32, num_experts: 4, num_experts_per_tok: 2, norm_topk_prob: true,
           max_position_embeddings: 64, tie_word_embeddings: true}
data: {sources: [{path: text.txt, document: paragraph}], held_out: 0.1, length: 64}
train: {steps: 30, batch: 4, accumulate: 4}
optimizer: {lr: 3e-3}
evaluation: {every: 10, tokens: 2000}
output: {folder: OUT, every: 4}
"""
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")


def losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"] if "loss" in r else r["evaluation"]["loss"]) for r in records]


def run(folder, name, launcher):
    file = folder / f"{name}.yaml"
    file.write_text(RUN.replace("OUT", name))
    return [*launcher, MOIETY, "train", file, "--quiet"]


def complete(folder, name, launcher):
    result = subprocess.run(run(folder, name, launcher), cwd=folder, env=ENVIRONMENT, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("training loss") == 1, result.stdout
    return losses(folder / name)


def processes_of(file):
    """The launcher and the workers, by the file that only they have on their command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.fsencode(file) in (entry / "cmdline").read_bytes().split(b"\0"):
                    yield int(entry.name)
            except OSError:
                pass  # ended meanwhile


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    with tempfile.TemporaryDirectory(prefix="moiety-ranks-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("\n\n".join(topics.values())[:60000])
        one = complete(folder, "one", [])
        two = complete(folder, "two", TORCHRUN)
        assert len(one) == 33 and [s for s, _ in one] == [s for s, _ in two]
        # f32 sums in another order, over 30 steps of training.
        worst = max(abs(a - b) for (_, a), (_, b) in zip(one, two))
        assert worst < 2e-3, worst
        assert one[0][1] - one[-1][1] > 1.0, "nothing was learned"
        process = subprocess.Popen(run(folder, "killed", TORCHRUN), cwd=folder, env=ENVIRONMENT, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = folder / "killed/log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 9):
            assert time.monotonic() < deadline and process.poll() is None, "no step in two minutes"
            time.sleep(0.02)
        for pid in processes_of(folder / "killed.yaml"):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert complete(folder, "killed", TORCHRUN) == two
        print(f"two processes: largest difference of a loss {worst:.1e}; killed and resumed: the same trace")
        result = subprocess.run([*run(folder, "odd", TORCHRUN), "--set", "train.accumulate=3"], cwd=folder, env=ENVIRONMENT, text=True,
                                capture_output=True, timeout=300)
        assert result.returncode != 0 and "train.accumulate" in result.stderr, result.stderr[-2000:]


if __name__ == "__main__":
    main()
