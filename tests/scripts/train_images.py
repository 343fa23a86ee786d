"""moiety train on images: WideNet and a plain ViT learn Fashion-MNIST, killed with SIGKILL and resumed to the same log and weights;
the checkpoint loads again, with the accuracy that the run measured; two processes train as one; wrong input is named.
"""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import MOIETY, tensors, train
from train_ranks import TORCHRUN

IMAGES = Path("/usr/share/datasets/fashion-mnist")
RUN = """
task: {slug: image-classification, label_smoothing: 0.05}
model: {config: {patch: 7, hidden: 32, blocks: 3, heads: 4, width: 48, moe: {experts: 4, top_k: 2}}}
data: {sources: [/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz], held_out: 0.1}
train: {steps: 120, batch: 64, log_every: 3, ema: {decay: 0.9}}
optimizer: {lr: 4e-3}
schedule: {name: cosine, warmup: 6}
evaluation: {every: 30, tokens: 1000, batch: 250}
output: {folder: OUT, every: 7}
"""


def trace(folder):
    out = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("time")
        record.pop("images_per_second", None)
        out.append(record)
    return out


def run_file(folder, name):
    file = folder / f"{name}.yaml"
    file.write_text(RUN.replace("OUT", name))
    return file


def whole(folder):
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        for name in ("config.json", "training/state.json"):
            json.loads((checkpoint / name).read_text())
        tensors(checkpoint / "model.safetensors")
        tensors(checkpoint / "training/state.safetensors")


