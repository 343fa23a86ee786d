#!/usr/bin/env python3
"""Writes tests/data/encoders/<name>/: tiny random encoders with what transformers computes from them.

Each folder is a whole checkpoint (config.json, model.safetensors) plus expected.safetensors:
  ids [B, T] int64, mask [B, T] int64 (1: real), types [B, T] int64 (only where the family has token types),
  hidden [B, T, d] f32, pooled [B, d] f32 (only where the checkpoint has a pooler).
`sentence` is a sentence-transformers folder (two pooling modes, dense, normalize, prompts); its expected.json holds
texts and embeddings. Run from the repository root:  .venv/bin/python tools/make_encoder_fixtures.py
"""
import json
import os
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = os.path.join("tests", "data", "encoders")
COMMON = dict(vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
              max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def randomize(model, seed):
    """Every parameter random, norms around one: nothing may pass by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name.lower()
            p.copy_(1 + 0.2 * noise if is_norm and name.endswith("weight") else 0.2 * noise)


def batch(vocab, pad, lengths=(12, 7, 1, 9)):
    generator = torch.Generator().manual_seed(5)
    width = max(lengths)
    ids = torch.randint(3, vocab, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.where(mask == 1, ids, pad)
    types = ((torch.arange(width) > 4).long().expand_as(ids) * mask).contiguous()
    return ids, mask, types


def write(name, model, seed, base=None, rename=None, dtype=None):
    """`base`: the encoder inside a model with a head; `rename`: tensor names of the saved file."""
    randomize(model, seed)
    model.eval()
    folder = os.path.join(ROOT, name)
    shutil.rmtree(folder, ignore_errors=True)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    if dtype is not None:
        model = model.float()
    if rename:
        path = os.path.join(folder, "model.safetensors")
        save_file({rename(k): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    encoder = model if base is None else getattr(model, base)
    config = model.config
    pad = config.pad_token_id or 0
    ids, mask, types = batch(config.vocab_size, pad)
    arguments = dict(input_ids=ids, attention_mask=mask)
    has_types = getattr(config, "type_vocab_size", 0) > 1
    if has_types:
        arguments["token_type_ids"] = types
    with torch.no_grad():
        out = encoder(**arguments)
    expected = dict(ids=ids, mask=mask, hidden=out.last_hidden_state.contiguous())
    if has_types:
        expected["types"] = types
    if getattr(out, "pooler_output", None) is not None:
        expected["pooled"] = out.pooler_output.contiguous()
    save_file(expected, os.path.join(folder, "expected.safetensors"))
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name:16} {size / 1024:6.1f} kB")


def old_names(key):
    """Checkpoints of 2018 call the norms' weight and bias gamma and beta."""
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def sentence():
    """A sentence-transformers folder with everything that changes an embedding."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = os.path.join(ROOT, "sentence")
    shutil.rmtree(folder, ignore_errors=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "query", "a", "dog", "ran",
             "##s", "##ed", ":", ".", ","] + [chr(c) for c in range(97, 123)] + ["##" + chr(c) for c in range(97, 123)]
    words = list(dict.fromkeys(words))
    vocabulary = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]",
                                                cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    model = transformers.BertModel(transformers.BertConfig(**{**COMMON, "vocab_size": len(words)}), add_pooling_layer=False)
    randomize(model, 77)
    raw = os.path.join(ROOT, "raw")
    model.save_pretrained(raw)
    fast.save_pretrained(raw)
    whole = SentenceTransformer(modules=[
        Transformer(raw, max_seq_length=16, do_lower_case=True),
        Pooling(32, pooling_mode=("cls", "mean"), include_prompt=False),
        Dense(64, 24, activation_function=torch.nn.Tanh()),
        Normalize()], prompts={"query": "query: ", "document": ""}, similarity_fn_name="dot")
    randomize(whole[2], 78)
    whole.save(folder, create_model_card=False)
    shutil.rmtree(raw)
    loaded = SentenceTransformer(folder)
    texts = ["the cat sat on the mat.", "A dog ran", "", "zebras, and dogs", "the cat " * 20]
    expected = {"texts": texts,
                "embeddings": loaded.encode(texts).tolist(),
                "query_embeddings": loaded.encode(texts, prompt_name="query").tolist()}
    with open(os.path.join(folder, "expected.json"), "w") as f:
        json.dump(expected, f)
    print("sentence")


def main():
    torch.manual_seed(0)
    t = transformers
    os.makedirs(ROOT, exist_ok=True)
    roberta = {**COMMON, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    write("bert", t.BertModel(t.BertConfig(**COMMON)), 1)
    write("bert_mlm", t.BertForMaskedLM(t.BertConfig(**COMMON, hidden_act="gelu_new")), 2, base="bert")
    write("bert_old", t.BertForMaskedLM(t.BertConfig(**COMMON, hidden_act="relu")), 3, base="bert", rename=old_names)
    write("bert_bf16", t.BertModel(t.BertConfig(**COMMON), add_pooling_layer=False), 4, dtype=torch.bfloat16)
    write("roberta", t.RobertaModel(t.RobertaConfig(**roberta)), 5)
    write("xlm_roberta", t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**roberta)), 6, base="roberta")
    write("camembert", t.CamembertModel(t.CamembertConfig(**roberta), add_pooling_layer=False), 7)
    write("distilbert", t.DistilBertModel(t.DistilBertConfig(
        vocab_size=80, dim=32, hidden_dim=40, n_layers=2, n_heads=4, max_position_embeddings=40, dropout=0.0,
        attention_dropout=0.0)), 8)
    write("distilbert_mlm", t.DistilBertForMaskedLM(t.DistilBertConfig(
        vocab_size=80, dim=32, hidden_dim=40, n_layers=1, n_heads=2, max_position_embeddings=40, dropout=0.0,
        attention_dropout=0.0, activation="relu")), 9, base="distilbert")
    write("electra", t.ElectraForPreTraining(t.ElectraConfig(**COMMON, embedding_size=16)), 10, base="electra")
    write("mpnet", t.MPNetModel(t.MPNetConfig(**{**COMMON, "pad_token_id": 1, "relative_attention_num_buckets": 32})), 11)
    write("nomic_bert", t.NomicBertModel(t.NomicBertConfig(**COMMON)), 12)
    write("modernbert", t.ModernBertModel(t.ModernBertConfig(
        vocab_size=80, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=40, local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2)), 13)
    write("modernbert_mlm", t.ModernBertForMaskedLM(t.ModernBertConfig(
        vocab_size=80, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, local_attention=4, norm_bias=True, attention_bias=True, mlp_bias=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)), 14, base="model")
    sentence()


if __name__ == "__main__":
    sys.exit(main())
