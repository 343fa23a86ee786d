"""Experts on disk, as a user runs them: the memory stays under the budget, the output is that of the model in memory, and what goes
wrong is said in one sentence.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOIETY = str(Path(os.environ["MOIETY_BIN"]).resolve() / "moiety")
MIB = 1 << 20


def moiety(*args, ok=True):
    done = subprocess.run([MOIETY, *map(str, args)], text=True, capture_output=True, timeout=300)
    assert (done.returncode == 0) == ok, (args, done.returncode, done.stderr[-2000:])
    return done


def generate(model, *args, tokens=12):
    done = moiety("generate", model, "-p", "Once upon a time there was", "--greedy", "--ignore-eos", "-n", tokens, "--json", *args)
    return json.loads(done.stdout)


def refused(text, *args):
    error = moiety(*args, ok=False).stderr.strip().splitlines()[-1]
    assert text in error, (text, error)
    return error


def main():
    with tempfile.TemporaryDirectory() as folder:
        m, low = f"{folder}/m.gguf", f"{folder}/m.hobbit.gguf"
        moiety("make-model", "--family", "mixtral", "--params", "300M", "--experts", 32, "--top-k", 4, "--format", "q8_0", "-o", m, "-q")
        moiety("compress", m, "--add-low-experts", "q4_0", "-o", low, "-q")
        whole = generate(m)["completions"][0]["ids"]

        # The smallest budget is named, works, and is kept; so is one between that and the model's size.
        error = refused("the smallest that works is", "generate", m, "-p", "x", "-n", 1, "--memory", "50MiB")
        least = int(error.split("the smallest that works is ")[1].split()[0])
        for budget in (least + 12 * MIB, least + 80 * MIB):
            for options in (["--offload", "lru"], ["--offload", "hobbit", "--t1", 1, "--t2", 1], ["--offload", "lfu", "--io", "sync"],
                            ["--offload", "lru", "--no-direct", "--no-uring"]):
                out = generate(m, "--memory", budget, *options)
                o = out["offload"]
                assert out["completions"][0]["ids"] == whole, options
                assert o["lossless"] and o["bytes_read"] > 0 and o["miss_high"] > 0
                peak = o["memory"]["peak_resident"]
                assert peak <= budget, f"{options}: {peak} of {budget} bytes"
                assert o["memory"]["experts"] < Path(m).stat().st_size
        bench = json.loads(moiety("bench", m, "-p", 0, "-n", 8, "-r", 1, "--memory", least + 80 * MIB, "--json").stdout)
        assert bench["offload"]["memory"]["peak_resident"] <= least + 80 * MIB, bench
        mixed = generate(low, "--memory", least + 40 * MIB, "--offload", "hobbit", "--io", "sync")
        assert not mixed["offload"]["lossless"] and mixed["offload"]["miss_low"] > 0
        assert mixed["offload"]["memory"]["peak_resident"] <= least + 40 * MIB
        # What a run does depends on how many experts fit, and that on what else is resident: it repeats with these numbers.
        sizes = [mixed["offload"]["memory"][f"capacity_{which}"] for which in ("high", "low")]
        again = generate(low, "--capacity-high", sizes[0], "--capacity-low", sizes[1], "--offload", "hobbit", "--io", "sync")
        for what in ("hit_high", "hit_low", "miss_high", "miss_low", "skip", "bytes_read"):
            assert again["offload"][what] == mixed["offload"][what], what
        assert again["completions"] == mixed["completions"]
        refused("too small for 30 experts in full and 5 in low precision", "generate", low, "-p", "x", "-n", 1, "--offload", "hobbit",
                "--memory", least, "--capacity-high", 30, "--capacity-low", 5)
        refused("--capacity-high", "generate", low, "-p", "x", "-n", 1, "--offload", "hobbit", "--capacity-low", 5)

        refused("--add-low-experts", "generate", m, "-p", "x", "--offload", "hobbit")
        refused("t1 is 0.9 and t2 0.5", "generate", low, "-p", "x", "--offload", "hobbit", "--t1", 0.9, "--t2", 0.5)
        refused("is no setting of lru", "generate", m, "-p", "x", "--offload", "lru", "--t1", 0.5)
        refused("must be none,", "generate", m, "-p", "x", "--offload", "hobit")
        refused("is no size", "generate", m, "-p", "x", "--memory", "lots")

        # A file that is cut short while it is used: a clear error, within a moment.
        running = subprocess.Popen([MOIETY, "generate", m, "-p", "Once", "--ignore-eos", "--temperature", "2", "-n", "600", "--offload", "lru", "--memory", str(least + 60 * MIB)],
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.stdout.read(1)  # it generates
        os.truncate(m, Path(m).stat().st_size // 3)
        _, error = running.communicate(timeout=60)
        assert running.returncode == 1, (running.returncode, error)
        last = error.strip().splitlines()[-1]
        assert "of layer" in last and "m.gguf at offset" in last and "cut short" in last, last

        # Killed while it reads: it ends at once and leaves nothing behind.
        running = subprocess.Popen([MOIETY, "generate", low, "-p", "Once", "--ignore-eos", "-n", "600", "--offload", "hobbit", "--memory", str(least + 80 * MIB)],
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.stdout.read(1)
        running.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        running.communicate(timeout=30)
        assert running.returncode == -signal.SIGTERM and time.monotonic() - begin < 10
        assert sorted(p.name for p in Path(folder).iterdir()) == ["m.gguf", "m.hobbit.gguf"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
