"""A mixture that `moiety train` made (tests/data/mixture), halved: choosing by use and DERN lose less than chance at the same size, REAP and
M-SMoE without recovery stay models of the text; keeping all is the model as it is, byte for byte.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train import MOIETY

MODEL = Path(__file__).resolve().parent.parent / "data/mixture"


def moiety(*arguments, cwd):
    result = subprocess.run([MOIETY, *map(str, arguments)], cwd=cwd, text=True, capture_output=True, timeout=300,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert result.returncode == 0, (arguments, result.stderr)
    return result.stdout


def main():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = sorted(topics.values(), key=len)[-12:]
        (folder / "seen.txt").write_text("\n\n".join(text[:6])[:60000])
        (folder / "text.txt").write_text("\n\n".join(text[6:])[:16000])

        def loss(model):
            answer = json.loads(moiety("eval", model, "--text", "text.txt", "--context", 128, "--json", cwd=folder))
            value = math.log(answer["perplexity"]["perplexity"])
            assert 0 < value < 8, answer
            return value

        def smaller(name, *arguments):
            moiety("compress", MODEL, *arguments, "-o", name, cwd=folder)
            return loss(name)

        seen = ["--calibration", "seen.txt", "--limit-tokens", 8000, "--context", 128]
        whole = loss(MODEL)
        assert whole < 1.8, f"the mixture has learned little: {whole}"
        chance = [smaller(f"random-{s}", "--method", "random", "--seed", s, "--keep", 0.5, *seen) for s in range(3)]
        mean = sum(chance) / len(chance)
        losses = {m: smaller(m, "--method", m, "--keep", 0.5, *seen) for m in ("reap", "frequency", "dern")}
        losses["m-smoe"] = smaller("m-smoe", "--method", "m-smoe", "--groups", 4, *seen)
        print(f"loss {whole:.3f}; with half of the experts: by chance {', '.join(f'{c:.3f}' for c in chance)}; "
              + ", ".join(f"{m} {v:.3f}" for m, v in losses.items()))
        assert all(whole < losses[m] < mean for m in ("frequency", "dern")), losses
        assert all(whole < v < math.log(256) - 1 for v in losses.values()), losses

        moiety("compress", MODEL, "--method", "reap", "--keep", 8, *seen, "-o", "all", cwd=folder)
        before, after = (sorted(p.glob("*.safetensors")) for p in (MODEL, folder / "all"))
        assert [p.read_bytes() for p in before] == [p.read_bytes() for p in after], "keeping all experts changed the weights"
        wrong = subprocess.run([MOIETY, "compress", MODEL, "--method", "random", "--keep", "1.0", "-o", "one"], cwd=folder, text=True,
                               capture_output=True)
        assert wrong.returncode != 0 and "neither a share below 1 nor a number of experts" in wrong.stderr, wrong.stderr


main()
