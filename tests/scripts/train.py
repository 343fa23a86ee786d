"""moiety train as a user meets it: killed at random moments and resumed, interrupted, asked for JSON, given wrong input.

The killed run's log must equal that of the run that was never stopped; a checkpoint must be whole whenever it is visible.
"""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
RUN = """
model:
  tokenizer: bytes
  config: {model_type: qwen3_moe, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
           intermediate_size: 64, moe_intermediate_size: 32, num_experts: 4, num_experts_per_tok: 2, norm_topk_prob: true,
           router_aux_loss_coef: 0.01, max_position_embeddings: 128, tie_word_embeddings: true}
routing: {bias_rate: 0.001}
data: {sources: [{path: text.txt, document: paragraph}], held_out: 0.1, length: 64, shuffle_tokens: 4000}
train: {steps: STEPS, batch: 8, accumulate: 2, ema: {decay: 0.95}, log_every: 2}
optimizer: {lr: 3e-3}
schedule: {name: wsd, warmup: 5}
evaluation: {every: 20, tokens: 2000}
output: {folder: OUT, every: 7, keep: 2}
"""


def train(*arguments, environment={}, **options):
    command = [MOIETY, "train", *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1", **environment), **options)


def trace(folder):
    out = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("time")
        record.pop("tokens_per_second", None)
        out.append(record)
    return out


def tensors(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in header.values())
    assert 8 + length + end == len(data), f"{file} is cut"
    return data


MODEL = {"json": ["config.json", "tokenizer.json", "generation_config.json"], "tensors": ["model.safetensors"]}
ADAPTER = {"json": ["adapter_config.json"], "tensors": ["adapter_model.safetensors"]}


def whole(folder, files=MODEL):
    """Every visible checkpoint has all its files, whole."""
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        for name in [*files["json"], "training/state.json"]:
            json.loads((checkpoint / name).read_text())
        for name in [*files["tensors"], "training/state.safetensors"]:
            tensors(checkpoint / name)


def run_file(folder, name, steps, run=RUN):
    file = folder / f"{name}.yaml"
    file.write_text(run.replace("OUT", name).replace("STEPS", str(steps)))
    return file


def kill_and_resume(folder, kills=6, steps=120, least=1, run=RUN, files=MODEL, buffer=b"choice_bias"):
    """What no gradient moves, as the router's bias, has to come back too: it is among the buffers of the training state."""
    start = time.monotonic()
    result = train(run_file(folder, "wrong", steps, run), "--dry-run", cwd=folder)
    assert result.returncode == 0, result.stderr
    loading = time.monotonic() - start
    start = time.monotonic()
    result = train(run_file(folder, "whole", steps, run), "--quiet", cwd=folder)
    assert result.returncode == 0, result.stderr
    took = time.monotonic() - start
    chance = random.Random(4)
    file, killed = run_file(folder, "killed", steps, run), 0
    for _ in range(kills):
        process = subprocess.Popen([MOIETY, "train", file, "--quiet"], cwd=folder, env=dict(os.environ, OMP_NUM_THREADS="1"),
                                   stdout=subprocess.DEVNULL)
        # While it starts, computes or saves; so short that the run has enough left for the next one.
        time.sleep(chance.uniform(0.3, 1.0) * (loading + took / kills))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (folder / "killed/checkpoints").exists():
            whole(folder / "killed", files)
    result = train(file, "--quiet", cwd=folder)
    assert result.returncode == 0, result.stderr
    whole(folder / "killed", files)
    assert killed >= least, f"the run was over after {killed} of {kills} kills"
    assert trace(folder / "whole") == trace(folder / "killed"), "the traces differ"
    log_every = int(re.search(r"log_every: (\d+)", run).group(1))
    assert len([r for r in trace(folder / "whole") if "loss" in r]) == steps // log_every
    for name in [*files["tensors"], "training/state.safetensors"]:
        assert tensors(folder / "whole/last" / name) == tensors(folder / "killed/last" / name), f"{name} differs"
    assert buffer in tensors(folder / "whole/last/training/state.safetensors")
    events = "tensorboard/events.out.tfevents.0000000001.moiety"
    assert abs((folder / "whole" / events).stat().st_size - (folder / "killed" / events).stat().st_size) == 0
    print(f"killed {killed} times, {steps} steps of {took:.1f} s in all: same trace, same weights")


def interrupt(folder):
    file = run_file(folder, "interrupted", 100000)
    process = subprocess.Popen([MOIETY, "train", file], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    log = folder / "interrupted/log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None, "no step in a minute"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped behind step" in output, output
    whole(folder / "interrupted")
    steps = sorted((folder / "interrupted/checkpoints").glob("step-*"))
    stopped = int(steps[-1].name[5:])
    assert trace(folder / "interrupted")[-1]["step"] <= stopped
    result = train(file, "--set", f"train.steps={stopped + 3}", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["ended"] == "complete" and answer["step"] == stopped + 3, answer
    print(f"interrupted behind step {stopped}, went on to {answer['step']}")


def wrong_input(folder):
    file = run_file(folder, "wrong", 2)
    for arguments, part in [
        (["--set", "optimizer.lr=fast"], "optimizer.lr"),
        (["--set", "data.sources=[nowhere.txt]"], "nowhere.txt"),
        (["--set", "model.config.model_type=lama"], "llama"),
        (["--set", "train.train=[nothing]"], "nothing"),
        (["--resume"], "no checkpoint"),
    ]:
        result = train(file, *arguments, "--quiet", cwd=folder)
        assert result.returncode == 1 and part in result.stderr, (arguments, result.returncode, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
    plan = json.loads(train(file, "--dry-run", "--json", cwd=folder).stdout)
    assert plan["steps"] == 2 and plan["trained"] == plan["parameters"] > 0
    assert not (folder / "wrong/log.jsonl").exists()


def without_fast_bf16(folder):
    """Where products of bf16 are slow a run of bf16 is computed in f32, says so, and stays one of bf16."""
    for dtype in ("bf16", "f32"):
        file = run_file(folder, dtype, 4)
        result = train(file, "--set", f"train.dtype={dtype}", cwd=folder, environment={"MOIETY_ISA": "avx2"})
        assert result.returncode == 0, result.stderr
        assert ("f32 is computed in" in result.stderr) == (dtype == "bf16"), result.stderr
    assert trace(folder / "bf16") == trace(folder / "f32")
    assert json.loads((folder / "bf16/run.json").read_text())["train"]["dtype"] == "bf16"


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    with tempfile.TemporaryDirectory(prefix="moiety-train-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("\n\n".join(topics.values())[:60000])
        wrong_input(folder)
        without_fast_bf16(folder)
        interrupt(folder)
        kill_and_resume(folder)


if __name__ == "__main__":
    main()
