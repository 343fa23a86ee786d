"""moiety compress --prune --retrain: rounds of pruning and training reach the sparsity and hold it; killed with SIGKILL and started
again they end in the same weights; what does not fit is named.
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
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import MOIETY, tensors, train

IMAGES = "/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
BASE = """
task: image-classification
model: {config: {patch: 7, hidden: 32, blocks: 2, heads: 4, width: 48, mixture: false, share_attention: false, share_ffn: false}}
data: {sources: [IMAGES], held_out: 0.1}
train: {steps: 60, batch: 64}
optimizer: {lr: 4e-3}
evaluation: {tokens: 500}
output: base
"""
AGAIN = """
task: image-classification
model: base/last
data: {sources: [IMAGES], held_out: 0.1}
train: {steps: 30, batch: 64}
optimizer: {lr: 1e-3}
evaluation: {tokens: 500}
output: {folder: OUT, every: 5}
"""


def command(name, *more, out=None):
    return [MOIETY, "compress", "base/last", "--prune", "rd", "--sparsity", "0.8", "--iterations", "2", "--grid", "8", "--retrain",
            f"{name}.yaml", "--calibration", IMAGES, "--calibration-samples", "32", "-o", out or f"{name}-sparse", *more]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1")


def run(folder, arguments):
    return subprocess.run(list(map(str, arguments)), cwd=folder, text=True, capture_output=True, env=environment(), timeout=300)


def sparsity(model):
    """Zeros among the weights of matrices that are pruned, by what the first round's report names."""
    names = [l["layer"] for l in json.loads((model.parent / "whole/round-1/pruning.json").read_text())["layers"]]
    data = tensors(model / "model.safetensors")
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    zeros = all_of = 0
    for name in names:
        assert header[name]["dtype"] == "F32", header[name]
        begin, end = header[name]["data_offsets"]
        values = array("f", data[start + begin:start + end])
        zeros += sum(v == 0.0 for v in values)
        all_of += len(values)
    return zeros / all_of


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "base.yaml").write_text(BASE.replace("IMAGES", IMAGES))
        for name in ("whole", "killed"):
            (folder / f"{name}.yaml").write_text(AGAIN.replace("IMAGES", IMAGES).replace("OUT", name))
        result = train("base.yaml", "--quiet", cwd=folder)
        assert result.returncode == 0, result.stderr
        start = time.monotonic()
        result = run(folder, command("whole", "--json"))
        assert result.returncode == 0, result.stderr
        took = time.monotonic() - start
        answer = json.loads(result.stdout)
        assert answer["complete"] and [round(r["sparsity"], 4) for r in answer["rounds"]] == [round(1 - 0.2 ** 0.5, 4), 0.8], answer
        assert 0.799 < sparsity(folder / "whole-sparse") < 0.82, sparsity(folder / "whole-sparse")
        chance, killed = random.Random(5), 0
        for _ in range(4):
            process = subprocess.Popen(command("killed"), cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            time.sleep(chance.uniform(0.4, 1.0) * (0.5 + took / 3))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        assert killed > 0, "it was over before it could be killed"
        result = run(folder, command("killed", "--overwrite"))
        assert result.returncode == 0, result.stderr
        a, b = (tensors(folder / f"{n}-sparse/model.safetensors") for n in ("whole", "killed"))
        assert a == b, "the weights differ"
        print(f"killed {killed} times: same weights; {100 * sparsity(folder / 'whole-sparse'):.1f} % zeros")

        for arguments, part in [
            (command("whole", "--dry-run", out="x"), "--retrain trains"),
            (command("whole"), "is there already"),
            (command("whole", "--overwrite", "--floor", "0.1"), "rounds of another pruning"),
            (command("none", out="x"), "none.yaml"),
        ]:
            result = run(folder, arguments)
            assert result.returncode != 0 and part in result.stderr, (arguments, result.stderr)
        (folder / "parts.yaml").write_text(AGAIN.replace("IMAGES", IMAGES).replace("OUT", "parts") + "parts: [{slug: lora}]\n")
        result = run(folder, command("parts"))
        assert result.returncode != 0 and "keep_zeros and parts exclude each other" in result.stderr, result.stderr
        print("what does not fit is named")


main()
