#!/usr/bin/env python3
"""Writes tests/data/vocabularies/<name>/: tokenizers as they were saved before tokenizer.json, and what transformers makes of text.

    .venv/bin/python tools/make_vocabulary_fixtures.py

The vocabularies are those of tests/data/tokenizers; expected.jsonl holds the ids and texts of AutoTokenizer. Deterministic.
"""
import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/data/tokenizers"
TOKEN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}

# name: (fixture of the vocabulary, config.json, other files)
CASES = {
    "gpt2": ("gpt2", {"model_type": "gpt2"}, {}),
    "gpt2-added": ("gpt2", {"model_type": "gpt2"}, {
        "added_tokens.json": {"Added": 601, "<extra>": 600},
        "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}),
    "roberta": ("roberta", {"model_type": "roberta"}, {
        "special_tokens_map.json": {"mask_token": dict(TOKEN, content="<mask>", lstrip=True)}}),
    "qwen2": ("qwen2", {"model_type": "qwen2"}, {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
                                  "added_tokens_decoder": {"600": dict(TOKEN, content="<think>", special=False),
                                                           "601": dict(TOKEN, content="<|object|>")}}}),
    "bert": ("wordpiece-uncased", {"model_type": "bert"}, {}),
    "bert-cased": ("wordpiece-cased", {}, {
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": False,
                                  "tokenize_chinese_chars": False}}),
}


def main():
    for name, (fixture, config, files) in CASES.items():
        folder = ROOT / "tests/data/vocabularies" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = json.loads((FIXTURES / f"{fixture}.json").read_text())["model"]
        if model["type"] == "WordPiece":
            (folder / "vocab.txt").write_text("".join(p + "\n" for p in sorted(model["vocab"], key=model["vocab"].get)))
        else:
            (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]))
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        for file, value in files.items():
            (folder / file).write_text(json.dumps(value))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [bytes.fromhex(json.loads(line)["hex"]).decode("utf-8", "replace") for line in open(FIXTURES / f"{fixture}.jsonl")][:70]
        texts += ["a <mask> b<mask>", "x<|im_start|>user <|endoftext|>", "Added <extra>Added", "<think>so</think><|object|>", "[MASK] [CLS]", "## ##a",
                  "<s>a</s><pad><unk>"]
        with open(folder / "expected.jsonl", "w") as out:
            for text in texts:
                ids = tokenizer._tokenizer.encode(text).ids
                out.write(json.dumps({"text": text, "ids": ids, "decoded": tokenizer._tokenizer.decode(ids, skip_special_tokens=False),
                                      "skip": tokenizer._tokenizer.decode(ids, skip_special_tokens=True)}, ensure_ascii=False) + "\n")
        print(f"{name}: {type(tokenizer).__name__}, {len(tokenizer)} tokens, {len(texts)} texts")


if __name__ == "__main__":
    main()