def moiety(*arguments, cwd):
    result = subprocess.run([MOIETY, *map(str, arguments)], text=True, capture_output=True, cwd=cwd,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    return result.stdout


def kill_and_resume(folder, kills=5):
    start = time.monotonic()
    result = train(run_file(folder, "whole"), "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    took = time.monotonic() - start
    answer = json.loads(result.stdout)
    assert answer["images"] == 120 * 64 and 0.6 < answer["evaluation"]["accuracy"] < 1.0, answer
    chance, file, killed = random.Random(3), run_file(folder, "killed"), 0
    for _ in range(kills):
        process = subprocess.Popen([MOIETY, "train", file, "--quiet"], cwd=folder, env=dict(os.environ, OMP_NUM_THREADS="1"),
                                   stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.5, 1.0) * (0.5 + took / kills))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (folder / "killed/checkpoints").exists():
            whole(folder / "killed")
    assert killed > 0, "the run was over before it could be killed"
    result = train(file, "--quiet", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert trace(folder / "whole") == trace(folder / "killed"), "the traces differ"
    for name in ("model.safetensors", "training/state.safetensors"):
        assert tensors(folder / "whole/last" / name) == tensors(folder / "killed/last" / name), f"{name} differs"
    print(f"killed {killed} times: same trace, same weights; {100 * answer['evaluation']['accuracy']:.1f} % of held-out images right")
    return answer


def load_again(folder):
    """Test images: the accuracy is that of a model that has learned, and goes on from the checkpoint of another run."""
    test = IMAGES / "t10k-images-idx3-ubyte.gz"
    report = json.loads(moiety("eval", "whole/last", "--images", test, "--limit", 2000, "--json", cwd=folder))["images"][0]
    assert report["images"] == 2000 and 0.6 < report["accuracy"] < 1.0, report
    free = json.loads(moiety("eval", "whole/last", "--images", test, "--limit", 500, "--no-capacity", "--json", cwd=folder))["images"][0]
    one = json.loads(moiety("eval", "whole/last", "--images", test, "--limit", 500, "--no-capacity", "--batch-size", 7, "--json",
                            cwd=folder))["images"][0]
    assert free["accuracy"] == one["accuracy"] and abs(free["loss"] - one["loss"]) < 1e-5, (free, one)
    result = train(run_file(folder, "on"), "--set", "model={checkpoint: whole/last}", "--set", "train.steps=2", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["evaluation"]["accuracy"] > 0.6, result.stdout
    routing = json.loads(moiety("analyze", "routing", "whole/last", "--images", test, "--limit", 200, "--json", cwd=folder))
    assert [(l["layer"], len(l["share"])) for l in routing["layers"]] == [(0, 4), (1, 4), (2, 4)], routing["layers"]
    assert "3" in moiety("info", "whole/last", cwd=folder)
    vit = ["--set", "model.config.mixture=false", "--set", "model.config.share_attention=false", "--set", "model.config.share_ffn=false",
           "--set", "train.dtype=bf16", "--set", "train.checkpoint_activations=true"]
    result = train(run_file(folder, "vit"), *vit, "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    vit = json.loads(moiety("eval", "vit/last", "--images", test, "--limit", 2000, "--json", cwd=folder))["images"][0]
    assert 0.6 < vit["accuracy"] < 1.0, vit
    print(f"test images: WideNet {100 * report['accuracy']:.1f} %, ViT in bf16 {100 * vit['accuracy']:.1f} %")


def adapters(folder):
    """Parts beside the matrices of the ViT learn alone: a small folder that opens over its base, resumes, and, a LoRA, merges."""
    test = IMAGES / "t10k-images-idx3-ubyte.gz"
    accuracy = lambda *model: json.loads(moiety("eval", *model, "--images", test, "--limit", 1000, "--json", cwd=folder))["images"][0]["accuracy"]
    base = (folder / "vit/last/model.safetensors").read_bytes()
    for name, part in [("lora", "{slug: lora, rank: 4}"), ("mora", "{slug: mora, rank: 4, top_k: 4, target: [q_proj, v_proj, up_proj]}")]:
        settings = ["--set", f"parts=[{part}]", "--set", "model={checkpoint: vit/last}", "--set", "train.steps=30"]
        result = train(run_file(folder, name), *settings, "--json", cwd=folder)
        assert result.returncode == 0, result.stderr
        assert sorted(p.name for p in (folder / name / "last").iterdir() if p.is_file()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((folder / name / "last/adapter_config.json").read_text())
        assert config["peft_type"] == "MOIETY" and config["base_model_name_or_path"] == "vit/last", config
        assert accuracy(f"{name}/last") == accuracy("vit/last", "--adapter", f"{name}/last") > 0.6
    assert base == (folder / "vit/last/model.safetensors").read_bytes(), "the base has changed"
    moiety("merge", "lora/last", "-o", "merged", cwd=folder)
    assert abs(accuracy("merged") - accuracy("lora/last")) < 0.003
    routed = subprocess.run([MOIETY, "merge", "mora/last", "-o", "never"], cwd=folder, text=True, capture_output=True)
    assert routed.returncode == 1 and "token" in routed.stderr, routed.stderr
    print("adapters of the ViT open over their base; LoRA merges")


def two_processes(folder):
    """Without dropout and noise the steps of two processes are those of one, up to the order of sums."""
    calm = ["train.steps=12", "train.accumulate=2", "model.config.dropout=0", "model.config.moe.dropout=0", "model.config.moe.noise=false",
            "optimizer.name=sgd", "optimizer.lr=0.05"]
    settings = [part for s in calm for part in ("--set", s)]
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        result = subprocess.run([*launcher, MOIETY, "train", run_file(folder, name), "--quiet", *settings], cwd=folder, text=True,
                                capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"), timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(trace(folder / "one"), trace(folder / "two")) if "loss" in a]
    assert len(pairs) == 4 and max(abs(a - b) for a, b in pairs) < 1e-4, pairs


def wrong_input(folder):
    (folder / "text.txt").write_text("no image\n")
    (folder / "big-images-idx3-ubyte").write_bytes(struct.pack(">4BIII", 0, 0, 8, 3, 2, 8, 8) + bytes(128))
    (folder / "big-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 2) + bytes(2))
    file = run_file(folder, "wrong")
    for settings, part in [
        (["model.config.patch=5"], "patch"),
        (["model.config.heads=5"], "heads"),
        (["model.config.moe.top_k=9"], "top_k"),
        (["model.config.moe.capacity_factor=0"], "capacity_factor"),
        (["model.config.moe.balance_coef=-1"], "balance_coef"),
        (["model.config.moe.output_activation=tanh"], "output_activation"),
        (["model.config.classes=9"], "the model has 9 classes"),
        (["model.config.experts=4"], "experts"),
        (["model.tokenizer=bytes"], "tokenizer"),
        (["routing.balance=none"], "routing"),
        (["parts=[{slug: widenet}]"], "parts"),
        (["task=image-clasification"], "image-classification"),
        (["task.smoothing=1"], "label_smoothing"),
        (["data.sources=[text.txt]"], "images"),
        (["data.sources=[big-images-idx3-ubyte]", "data.held_out=0.5"], "8 x 8"),
        (["task=language", "model.tokenizer=bytes"], "model_type"),
    ]:
        result = train(file, "--quiet", *(part for s in settings for part in ("--set", s)), cwd=folder)
        assert result.returncode == 1 and part in result.stderr, (settings, result.returncode, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
    # A checkpoint whose config says something else about sharing than its tensors.
    config = json.loads((folder / "whole/last/config.json").read_text())
    for changes, part in [({"blocks": 4}, "norms for 3 blocks"), ({"share_attention": False}, "blocks.0.attention"),
                          ({"moe": dict(config["moe"], experts=5)}, "shared.ffn.experts")]:
        other = folder / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps({**config, **changes}))
        (other / "model.safetensors").write_bytes((folder / "whole/last/model.safetensors").read_bytes())
        result = subprocess.run([MOIETY, "eval", "other", "--images", IMAGES / "t10k-images-idx3-ubyte.gz"], cwd=folder, text=True,
                                capture_output=True)
        assert result.returncode == 1 and part in result.stderr, (changes, result.stderr)


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    if not IMAGES.exists():
        print(f"skipped: there is no {IMAGES} (dataset-fashion-mnist)")
        sys.exit(77)
    with tempfile.TemporaryDirectory(prefix="moiety-images-") as name:
        folder = Path(name)
        kill_and_resume(folder)
        load_again(folder)
        adapters(folder)
        two_processes(folder)
        wrong_input(folder)


if __name__ == "__main__":
    main()
