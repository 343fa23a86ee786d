"""Models that `moiety train` saves are read by transformers, tokenizers and TensorBoard's format.

For families with fused, stacked and per-expert tensors (the fixtures of the parity tests): one step at rate 0 from the checkpoint, after
which transformers must find the very same weights; and a few steps from random weights, after which transformers must compute the same
logits from the saved model as moiety does.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOIETY = Path(os.environ.get("MOIETY_BIN", ROOT / "build/bin")).resolve() / "moiety"
CACHE = Path(os.environ.get("MOIETY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moiety")
LOADED = ["llama-gqa", "phi3", "mixtral", "mixtral-fused", "olmoe", "qwen3_moe", "qwen3_moe-fused", "gpt_oss", "deepseek_v3",
          "deepseek_v3-fused", "granitemoe", "stablelm", "glm4", "gemma3"]
FRESH = ["llama-gqa", "phi3", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe", "granitemoeshared",
         "stablelm", "glm", "glm4", "starcoder2", "phi", "phimoe", "olmo2", "hunyuan_v1_dense"]


def moiety(folder, *arguments):
    result = subprocess.run([MOIETY, *map(str, arguments)], cwd=folder, text=True, capture_output=True)
    assert result.returncode == 0, f"moiety {' '.join(map(str, arguments))}: {result.stderr}"
    return result.stdout


def run_file(folder, name, model, steps, lr):
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({
        "model": model, "data": {"sources": [{"path": "text.txt", "document": "paragraph"}], "length": 32},
        "train": {"steps": steps, "batch": 2}, "optimizer": {"lr": lr, "weight_decay": 0}, "output": name}))
    return file


def load(folder):
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", dtype="float32")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(kind), f"{folder}: {kind}: {sorted(info[kind])[:4]}"
    return model.eval()


def same_weights(folder, fixture):
    import torch
    moiety(folder, "train", run_file(folder, "kept-" + fixture.name, str(fixture), 1, 0.0), "--quiet")
    before, after = load(fixture).state_dict(), load(folder / ("kept-" + fixture.name) / "last").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), f"{fixture.name}: {name} changed"


def same_logits(folder, fixture):
    import torch
    from safetensors.torch import load_file
    name = "new-" + fixture.name
    model = {"config": str(fixture / "config.json"), "tokenizer": str(fixture)}
    moiety(folder, "train", run_file(folder, name, model, 3, 3e-3), "--quiet")
    moiety(folder, "logits", folder / name / "last", "--ids", "5 17 200 31 8 64 99 120", "--dtype", "f32", "-o", folder / "out.safetensors",
           "--quiet")
    ours = load_file(folder / "out.safetensors")
    with torch.no_grad():
        theirs = load(folder / name / "last")(input_ids=ours["ids"]).logits
    error = (ours["logits"] - theirs).abs().max().item()
    assert error < 2e-4, f"{fixture.name}: logits differ by {error}"  # as in the parity tests: f32 sums in another order


def tokenizer_and_events(folder):
    """The byte tokenizer in `tokenizers`, the event file through protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from transformers import AutoTokenizer
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "max_position_embeddings": 64}
    moiety(folder, "train", run_file(folder, "bytes", {"config": config, "tokenizer": "bytes"}, 3, 1e-3), "--quiet")
    text = "Aé€😀 \t\n" + "".join(map(chr, range(1, 128)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "bytes/last")
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()), ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    load(folder / "bytes/last")

    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    kinds = {"double": 1, "float": 2, "int64": 3, "string": 9, "message": 11}

    def message(name, fields):
        entry = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            entry.field.add(name=field, number=number, type=kinds[kind], label=label, type_name=of)

    message("Value", [("tag", 1, "string", 1, None), ("simple_value", 2, "float", 1, None)])
    message("Summary", [("value", 1, "message", 3, ".t.Value")])
    message("Event", [("wall_time", 1, "double", 1, None), ("step", 2, "int64", 1, None), ("file_version", 3, "string", 1, None),
                      ("summary", 5, "message", 1, ".t.Summary")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    event_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))
    data = next((folder / "bytes/tensorboard").iterdir()).read_bytes()
    events, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at:at + 8], "little")
        events.append(event_class.FromString(data[at + 12:at + 12 + length]))
        at += 16 + length
    assert events[0].file_version == "brain.Event:2"
    log = [json.loads(line) for line in (folder / "bytes/log.jsonl").read_text().splitlines()]
    assert len(events) == 1 + len(log)
    for event, record in zip(events[1:], log):
        values = {v.tag: v.simple_value for v in event.summary.value}
        assert event.step == record["step"] and abs(values["loss"] - record["loss"]) < 1e-5, (event, record)


def main():
    if not MOIETY.exists():
        sys.exit(f"there is no {MOIETY}: build first, or set MOIETY_BIN")
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"skipped: {error}")
        sys.exit(77)
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fixtures = CACHE / "fixtures"
    failures = []
    with tempfile.TemporaryDirectory(prefix="moiety-interop-") as name:
        folder = Path(name)
        from pydoc_data.topics import topics
        (folder / "text.txt").write_text("\n\n".join(topics.values())[:20000])
        tokenizer_and_events(folder)
        if not fixtures.exists():
            print(f"skipped the families: no {fixtures}; tools/make_fixtures.py makes them")
            sys.exit(77)
        for check, names in ((same_weights, LOADED), (same_logits, FRESH)):
            for fixture in names:
                if not (fixtures / fixture / "config.json").exists():
                    failures.append(f"{fixture}: no such fixture")
                    continue
                try:
                    check(folder, fixtures / fixture)
                    print(f"{check.__name__} {fixture}: ok", flush=True)
                except AssertionError as error:
                    failures.append(f"{check.__name__} {fixture}: {error}")
                    print(failures[-1], flush=True)
    sys.exit("\n".join(failures) if failures else 0)


if __name__ == "__main__":
    main()
