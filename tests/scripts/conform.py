"""moiety-conform itself: what passes, what fails, how it says so, and that no bad case file ends it early."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from safetensors.numpy import save_file

CONFORM = os.path.join(os.environ["MOIETY_BIN"], "moiety-conform")
# Q8_0: one block is an f16 scale (1.0) and 32 signed bytes.
BLOCK = numpy.frombuffer(numpy.float16(1.0).tobytes() + bytes(range(32)), dtype=numpy.uint8).reshape(1, 34)
VALUES = numpy.arange(32, dtype=numpy.float32).reshape(1, 32)


def run(*words):
    done = subprocess.run([CONFORM, *map(str, words)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def case(path, tensors=None, **changes):
    metadata = {"system": "gguf-formats", "op": OP, "config": '{"type": "Q8_0"}', "rtol": "0", "atol": "1e-6", **changes}
    save_file(tensors or {"in.blocks": BLOCK, "out.values": VALUES}, path, {k: v for k, v in metadata.items() if v is not None})
    return path


def check(condition, *what):
    if not condition:
        sys.exit("FAIL: " + " ".join(map(str, what)))


code, out, _ = run("--list")
check(code == 0 and "gguf-formats/dequantize_q8_0\n" in out, out)
OP = "dequantize_q8_0"
check(run()[0] == 2, "no argument is wrong use")
check(run("--no-such-flag")[0] == 2, "an unknown flag is wrong use")
code, _, err = run("/no/such/place")
check(code == 2 and "/no/such/place" in err, err)

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    check(run(folder)[0] == 1, "a folder without cases does not pass")
    good = case(folder / "good.safetensors")
    names = [line.split()[0] for line in run("--list")[1].splitlines()]
    check("gguf-formats/dequantize_q8_0" in names, names)
    code, out, err = run(good)
    check(code == 0 and out.endswith("1 passed, 0 failed\n"), out, err)
    check(out.startswith(f"gguf-formats/dequantize_q8_0 {good} ok\n"), out)

    bad = VALUES.copy()
    bad[0, 7] += 0.5
    expected = {
        "wrong": (case(folder / "wrong.safetensors", {"in.blocks": BLOCK, "out.values": bad}), "FAIL values, abs 0.5, rel"),
        "nan": (case(folder / "nan.safetensors", {"in.blocks": BLOCK, "out.values": VALUES * numpy.nan}), "FAIL values"),
        "shape": (case(folder / "shape.safetensors", {"in.blocks": BLOCK, "out.values": VALUES[:, :31].copy()}), "FAIL values: shape"),
        "missing": (case(folder / "missing.safetensors", {"in.blocks": BLOCK, "out.other": VALUES}), "FAIL other: the op gives no such output"),
        "empty": (case(folder / "empty.safetensors", {"in.blocks": BLOCK}), "FAIL the case has no out.* tensor"),
        "input": (case(folder / "input.safetensors", {"in.other": BLOCK, "out.values": VALUES}), "FAIL"),
        "op": (case(folder / "op.safetensors", op="no-such-op"), "no such op"),
        "config": (case(folder / "config.safetensors", config="[]"), "FAIL"),
        "tolerance": (case(folder / "tolerance.safetensors", atol="-1"), "FAIL `atol`"),
        "metadata": (case(folder / "metadata.safetensors", system=None), "FAIL the metadata has no `system`"),
    }
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    expected["broken"] = (folder / "broken.safetensors", "FAIL")
    for name, (path, words) in expected.items():
        code, out, err = run(path)
        check(code == 1 and words in out and out.endswith("0 passed, 1 failed\n"), name, out, err)
    code, out, _ = run(folder)
    check(code == 1 and out.endswith(f"1 passed, {len(expected)} failed\n") and len(out.splitlines()) == len(expected) + 2, out)
    # A difference within the tolerance passes, one beyond it does not.
    near = VALUES + numpy.float32(1e-3)
    check(run(case(folder / "near.safetensors", {"in.blocks": BLOCK, "out.values": near}, atol="2e-3"))[0] == 0, "within atol")
    check(run(case(folder / "near.safetensors", {"in.blocks": BLOCK, "out.values": near}, atol="5e-4"))[0] == 1, "beyond atol")
print("moiety-conform behaves")
