"""moiety compress --method eaquant: packed and plain storage of one model are the same to every verb, and the size is told beforehand."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
RUN = """
model:
  tokenizer: bytes
  config: {model_type: olmoe, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 4, num_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 128}
data: {sources: [{path: text.txt}], length: 32}
train: {steps: 2, batch: 2}
optimizer: {lr: 4.0e-3}
output: {folder: base}
"""
MORE = """
model: small
data: {sources: [{path: text.txt}], length: 32}
train: {steps: 1, batch: 2, train: [".*"]}
optimizer: {lr: 1.0e-3}
output: {folder: more}
"""
COMPRESS = ["--method", "eaquant", "--calibration", "text.txt", "--sequences", "2", "--sequence-length", "32", "--rotation-block", "8",
            "--rotation-steps", "4"]


def tensors(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    return {name: (t["dtype"], t["shape"], data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]])
            for name, t in header.items() if name != "__metadata__"}


def main():
    with tempfile.TemporaryDirectory(prefix="moiety-eaquant-") as folder:
        folder = Path(folder)

        def moiety(*arguments, code=0):
            done = subprocess.run([MOIETY, *arguments], cwd=folder, text=True, capture_output=True)
            assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
            return done.stdout + done.stderr if code else done.stdout

        def content(path):
            """The config and every tensor; the order in the file may be another."""
            return json.loads((folder / path / "config.json").read_text()), tensors(folder / path / "model.safetensors")

        (folder / "text.txt").write_text("Every good boy does fine; all cows eat grass.\n" * 200)
        (folder / "run.yaml").write_text(RUN)
        moiety("train", "run.yaml")

        planned = json.loads(moiety("compress", "base/last", *COMPRESS, "-o", "small", "--dry-run", "--json"))
        assert not (folder / "small").exists() and not planned["written"]
        made = json.loads(moiety("compress", "base/last", *COMPRESS, "-o", "small", "--json"))
        plain = json.loads(moiety("compress", "base/last", *COMPRESS, "--plain", "-o", "plain", "--json"))
        assert planned["bytes"] == made["bytes"], (planned, made)
        assert made["packed"] and not plain["packed"] and made["bytes_before"] == plain["bytes_before"]
        assert made["bytes"] < 0.5 * made["bytes_before"] < plain["bytes"], (made, plain)
        said = moiety("compress", "base/last", *COMPRESS, "-o", "small", "--overwrite")
        assert f"{made['bytes'] / 2**20:.2f} MiB, {made['bytes_before'] / 2**20:.2f} MiB before" in said, said

        info = {name: json.loads(moiety("info", name, "--json", "--tensors")) for name in ("base/last", "small", "plain")}
        for name, report in (("small", made), ("plain", plain)):
            assert info[name]["bytes"] == report["bytes"] == sum(t["bytes"] for t in info[name]["tensor_list"]), name
            assert report["bytes"] <= info[name]["bytes_on_disk"] <= report["bytes"] + 256 * info[name]["tensors"] + 64, name
        assert info["small"]["parameters"] == info["plain"]["parameters"]
        assert info["small"]["bits_per_weight"] < 0.5 * info["plain"]["bits_per_weight"]

        measure = lambda name: json.loads(moiety("eval", name, "--text", "text.txt", "--limit-tokens", "200", "--context", "32", "--json"))
        small, same = measure("small"), measure("plain")
        assert small["perplexity"]["nll"] == same["perplexity"]["nll"], (small, same)
        say = lambda name: moiety("generate", name, "-p", "Every", "--max-tokens", "8", "--greedy")
        assert say("small") == say("plain")
        offload = ["-p", "Every", "--max-tokens", "4", "--greedy", "--offload", "lru", "--capacity-high", "3"]
        assert "write the model out first" in moiety("generate", "small", *offload, code=1)
        moiety("generate", "plain", *offload)
        for verb in (["merge"], ["convert", "--dtype", "bf16"]):
            for name in ("small", "plain"):
                moiety(verb[0], name, *verb[1:], "-o", f"{name}-{verb[0]}")
            assert content(f"small-{verb[0]}") == content(f"plain-{verb[0]}"), verb
        (folder / "more.yaml").write_text(MORE)
        moiety("train", "more.yaml")
        (folder / "more.yaml").write_text(MORE.replace("small", "plain").replace("more", "again"))
        moiety("train", "more.yaml")
        assert content("more/last")[1] == content("again/last")[1]
        # Its parts hold nothing that learns.
        for name in ("small", "plain"):
            (folder / "more.yaml").write_text(MORE.replace("small", name).replace(', train: [".*"]', ""))
            assert "which of them learn" in moiety("train", "more.yaml", code=1)

        # A folder whose section was lost does not load as if nothing were.
        config = json.loads((folder / "small/config.json").read_text())
        config["moiety"].pop("packed_rows")
        (folder / "small/config.json").write_text(json.dumps(config))
        assert "weight" in moiety("eval", "small", "--text", "text.txt", code=1)


if __name__ == "__main__":
    sys.exit(main())
