#!/usr/bin/env python3
"""Writes the seed corpora tests/fuzz/corpus/<target>/: small valid and near-valid inputs of every reader.

    tools/make_fuzz_seeds.py            write them (the files are committed)

Deterministic: the same files every time.
"""
import gzip
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/fuzz/corpus"


def put(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


# ---- safetensors ----

def safetensors(header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors():
    entry = lambda dtype, shape, a, b: {"dtype": dtype, "shape": shape, "data_offsets": [a, b]}
    put("safetensors", "two", safetensors({"__metadata__": {"format": "pt", "x": "y"}, "a": entry("F32", [2, 3], 0, 24),
                                           "b.weight": entry("BF16", [4], 24, 32)}, bytes(range(32))))
    for dtype, size in [("F64", 8), ("F16", 2), ("I64", 8), ("I32", 4), ("I16", 2), ("I8", 1), ("U8", 1), ("BOOL", 1),
                        ("U16", 2), ("U32", 4), ("U64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1)]:
        put("safetensors", "type_" + dtype, safetensors({"t": entry(dtype, [3], 0, 3 * size)}, bytes(range(3 * size))))
    put("safetensors", "scalar", safetensors({"s": entry("F32", [], 0, 4)}, b"\0\0\x80?"))
    put("safetensors", "empty_tensor", safetensors({"e": entry("F32", [0, 5], 0, 0)}))
    put("safetensors", "empty", safetensors({}))
    put("safetensors", "hole", safetensors({"a": entry("F32", [1], 4, 8)}, bytes(8)))
    put("safetensors", "overlap", safetensors({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)))
    put("safetensors", "huge_shape", safetensors({"a": entry("F32", [1 << 31, 1 << 31, 4], 0, 0)}))
    put("safetensors", "long_header", struct.pack("<Q", 1 << 60) + b"{}")
    put("safetensors", "deep", safetensors(b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"))
    put("safetensors", "spaces", safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}      ', b"x"))


# ---- matrices in parts ----

def make_low_rank_sparse():
    def parts(left=(3, 1), right=(1, 2), rows=(1, 2), index=(2,), dtype="F32"):
        size = 4 if dtype == "F32" else 2
        header, data = {}, b""
        for name, shape in (("w.left", left), ("w.right", right), ("w.rows", rows)):
            n = size * int(np.prod(shape))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + n]}
            data += bytes([0, 0, 128, 63] * n)[:n]
        packed = struct.pack(f"<{len(index)}q", *index)
        header["w.index"] = {"dtype": "I64", "shape": [len(index)], "data_offsets": [len(data), len(data) + len(packed)]}
        return safetensors(header, data + packed)
    put("low_rank_sparse", "f32", parts())
    put("low_rank_sparse", "bf16", parts(dtype="BF16"))
    put("low_rank_sparse", "no_rows", parts(rows=(0, 2), index=()))
    put("low_rank_sparse", "all_rows", parts(rows=(3, 2), index=(0, 1, 2)))
    put("low_rank_sparse", "twice", parts(rows=(2, 2), index=(1, 1)))
    put("low_rank_sparse", "outside", parts(index=(3,)))
    put("low_rank_sparse", "wide", parts(left=(300, 1), right=(1, 300), rows=(0, 300), index=()))
    put("low_rank_sparse", "no_rank", parts(left=(3, 0), right=(0, 2)))


def make_packed_rows():
    def packed(section, q=(2, 2), codes=b"\x21\x03\x54\x0f", scale=(2, 1), zero=(2, 1), kind="U8", ends=("q", "scale", "zero")):
        header, data = {"__metadata__": {"section": json.dumps(section)}}, b""
        ones = lambda shape: struct.pack("<f", 1) * int(np.prod(shape))
        for name, dtype, shape, raw in (("q", kind, q, codes), ("scale", "F32", scale, ones(scale)), ("zero", "F32", zero, ones(zero))):
            if name in ends:
                header["w." + name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
                data += raw
        return safetensors(header, data)
    put("packed_rows", "four", packed({"bits": 4}))
    put("packed_rows", "odd", packed({"bits": 4, "dtype": "BF16", "tensors": {"w": {"width": 3}}}))
    put("packed_rows", "other_type", packed({"bits": 4, "tensors": {"w": {"dtype": "F16"}}}))
    put("packed_rows", "three", packed({"bits": 3, "tensors": {"w": {"width": 4}}}, codes=b"\x21\x03\x54\x0f"))
    put("packed_rows", "two", packed({"bits": 2}))
    put("packed_rows", "sixteen", packed({"bits": 16}))
    put("packed_rows", "stack", packed({"bits": 5}, q=(2, 1, 5), codes=bytes(range(10)), scale=(2, 1, 1), zero=(2, 1, 1)))
    put("packed_rows", "beyond", packed({"bits": 4, "tensors": {"w": {"width": 3}}}, codes=b"\x21\x43\x54\x0f"))
    put("packed_rows", "too_wide", packed({"bits": 4, "tensors": {"w": {"width": 1 << 40}}}))
    put("packed_rows", "no_zero", packed({"bits": 4}, ends=("q", "scale")))
    put("packed_rows", "wrong_rows", packed({"bits": 4}, scale=(3, 1)))
    put("packed_rows", "one_bit", packed({"bits": 1}))
    put("packed_rows", "no_rows", packed({"bits": 4}, q=(0, 2), codes=b"", scale=(0, 1), zero=(0, 1)))
    put("packed_rows", "numbers", packed({"bits": 4}, q=(2, 1), codes=struct.pack("<2f", 1, 2), kind="F32"))


# ---- compressed task vectors ----

def golomb(positions, b, signs=True):
    """(position, negative) in order, to bytes."""
    bits, previous = "", -1
    for at, negative in positions:
        gap = at - previous - 1
        previous = at
        bits += "1" * (gap >> b) + "0" + (f"{gap & ((1 << b) - 1):0{b}b}" if b else "") + (str(int(negative)) if signs else "")
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))


def make_compeft():
    kept = [(1, False), (6, True), (40, True), (76, False)]
    words = lambda sign: struct.pack("<2Q", *(sum(1 << at - 64 * w for at, n in kept if n == sign and at // 64 == w) for w in (0, 1)))

    def vector(form, tensors, **more):
        """`tensors`: name -> (type, shape, bytes)."""
        metadata = {"task_vector": "1", "kind": "full", "form": form, "density": "0.05", "alpha": "1", "d": "77", "nnz": "4", "b": "3",
                    "names": json.dumps(["a", "b.c", "zz"]), "shapes": json.dumps([[2, 3], [], [70]])} | more
        header, data = {"__metadata__": metadata}, b""
        for name, (kind, shape, raw) in tensors.items():
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        return safetensors(header, data)

    scale = ("F32", [], struct.pack("<f", 0.5))
    code = golomb(kept, 3)
    signs = {"signs.golomb": ("U8", [len(code)], code), "scale": scale}
    places = golomb(kept, 3, signs=False)
    pruned = {"values": ("F16", [4], np.arange(1, 5, dtype="<f2").tobytes()), "signs.golomb": ("U8", [len(places)], places), "scale": scale}
    masks = {"signs.positive": ("U64", [2], words(False)), "signs.negative": ("U64", [2], words(True)), "scale": scale}
    put("compeft", "golomb", vector("golomb", signs))
    put("compeft", "masks", vector("masks", masks))
    put("compeft", "prune", vector("prune", pruned, kind="lora", notes=json.dumps({"adapter_config": "{}"})))
    put("compeft", "dense", vector("dense", {"values": ("F32", [77], np.arange(77, dtype="<f4").tobytes()), "scale": scale}, nnz="77", b="0"))
    put("compeft", "nothing", vector("golomb", {"signs.golomb": ("U8", [0], b""), "scale": ("F32", [], bytes(4))}, nnz="0", b="0"))
    put("compeft", "version", vector("golomb", signs, task_vector="2"))
    put("compeft", "cut", vector("golomb", {"signs.golomb": ("U8", [2], code[:2]), "scale": scale}))
    put("compeft", "longer", vector("golomb", {"signs.golomb": ("U8", [len(code) + 1], code + b"\0"), "scale": scale}))
    put("compeft", "huge", vector("golomb", signs, d=str(1 << 47), names='["a"]', shapes=json.dumps([[1 << 47]])))
    put("compeft", "overflow", vector("golomb", signs, names='["a"]', shapes=json.dumps([[1 << 40, 1 << 40]])))
    put("compeft", "wide", vector("golomb", signs, b="57"))
    put("compeft", "both", vector("masks", masks | {"signs.negative": ("U64", [2], words(False))}))
    put("compeft", "head", vector("golomb", signs | {"classifier.weight": ("BF16", [2], bytes(4))}, aliases='{"tied": "a"}'))
    put("compeft", "order", vector("golomb", signs, names='["b.c", "a", "zz"]'))


# ---- adapters ----

def adapter(config, tensors):
    """`tensors`: name -> shape; f32 counting up."""
    header, data = {}, b""
    for name, shape in tensors.items():
        values = np.arange(int(np.prod(shape)), dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(config) if not isinstance(config, str) else config
    return text.encode() + b"\0" + safetensors(header, data)


def make_peft():
    def pair(path, a, b, **more):
        front = f"base_model.model.model.layers.{path}."
        return {front + "lora_A.weight": a, front + "lora_B.weight": b} | {front + k: v for k, v in more.items()}

    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    q = pair("0.self_attn.q_proj", [2, 8], [8, 2])
    put("peft", "lora", adapter(lora, q))
    put("peft", "rslora", adapter(lora | {"use_rslora": True, "bias": "none", "modules_to_save": None}, q))
    put("peft", "dora", adapter(lora | {"use_dora": True}, pair("0.self_attn.k_proj", [2, 8], [4, 2], lora_magnitude_vector=[4])))
    put("peft", "dora_short", adapter(lora, pair("0.self_attn.q_proj", [2, 8], [8, 2], lora_magnitude_vector=[3])))
    put("peft", "no_heads", adapter(lora, pair("0.self_attn.q_proj", [2, 8], [7, 2])))
    put("peft", "patterns", adapter(lora | {"rank_pattern": {"down_proj": 1, "layers\\.1\\..*": 3}, "alpha_pattern": {"q_proj": 1}},
                                    q | pair("1.mlp.down_proj", [1, 6], [8, 1]) | pair("1.mlp.gate_proj", [3, 8], [6, 3])))
    put("peft", "slow_pattern", adapter(lora | {"rank_pattern": {"(.*)*x": 2, "(a|aa)*b": 3}}, q))
    put("peft", "fused", adapter(lora, pair("1.self_attn.qkv_proj", [2, 8], [16, 2]) | pair("1.mlp.gate_up_proj", [2, 8], [12, 2])))
    put("peft", "experts", adapter(lora, pair("0.mlp.experts.base_layer", [6, 8], [12, 6]) | pair("0.mlp.experts", [6, 6], [8, 6])))
    put("peft", "embedding", adapter(lora, q | {"base_model.model.model.embed_tokens.lora_embedding_A": [2, 4]}))
    put("peft", "half", adapter(lora, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [2, 8]}))
    put("peft", "empty", adapter({}, {}))
    put("peft", "other", adapter({"peft_type": "LOHA"}, q))
    put("peft", "pissa", adapter(lora | {"init_lora_weights": "pissa"}, q))
    own = {"peft_type": "MOIETY", "moiety": {"parts": [{"slug": "mola", "target": "q_proj"}]}}
    put("peft", "own", adapter(own, {"layers.0.adapters.q_proj.lora_A": [2, 1, 8], "layers.0.adapters.q_proj.router.weight": [2, 8]}))
    put("peft", "own_empty", adapter(own | {"moiety": 3}, {}))
    put("peft", "wrong_types", adapter('{"r": "2", "lora_alpha": null, "rank_pattern": [], "peft_type": {}}', q))


# ---- GGUF ----

TYPES = {"u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"), "i32": (5, "<i"),
         "f32": (6, "<f"), "bool": (7, "<B"), "u64": (10, "<Q"), "i64": (11, "<q"), "f64": (12, "<d")}


def gguf_string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value):
    kind, data = value
    if kind == "str":
        return struct.pack("<I", 8) + gguf_string(data)
    if kind == "strs":
        return struct.pack("<IIQ", 9, 8, len(data)) + b"".join(map(gguf_string, data))
    if kind.endswith("s"):
        number, form = TYPES[kind[:-1]]
        return struct.pack("<IIQ", 9, number, len(data)) + b"".join(struct.pack(form, x) for x in data)
    number, form = TYPES[kind]
    return struct.pack("<I", number) + struct.pack(form, data)


def gguf(keys, tensors=(), version=3, alignment=32):
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, value in keys.items():
        out += gguf_string(key) + gguf_value(value)
    data = b""
    for name, dims, kind, raw in tensors:
        data += bytes(-len(data) % alignment)
        out += gguf_string(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    return out + bytes(-len(out) % alignment) + data


def llama_keys(arch="llama"):
    return {"general.architecture": ("str", arch), f"{arch}.block_count": ("u32", 1), f"{arch}.embedding_length": ("u32", 32),
            f"{arch}.attention.head_count": ("u32", 2), f"{arch}.attention.head_count_kv": ("u32", 1),
            f"{arch}.feed_forward_length": ("u32", 64), f"{arch}.context_length": ("u32", 128),
            f"{arch}.rope.freq_base": ("f32", 1e4), f"{arch}.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
            f"{arch}.vocab_size": ("u32", 4)}


def make_gguf():
    keys = llama_keys()
    tensors = [("token_embd.weight", [32, 4], 0, bytes(512)), ("blk.0.attn_q.weight", [32, 32], 8, bytes(34 * 32)),
               ("blk.0.ffn_gate.weight", [32, 2], 2, bytes(18 * 2)), ("output_norm.weight", [32], 0, bytes(128))]
    put("gguf", "llama", gguf(keys, tensors))
    put("gguf", "version2", gguf(keys, tensors, version=2))
    every = {f"k.{kind}": (kind, 1) for kind in TYPES} | {f"k.{kind}s": (kind + "s", [1, 0]) for kind in TYPES}
    put("gguf", "every_type", gguf(every | {"s": ("str", "text"), "ss": ("strs", ["a", "", "\u00e9"])}))
    put("gguf", "empty", gguf({}))
    put("gguf", "alignment", gguf({"general.alignment": ("u32", 64)}, [("t", [4], 0, bytes(16))], alignment=64))
    blocks = {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144), 13: (256, 176),
              14: (256, 210), 34: (256, 54), 35: (256, 66), 39: (32, 17), 30: (1, 2), 1: (1, 2), 24: (1, 1), 28: (1, 8)}
    put("gguf", "every_format", gguf({}, [(f"t{k}", [n], k, bytes(b)) for k, (n, b) in blocks.items()]))
    words = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "\u2581a", "ab"]
    spm = {"tokenizer.ggml.model": ("str", "llama"), "tokenizer.ggml.tokens": ("strs", words),
           "tokenizer.ggml.scores": ("f32s", [0, 0, 0, 0, -1, -2, -3, -4, -5]),
           "tokenizer.ggml.token_type": ("i32s", [2, 3, 3, 6, 1, 1, 1, 1, 1]),
           "tokenizer.ggml.bos_token_id": ("u32", 1), "tokenizer.ggml.eos_token_id": ("u32", 2),
           "tokenizer.ggml.add_bos_token": ("bool", 1)}
    put("gguf", "tokenizer_spm", gguf(keys | spm))
    bpe = {"tokenizer.ggml.model": ("str", "gpt2"), "tokenizer.ggml.pre": ("str", "llama-bpe"),
           "tokenizer.ggml.tokens": ("strs", ["H", "e", "l", "o", "\u0120", "He", "ll", "llo", "Hello", "<|end|>"]),
           "tokenizer.ggml.token_type": ("i32s", [1] * 9 + [3]),
           "tokenizer.ggml.merges": ("strs", ["H e", "l l", "ll o", "He llo"]), "tokenizer.ggml.eos_token_id": ("u32", 9),
           "tokenizer.chat_template": ("str", "{% for m in messages %}{{ m.content }}{% endfor %}")}
    put("gguf", "tokenizer_bpe", gguf(keys | bpe))
    bert = {"tokenizer.ggml.model": ("str", "bert"), "tokenizer.ggml.tokens": ("strs", ["[PAD]", "[UNK]", "[CLS]", "[SEP]",
            "\u2581hello", "w", "\u2581w", "orld", "[MASK]"]), "tokenizer.ggml.token_type": ("i32s", [3, 2, 3, 3, 1, 1, 1, 1, 3]),
            "tokenizer.ggml.cls_token_id": ("u32", 2), "tokenizer.ggml.seperator_token_id": ("u32", 3)}
    put("gguf", "tokenizer_bert", gguf(llama_keys("bert") | bert))
    for arch in ["gemma3", "qwen2", "qwen3moe", "phi3", "deepseek2", "gpt-oss", "granitemoe", "olmoe"]:
        extra = {f"{arch}.expert_count": ("u32", 4), f"{arch}.expert_used_count": ("u32", 2),
                 f"{arch}.attention.sliding_window": ("u32", 16), f"{arch}.rope.scaling.type": ("str", "yarn"),
                 f"{arch}.rope.scaling.factor": ("f32", 4.0), f"{arch}.attention.key_length": ("u32", 16)}
        put("gguf", "arch_" + arch, gguf(llama_keys(arch) | extra, tensors))
    freqs = np.linspace(1, 8, 8).astype("<f4").tobytes()
    put("gguf", "rope_freqs", gguf(keys, tensors + [("rope_freqs.weight", [8], 0, freqs)]))
    put("gguf", "embedded", gguf(keys | {"moiety.config": ("str", '{"model_type": "llama"}'),
                                         "moiety.generation_config": ("str", '{"eos_token_id": [1, 2]}')}))
    put("gguf", "huge_count", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    put("gguf", "huge_array", gguf({})[:16] + struct.pack("<Q", 1) + gguf_string("a") + struct.pack("<IIQ", 9, 8, 1 << 50))
    put("gguf", "nested_array", gguf({})[:16] + struct.pack("<Q", 1) + gguf_string("a") +
        struct.pack("<IIQIQ", 9, 9, 1, 0, 1) + b"x")
    put("gguf", "big_endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


def make_edge_experts():
    sizes = {"gate": (3, 5), "up": (3, 5), "down": (5, 3)}  # width 3, hidden 5

    def experts(bits, name="abc", skip="", blocks=(0, 2), count=2):
        header, data = {"__metadata__": {"router_hash": name}}, b""

        def add(key, kind, shape, size):
            nonlocal data
            if key != skip:
                header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
                data += bytes((7 * i + 1) % 31 for i in range(size))

        for i, b in enumerate(bits):
            block, e = blocks[i // count], i % count
            for p, (rows, columns) in sizes.items():
                if b >= 16:
                    add(f"blk.{block}.ffn_{p}.{e}.weight", f"F{b}", [rows, columns], rows * columns * b // 8)
                else:
                    add(f"blk.{block}.ffn_{p}.{e}.scale", "F16", [rows], 2 * rows)
            for p, (rows, columns) in sizes.items():
                if b < 16:
                    each = (columns * b + 7) // 8
                    add(f"blk.{block}.ffn_{p}.{e}.q", "U8", [rows, each], rows * each)
            if len(data) % 8:
                add(f"blk.{block}.ffn_pad.{e}", "U8", [-len(data) % 8], -len(data) % 8)
        return safetensors(header, data)

    def keys(bits, blocks=(0, 2), count=2, hidden=5, width=3, bf16=0):
        return gguf({"general.architecture": ("str", "llama"), "edgemoe.bits": ("i32s", bits), "edgemoe.blocks": ("i32s", list(blocks)),
                     "edgemoe.expert_count": ("u32", count), "edgemoe.hidden_size": ("u32", hidden), "edgemoe.expert_width": ("u32", width),
                     "edgemoe.bf16": ("bool", bf16), "edgemoe.router_hash": ("str", "abc")})

    def pair(name, model, file):
        put("edge_experts", name, model + file + struct.pack("<I", len(model)))

    every = [2, 4, 8, 16]
    pair("every_width", keys(every), experts(every))
    pair("bf16", keys([32, 8, 4, 2], bf16=1), experts([32, 8, 4, 2]))
    pair("other_model", keys(every), experts(every, name="abd"))
    pair("missing", keys(every), experts(every, skip="blk.2.ffn_down.0.q"))
    pair("narrower", keys([4, 4, 8, 16]), experts(every))
    pair("three_bits", keys([3, 4, 8, 16]), experts(every))
    pair("huge", keys(every, hidden=1 << 30, width=1 << 30), experts(every))
    pair("falling", keys(every, blocks=(2, 0)), experts(every))
    pair("no_keys", gguf({}), experts(every))
    pair("no_file", keys(every), b"")


# ---- block formats, YAML, config.json ----

def make_format():
    rng = np.random.default_rng(1)
    for i in range(26):
        put("format", f"decode_{i:02}", bytes([i, 0]) + rng.bytes(512))
        values = rng.normal(size=256).astype("<f4")
        put("format", f"encode_{i:02}", bytes([i, 1]) + values.tobytes())
    put("format", "decode_empty", bytes([8, 0]))
    put("format", "encode_empty", bytes([8, 1]))
    put("format", "encode_large", bytes([20, 1]) + np.full(256, 3e38, "<f4").tobytes())
    put("format", "encode_nan", bytes([20, 1]) + np.full(256, np.nan, "<f4").tobytes())
    put("format", "encode_tiny", bytes([20, 1]) + np.full(256, 1e-42, "<f4").tobytes())


def make_yaml():
    put("yaml", "run", """# a run file
experts: 16
gate: sigmoid
scale: 1e-3
bias: true
parts:
  - slug: first
    layers: [0, 1, 2]
  - {slug: "second", rate: .5}
named:
  a: &a {slug: x}
  b: *a
words: [[a, b], ['c'], []]
extra: {anything: [1, null, ~, 0x1F, 0o17, -.inf, .nan]}
""")
    put("yaml", "unknown_key", "expertz: 4\n")
    put("yaml", "block_text", "gate: |\n  softmax\nextra: >-\n  folded\n  text\n")
    put("yaml", "tags", "extra: [!!str 1, !!int '2', !custom x, ! y]\n")
    put("yaml", "directive", "%YAML 1.2\n---\nsteps: 3\n...\n")
    put("yaml", "bomb", "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nextra: [*c,*c,*c]\n")
    put("yaml", "self", "extra: &a [*a]\n")
    put("yaml", "deep_flow", "extra: " + "[" * 80 + "]" * 80)
    put("yaml", "deep_block", "extra:\n" + "".join("  " * i + "-\n" for i in range(1, 40)))
    put("yaml", "complex_key", "? [a]\n: b\n")
    put("yaml", "twice", "steps: 1\nsteps: 2\n")
    put("yaml", "bom", b"\xef\xbb\xbfsteps: 1\n")
    put("yaml", "utf16", "steps: 1\n".encode("utf-16"))
    put("yaml", "ends", "a: 'x\nb: \"\\u00e9\\x41\\n\"\n")


def make_config():
    base = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    kinds = {
        "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 128}},
        "mistral": {"sliding_window": 32}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 6,
                                                               "query_pre_attn_scalar": 16, "rope_local_base_freq": 1e4},
        "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                 "original_max_position_embeddings": 128},
        "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                      "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
                        "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                                         "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}},
        "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 12.0,
                       "attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 6.0},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
                    "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
        "bert": {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    }
    for name, more in kinds.items():
        put("config", name, json.dumps({"model_type": name} | base | more))
    put("config", "nested", json.dumps({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"} | base}))
    put("config", "rope_parameters", json.dumps({"model_type": "llama", **base, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}))
    put("config", "wrong_types", json.dumps({"model_type": "llama", **base, "hidden_size": "64", "rope_scaling": [1],
                                             "vocab_size": -1, "num_attention_heads": 0}))
    put("config", "huge", json.dumps({"model_type": "llama", **base, "num_hidden_layers": 10**18, "head_dim": 2**62}))
    put("config", "list", "[1, 2, {}]")
    put("config", "deep", "[" * 100 + "]" * 100)


# ---- tokenizers ----

TEXTS = ["Hello, world!", "  two  spaces\n\n\ttab ", "na\u00efve caf\u00e9 \u4f60\u597d \ud55c\uae00 \u0645\u0631\u062d\u0628\u0627",
         "\U0001f469\u200d\U0001f4bb e\u0301 \u00bd \ufb01", "<s>[CLS] <|endoftext|> </s> [MASK]", "12345 3.14 1,000", "a" * 300,
         "\u2581x \x00\x01\x7f\u00a0\u3000\u200b"]


def make_tokenizer():
    for i, text in enumerate(TEXTS):
        for kind in range(0, 20, 3):
            put("tokenizer", f"text_{i}_{kind}", bytes([128 + kind, i]) + text.encode())
    put("tokenizer", "text_ill_formed", bytes([140, 0]) + b"a\xff\xc3(\xed\xa0\x80\xf4\x90\x80\x80 \xe2\x82")
    added = [{"id": 0, "content": "<s>", "special": True, "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}]
    alphabet = ["<s>", "H", "e", "l", "o", "He", "ll", "\u0120", "\u00c3", "w"]
    vocab = {word: i for i, word in enumerate(alphabet)}
    normalizers = [None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"},
                   {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                   {"type": "Replace", "pattern": {"Regex": "l+"}, "content": "L"}, {"type": "Prepend", "prepend": "\u2581"},
                   {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
                   {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Strip", "strip_left": True, "strip_right": True}]}]
    pre = [None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, {"type": "Whitespace"},
           {"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"},
           {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
           {"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|\\p{L}+"}, "behavior": "MergedWithPrevious", "invert": False},
           {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel", "add_prefix_space": True}]}]
    models = [{"type": "BPE", "vocab": vocab, "merges": ["H e", "l l"], "unk_token": None, "byte_fallback": False},
              {"type": "BPE", "vocab": vocab | {"<0x%02X>" % b: 10 + b for b in range(4)}, "merges": [["H", "e"]], "unk_token": "<s>",
               "byte_fallback": True, "fuse_unk": True, "ignore_merges": True, "end_of_word_suffix": "</w>"},
              {"type": "Unigram", "unk_id": 0, "vocab": [[word, -float(i)] for i, word in enumerate(alphabet)], "byte_fallback": False},
              {"type": "WordPiece", "vocab": vocab | {"##l": 10, "##o": 11}, "unk_token": "<s>", "continuing_subword_prefix": "##",
               "max_input_chars_per_word": 100},
              {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"}]
    post = [None, {"type": "ByteLevel", "trim_offsets": True}, {"type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}]
    decoders = [None, {"type": "ByteLevel"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "ByteFallback"},
                {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}, {"type": "BPEDecoder", "suffix": "</w>"},
                {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "Fuse"},
                                                  {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}]
    for i in range(24):
        one = {"version": "1.0", "added_tokens": added, "normalizer": normalizers[i % len(normalizers)],
               "pre_tokenizer": pre[i % len(pre)], "post_processor": post[i % len(post)], "decoder": decoders[i % len(decoders)],
               "model": models[i % len(models)]}
        put("tokenizer", f"json_{i:02}", bytes([0, i % 8]) + json.dumps(one).encode() + b"\0" + TEXTS[i % len(TEXTS)].encode())
    old = {"H": 0, "e": 1, "He": 2, "\u0120": 3, "<s>": 4, "</s>": 5, "<unk>": 6, "<|endoftext|>": 7}
    for i, kind in enumerate(["gpt2", "roberta", "qwen2"]):
        put("tokenizer", "old_" + kind, bytes([96 + i, 1]) + json.dumps(old).encode() + b"\0#version: 0.2\nH e\n\0" + json.dumps(
            {"add_prefix_space": i == 1, "mask_token": {"content": "<mask>", "lstrip": True}, "pad_token": "<pad>"}).encode() + b"\0He He <mask>")
    put("tokenizer", "old_bert", bytes([99, 1]) + b"[PAD]\n[UNK]\n[CLS]\r\n[SEP]\n[MASK]\nhe\n##he\n\0\0" + json.dumps(
        {"do_lower_case": True, "added_tokens_decoder": {"7": {"content": "<x>", "special": True}}}).encode() + b"\0Hehe <x>")
    put("tokenizer", "json_gap", bytes([0, 0]) + json.dumps({"model": {"type": "BPE", "vocab": {"a": 2**60}, "merges": []}}).encode())
    put("tokenizer", "json_regex", bytes([0, 0]) + json.dumps({"model": models[0], "pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed"}}).encode() + b"\0" + b"a" * 40 + b"b")


# ---- chat templates ----

SNIPPETS = ["{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}",
            "{%- if add_generation_prompt -%}<a>{%- else -%}{{ eos_token }}{%- endif -%}",
            "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + loop.index0 %}{% endfor %}{{ ns.x }}",
            "{% macro f(a, b=2) %}{{ a ~ b }}{% endmacro %}{{ f(1) }}{{ f(b='x', a=[1,2][0]) }}",
            "{{ messages[-1].content[1:-1:2] }}{{ 'a,b'.split(',') | join('-') | upper }}{{ messages | length }}",
            "{{ raise_exception('no') }}", "{{ strftime_now('%Y-%m-%d') }}{{ messages | tojson(indent=2) }}",
            "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }}{{ ', ' if not loop.last }}{% endfor %}",
            "{% if x is defined and x is not none %}{% elif messages is string %}{% else %}{{ 7 // 2 ** 2 % 3 }}{% endif %}",
            "{% for i in range(1000000) %}{% for j in range(1000000) %}x{% endfor %}{% endfor %}",
            "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ 'x' * 1000000000 }}", "{{ [[1]*9]*99999999 }}",
            "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ " + "-" * 3000 + "1 }}", "{% raw %}{{ x }}{% endraw %}{# c #}",
            "{% generation %}{{ messages[0].content }}{% endgeneration %}", "{{ messages | selectattr('role', 'equalto', 'user') | list }}",
            "{{ (messages | map(attribute='role') | list)[::-1] | first }}", "{%- call(x) f() -%}{%- endcall -%}",
            "{% filter upper %}a{% endfilter %}{{ '%s-%d' % ('a', 3) }}{{ 'a' in 'abc' }}{{ 1 if 0 }}", "{{ '\\u00e9\\n\\x41' }}{{ 1e3 + .5 }}",
            "{% for m in messages recursive %}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{% endfor %}", "{% break %}{% continue %}"]


def make_chat_template():
    for i, text in enumerate(SNIPPETS):
        put("chat_template", f"snippet_{i:02}", bytes([i % 4]) + text.encode())
    put("chat_template", "variables", b"\x01{{ x.y[z] }}{{ tools }}\0" + b'{"x": {"y": [1, 2]}, "z": 1, "tools": [{}]}')
    for path in sorted((ROOT / "tests/data/chat_templates").glob("*.jinja")):
        put("chat_template", path.stem, b"\x02" + path.read_bytes())
    put("chat_template", "qwen25_tools_call", b"\x03" + (ROOT / "tests/data/chat_templates/qwen25_tools.jinja").read_bytes())


# ---- images and data ----

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, color, depth, raw, extra=b"", interlace=0):
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def make_image():
    from PIL import Image

    rng = np.random.default_rng(2)
    for color, channels in [(0, 1), (2, 3), (4, 2), (6, 4)]:
        for depth in [8, 16]:
            row = lambda y: bytes([y % 5]) + rng.bytes(5 * channels * depth // 8)
            put("image", f"png_{color}_{depth}", bytes([color % 4]) + png(5, 4, color, depth, b"".join(map(row, range(4)))))
    for depth in [1, 2, 4]:
        put("image", f"png_grey_{depth}", bytes([0]) + png(7, 3, 0, depth, (b"\0" + rng.bytes((7 * depth + 7) // 8)) * 3))
    put("image", "png_palette", bytes([2]) + png(4, 2, 3, 8, b"\0\0\1\2\1" * 2, chunk(b"PLTE", bytes(range(9))) + chunk(b"tRNS", b"\0\x80")))
    put("image", "png_interlaced", bytes([0]) + png(3, 3, 0, 8, b"\0a\0b\0cd\0ef\0gh"[:14], interlace=1))
    put("image", "png_huge", bytes([0]) + png(16000, 16000, 2, 8, b"\0" * 100))
    put("image", "png_zero", bytes([0]) + png(0, 5, 2, 8, b""))
    # The pixels may begin with empty parts.
    whole = png(2, 2, 0, 8, b"\0ab\0cd")
    put("image", "png_empty_first", bytes([0]) + whole[:33] + chunk(b"IDAT", b"") + whole[33:])
    pixels = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for name, options in [("base", {}), ("progressive", {"progressive": True}), ("subsampled", {"subsampling": 2}),
                          ("restart", {"quality": 30})]:
        out = io.BytesIO()
        pixels.save(out, "JPEG", **options)
        put("image", "jpeg_" + name, bytes([0]) + out.getvalue())
    out = io.BytesIO()
    pixels.convert("L").save(out, "JPEG")
    put("image", "jpeg_grey", bytes([2]) + out.getvalue())
    # Huffman tables of more codes than there are, and more than their part has bytes for.
    counts = out.getvalue().index(b"\xff\xc4") + 5
    for name, new in [("overfull", bytes([12]) + bytes(15)), ("long", b"\xff" * 16)]:
        put("image", "jpeg_huffman_" + name, bytes([2]) + out.getvalue()[:counts] + new + out.getvalue()[counts + 16:])
    put("image", "jpeg_cut", bytes([2]) + out.getvalue()[:200])
    idx = b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 4) + bytes(range(24))
    put("image", "idx", bytes([200]) + idx)
    put("image", "idx_labels", bytes([200]) + b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc")
    put("image", "idx_huge", bytes([200]) + b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 4))
    packed = gzip.compress(idx, 9, mtime=0)
    put("image", "gzip", bytes([230]) + packed)
    put("image", "gzip_two", bytes([230]) + packed + packed)
    put("image", "gzip_bomb", bytes([230]) + gzip.compress(bytes(1 << 21), 9, mtime=0))


def make_dataset():
    rows = [{"text": "one\ntwo"}, {"prompt": "Q: ", "completion": "A"}, {"messages": [{"role": "user", "content": "hi"}]},
            {"question": "2+2", "choices": ["3", "4"], "answer": 1}, {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "B"}, {"instruction": "do", "input": "x", "output": "y"}, {"conversations": [{"from": "human", "value": "v"}]},
            {"text": "t", "label": 3}, {"sentence": "s", "label": "pos"}]
    for i, row in enumerate(rows):
        put("dataset", f"jsonl_{i}", bytes([2, 0, 0]) + "".join(json.dumps(r) + "\n" for r in [row, row]).encode())
    put("dataset", "jsonl_mixed", bytes([0, 0, 0]) + "\n".join(json.dumps(r) for r in rows).encode() + b"\r\n\n{broken")
    put("dataset", "json", bytes([3, 0, 0]) + json.dumps(rows[:2]).encode())
    put("dataset", "json_columns", bytes([3, 0, 0]) + json.dumps({"text": ["a", "b"], "data": rows[:1]}).encode())
    put("dataset", "csv", bytes([4, 0, 0]) + b'text,label\r\n"a ""quoted"", one\nline",1\r\nplain,2\r\n')
    put("dataset", "csv_broken", bytes([4, 0, 0]) + b'text,label\n"open,1\nx\n,,,\n')
    put("dataset", "csv_choice", bytes([4, 0, 4]) + b"question,A,B,C,D,answer\nq,1,2,3,4,B\n")
    put("dataset", "csv_plain", bytes([4, 0, 129]) + b"a,b\nc,d\n")
    put("dataset", "tsv", bytes([5, 0, 0]) + b"text\tlabel\na\t1\n")
    for i in range(5):
        put("dataset", f"text_{i}", bytes([1, i, 0]) + "first line\nsecond\n\n\nparagraph <|end|>caf\u00e9\r\nlast".encode())
    put("dataset", "text_bytes", bytes([1, 1, 0]) + b"\xef\xbb\xbfx\xff\xfe\0y\n")
    put("dataset", "idx", bytes([6, 0, 0]) + b"\0\0\x08\x03" + struct.pack(">III", 1, 2, 2) + b"abcd")


MAKERS = [make_chat_template, make_image, make_dataset, make_tokenizer, make_safetensors, make_low_rank_sparse, make_packed_rows, make_compeft, make_peft, make_gguf, make_edge_experts, make_format, make_yaml, make_config]

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    for make in MAKERS:
        make()
    for folder in sorted(CORPUS.iterdir()):
        files = list(folder.iterdir())
        print(f"{folder.name}: {len(files)} seeds, {sum(f.stat().st_size for f in files)} bytes")
