#!/usr/bin/env python3
"""Generates a tiny random checkpoint of every model family and variant with transformers.

    python3 tools/make_fixtures.py [--only REGEX] [--list] [--force]

They go to $MOIETY_CACHE/fixtures/<name>/ (default ~/.cache/moiety), each with a `fixture.json` that says what it is. A fixture
whose recipe and whose transformers release are unchanged is left alone. Weights are drawn from a seed made of the name, large
enough that logits have unit scale, routers choose freely, and no bias, norm weight or sink is left at its trivial value.

Mixtures are written in both tensor layouts: `<name>` has one tensor an expert, as older transformers releases wrote and hubs hold,
`<name>-fused` has the stacked tensors of current releases. `<name>-old` has config.json's keys of releases before 5
(rope_theta, rope_scaling, torch_dtype), `<name>-sparse` has only the keys that differ from the family's defaults.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def reexec_in_venv():
    """Starts again with the project's own interpreter when another one runs this script."""
    python = ROOT / ".venv/bin/python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(str(python), [str(python), *sys.argv])


reexec_in_venv()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CACHE = Path(os.environ.get("MOIETY_CACHE") or Path.home() / ".cache/moiety")
FIXTURES = CACHE / "fixtures"
RECIPE = 6  # raise when the way weights are drawn changes


class Fixture:
    def __init__(self, name, family, config, *, cls=None, dtype="float32", layouts=(), old=False, extra=False, gguf=None,
                 edit=None, shards=False, tokenizer="bytes", encoder=None, note=""):
        self.name = name
        self.family = family  # model_type
        self.config = config
        self.cls = cls  # class name in transformers; None: AutoModelForCausalLM
        self.dtype = dtype
        self.layouts = layouts  # ("fused",): also write <name>-fused
        self.old = old  # also write <name>-old
        self.extra = extra  # a family beyond the list that the project promises
        self.gguf = gguf  # GGUF architecture, when the format has one for it
        self.edit = edit  # "mxfp4": experts as MXFP4 blocks; "mtp": a further block that a loader must ignore
        self.shards = shards
        self.tokenizer = tokenizer
        self.encoder = encoder  # pooling of a sentence encoder
        self.note = note

    def key(self):
        import transformers

        text = json.dumps([RECIPE, transformers.__version__, vars(self), self.name in SPARSE], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def merged(base, **changes):
    return {**base, **changes}


# Odd sizes on purpose: head_dim is not hidden_size / heads, head counts are not powers of two, one key head serves all.
BASE = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24}


def long_factors(n):
    return {"short_factor": [1.0 + 0.05 * i for i in range(n)], "long_factor": [1.0 + 0.7 * i for i in range(n)]}


MLA = dict(BASE, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=48, qk_nope_head_dim=16,
           qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
           moe_intermediate_size=40, first_k_dense_replace=1, num_hidden_layers=3)


# One of each promised family also with a sparse config.json.
SPARSE = {"llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3-pattern6", "phi3", "smollm3", "mixtral", "qwen2_moe",
          "qwen3_moe-raw", "olmoe", "smollm3-tied", "gemma3", "cohere", "cohere2", "stablelm", "starcoder2",
          "seed_oss", "exaone4", "deepseek_v2", "deepseek_v3", "phimoe", "granitemoe", "gpt_oss"}


def fixtures():
    out = []

    def add(name, family, config, **kw):
        out.append(Fixture(name, family, config, **kw))

    def llama(name, old=False, dtype="float32", gguf="llama", **changes):
        add(name, "llama", merged(BASE, **changes), old=old, dtype=dtype, gguf=gguf)

    llama("llama-mha", num_key_value_heads=4)
    llama("llama-gqa", old=True)
    llama("llama-one-kv-head", num_attention_heads=5, num_key_value_heads=1, head_dim=16, hidden_size=80)
    llama("llama-odd-heads", num_attention_heads=9, num_key_value_heads=3, head_dim=12, hidden_size=36, intermediate_size=100)
    llama("llama-tied", tie_word_embeddings=True)
    llama("llama-head-dim", head_dim=24, num_attention_heads=4)
    llama("llama-rope-theta", rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, old=True)
    llama("llama-rope-llama3", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, old=True)
    llama("llama-rope-linear", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}, old=True)
    llama("llama-rope-dynamic", max_position_embeddings=24, old=True,
          rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, gguf=None)
    llama("llama-rope-yarn", rope_parameters=YARN, old=True)
    llama("llama-rope-yarn-betas", rope_parameters=dict(YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3, truncate=False), gguf=None)
    llama("llama-rope-longrope", head_dim=16, rope_parameters=dict(LONGROPE, factor=8.0, **long_factors(8)), gguf=None)
    llama("llama-bias", attention_bias=True, mlp_bias=True)
    llama("llama-attention-bias", attention_bias=True)
    llama("llama-gelu", hidden_act="gelu", gguf=None)
    llama("llama-bf16", dtype="bfloat16")
    add("llama-sharded", "llama", dict(BASE), shards=True, gguf="llama")

    add("mistral", "mistral", merged(BASE, sliding_window=None), gguf="llama")
    add("mistral-window", "mistral", merged(BASE, sliding_window=7, head_dim=24), old=True)
    add("mistral-bf16", "mistral", merged(BASE, sliding_window=7), dtype="bfloat16")

    add("qwen2", "qwen2", merged(BASE, num_attention_heads=6, num_key_value_heads=2, hidden_size=96), gguf="qwen2", old=True)
    add("qwen2-window", "qwen2", merged(BASE, num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2))
    add("qwen2-tied", "qwen2", merged(BASE, tie_word_embeddings=True), gguf="qwen2")
    add("qwen2-bf16", "qwen2", dict(BASE), dtype="bfloat16", gguf="qwen2")
    add("qwen2-yarn", "qwen2", merged(BASE, rope_parameters=YARN), gguf="qwen2")

    add("qwen3", "qwen3", merged(BASE, head_dim=32), gguf="qwen3", old=True)
    add("qwen3-bias-window", "qwen3", merged(BASE, head_dim=16, num_hidden_layers=4, attention_bias=True, use_sliding_window=True,
                                             sliding_window=5, max_window_layers=1))
    add("qwen3-tied", "qwen3", merged(BASE, head_dim=20, tie_word_embeddings=True, num_key_value_heads=1), gguf="qwen3")

    gemma = merged(BASE, head_dim=24, tie_word_embeddings=True)
    add("gemma", "gemma", merged(gemma, num_key_value_heads=1), gguf="gemma", old=True)
    gemma2 = merged(gemma, num_hidden_layers=4, sliding_window=6, query_pre_attn_scalar=20)
    add("gemma2", "gemma2", merged(gemma2, final_logit_softcapping=4.0, attn_logit_softcapping=2.5, query_pre_attn_scalar=24), gguf="gemma2", old=True)
    add("gemma2-no-caps", "gemma2", merged(gemma2, final_logit_softcapping=None, attn_logit_softcapping=None))
    gemma3 = merged(gemma, num_hidden_layers=6, sliding_window=5, query_pre_attn_scalar=20,
                    rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                                     "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2)
    gemma3_plain = merged(gemma3, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                                                   "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})
    add("gemma3", "gemma3_text", gemma3_plain, old=True, gguf=None)
    add("gemma3-pattern6", "gemma3_text",
        merged(gemma3_plain, num_hidden_layers=7, query_pre_attn_scalar=24, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) + ["sliding_attention"]),
        gguf="gemma3", old=True)
    add("gemma3-linear", "gemma3_text", gemma3, old=True)
    add("gemma3-softcap", "gemma3_text", merged(gemma3, final_logit_softcapping=3.0, num_key_value_heads=1))
    add("gemma3-bf16", "gemma3_text", gemma3_plain, dtype="bfloat16")
    add("gemma3-nested", "gemma3",
        dict(text_config=merged(gemma3, model_type="gemma3_text"), tie_word_embeddings=True, image_token_index=299,
             boi_token_index=298, eoi_token_index=297, mm_tokens_per_image=4,
             vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                num_attention_heads=2, image_size=32, patch_size=8)),
        cls="Gemma3ForConditionalGeneration", note="the text half of a vision checkpoint")

    phi3 = merged(BASE, num_attention_heads=4, num_key_value_heads=2)
    add("phi3", "phi3", phi3, gguf="phi3", old=True)
    add("phi3-mha-window", "phi3", merged(phi3, num_key_value_heads=4, sliding_window=7))
    add("phi3-longrope", "phi3", merged(phi3, original_max_position_embeddings=24, max_position_embeddings=256,
                                        rope_parameters=dict(LONGROPE, **long_factors(8))), old=True)
    add("phi3-partial-longrope", "phi3",
        merged(phi3, original_max_position_embeddings=24, tie_word_embeddings=True, hidden_size=96, num_attention_heads=4,
               rope_parameters=dict(LONGROPE, partial_rotary_factor=0.75, **long_factors(9))))
    add("phi3-partial", "phi3", merged(phi3, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}))

    smollm3 = merged(BASE, num_hidden_layers=4)
    add("smollm3", "smollm3", smollm3, gguf="smollm3", old=True)
    add("smollm3-tied", "smollm3", merged(smollm3, tie_word_embeddings=True, no_rope_layer_interval=2), gguf=None)
    add("smollm3-window", "smollm3", merged(smollm3, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=6,
                                            attention_bias=True))

    # Mixtures.
    mixtral = merged(BASE, num_local_experts=6, num_experts_per_tok=2)
    add("mixtral", "mixtral", mixtral, layouts=("fused",), old=True, gguf="llama")
    add("mixtral-window", "mixtral", merged(mixtral, sliding_window=6, num_local_experts=5, num_experts_per_tok=3, head_dim=24),
        layouts=("fused",))
    add("mixtral-top1", "mixtral", merged(mixtral, num_local_experts=4, num_experts_per_tok=1), gguf="llama")
    add("mixtral-bf16", "mixtral", mixtral, dtype="bfloat16")

    qwen2_moe = merged(BASE, num_hidden_layers=4, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=40,
                       shared_expert_intermediate_size=56)
    add("qwen2_moe", "qwen2_moe", qwen2_moe, layouts=("fused",), old=True, gguf="qwen2moe")
    add("qwen2_moe-norm", "qwen2_moe", merged(qwen2_moe, norm_topk_prob=True), layouts=("fused",))
    add("qwen2_moe-sparse-step", "qwen2_moe", merged(qwen2_moe, decoder_sparse_step=2), layouts=("fused",))
    add("qwen2_moe-mlp-only", "qwen2_moe", merged(qwen2_moe, mlp_only_layers=[0, 2], qkv_bias=False), layouts=("fused",))
    add("qwen2_moe-window", "qwen2_moe", merged(qwen2_moe, use_sliding_window=True, sliding_window=6, max_window_layers=3))

    qwen3_moe = merged(BASE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=24)
    add("qwen3_moe", "qwen3_moe", merged(qwen3_moe, norm_topk_prob=True), layouts=("fused",), old=True, gguf="qwen3moe")
    add("qwen3_moe-raw", "qwen3_moe", merged(qwen3_moe, norm_topk_prob=False), layouts=("fused",))
    add("qwen3_moe-mlp-only", "qwen3_moe", merged(qwen3_moe, norm_topk_prob=True, num_hidden_layers=4, decoder_sparse_step=2,
                                                  mlp_only_layers=[3], attention_bias=True), layouts=("fused",))
    add("qwen3_moe-window", "qwen3_moe", merged(qwen3_moe, norm_topk_prob=True, use_sliding_window=True, sliding_window=6))
    add("qwen3_moe-bf16", "qwen3_moe", merged(qwen3_moe, norm_topk_prob=True), dtype="bfloat16")

    olmoe = merged(BASE, num_experts=8, num_experts_per_tok=3, intermediate_size=40)
    add("olmoe", "olmoe", merged(olmoe, num_key_value_heads=4), layouts=("fused",), old=True, gguf="olmoe")
    add("olmoe-clip", "olmoe", merged(olmoe, clip_qkv=0.8, norm_topk_prob=True), layouts=("fused",))

    add("deepseek_v2", "deepseek_v2", merged(MLA, topk_method="greedy"), layouts=("fused",), old=True, gguf="deepseek2")
    add("deepseek_v2-lite", "deepseek_v2", merged(MLA, q_lora_rank=None, topk_method="greedy", routed_scaling_factor=1.5,
                                                  n_shared_experts=1), layouts=("fused",), gguf="deepseek2")
    add("deepseek_v2-groups", "deepseek_v2", merged(MLA, topk_method="group_limited_greedy", n_group=4, topk_group=2,
                                                    routed_scaling_factor=2.0), layouts=("fused",))
    add("deepseek_v2-yarn", "deepseek_v2",
        merged(MLA, topk_method="greedy", rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.9, beta_fast=32, beta_slow=1)), old=True)
    add("deepseek_v2-bias", "deepseek_v2", merged(MLA, topk_method="greedy", attention_bias=True, first_k_dense_replace=0))
    v3 = merged(MLA, n_group=4, topk_group=2, num_experts_per_tok=3, n_shared_experts=1, routed_scaling_factor=2.5,
                norm_topk_prob=True, num_mtp_layers=0)
    add("deepseek_v3", "deepseek_v3", v3, layouts=("fused",), old=True, gguf="deepseek2")
    add("deepseek_v3-no-q-lora", "deepseek_v3", merged(v3, q_lora_rank=None, norm_topk_prob=False, n_group=1, topk_group=1),
        layouts=("fused",), gguf="deepseek2")
    add("deepseek_v3-yarn", "deepseek_v3",
        merged(v3, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)), old=True)
    add("deepseek_v3-yarn-mscale", "deepseek_v3",
        merged(v3, rope_parameters=dict(YARN, factor=8.0, mscale=1.0, mscale_all_dim=0.7, beta_fast=16, beta_slow=2)))
    add("deepseek_v3-half-rope", "deepseek_v3", merged(v3, rope_interleave=False, attention_bias=True))
    add("deepseek_v3-mtp", "deepseek_v3", v3, edit="mtp", note="carries a multi-token-prediction block that decoding leaves out")

    phimoe = merged(BASE, num_local_experts=6, num_experts_per_tok=2)
    add("phimoe", "phimoe", phimoe, layouts=("fused",), old=True)
    add("phimoe-longrope-bias", "phimoe",
        merged(phimoe, attention_bias=True, lm_head_bias=True, router_jitter_noise=0.1,
               rope_parameters=dict(LONGROPE, short_mscale=1.1, long_mscale=1.25, **long_factors(8))), layouts=("fused",), old=True)
    add("phimoe-window", "phimoe", merged(phimoe, sliding_window=6, router_jitter_noise=0.3, attention_bias=True))

    granite_scales = dict(embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.4, attention_multiplier=0.2)
    granitemoe = merged(BASE, num_local_experts=6, num_experts_per_tok=3, intermediate_size=40, **granite_scales)
    add("granitemoe", "granitemoe", granitemoe, layouts=("fused",), old=True, gguf="granitemoe")
    add("granitemoe-tied-bias", "granitemoe", merged(granitemoe, tie_word_embeddings=True, attention_bias=True))
    add("granitemoeshared", "granitemoeshared", merged(granitemoe, shared_intermediate_size=56), layouts=("fused",))

    gpt_oss = merged(BASE, num_hidden_layers=4, num_local_experts=6, num_experts_per_tok=3, head_dim=24, intermediate_size=64,
                     sliding_window=6, rope_parameters=dict(YARN, beta_fast=32.0, beta_slow=1.0, truncate=False, rope_theta=150000.0))
    add("gpt_oss", "gpt_oss", gpt_oss, old=True, gguf="gpt-oss")
    add("gpt_oss-swiglu-limit", "gpt_oss", merged(gpt_oss, swiglu_limit=0.9, num_experts_per_tok=2, num_key_value_heads=1))
    add("gpt_oss-bf16", "gpt_oss", gpt_oss, dtype="bfloat16")
    add("gpt_oss-mxfp4", "gpt_oss", gpt_oss, edit="mxfp4", gguf="gpt-oss", note="experts as MXFP4 blocks; the reference holds them dequantized")

    # Families beyond the promised list.
    extra = dict(extra=True)
    add("llama-extra-wide-vocab", "llama", merged(BASE, vocab_size=331), **extra)
    add("phi", "phi", merged(BASE, num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), **extra)
    add("olmo", "olmo", merged(BASE, clip_qkv=1.0), **extra)
    add("olmo2", "olmo2", dict(BASE), **extra)
    add("olmo3", "olmo3", merged(BASE, num_hidden_layers=4, sliding_window=6), **extra)
    add("starcoder2", "starcoder2", merged(BASE, sliding_window=7), **extra)
    add("stablelm", "stablelm", merged(BASE, use_qkv_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}), **extra)
    add("stablelm-parallel", "stablelm", merged(BASE, use_parallel_residual=True, qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), **extra)
    add("cohere", "cohere", merged(BASE, tie_word_embeddings=True, logit_scale=0.5), **extra)
    add("cohere-qk-norm", "cohere", merged(BASE, tie_word_embeddings=True, use_qk_norm=True), **extra)
    add("cohere2", "cohere2", merged(BASE, tie_word_embeddings=True, num_hidden_layers=4, sliding_window=6, head_dim=16), **extra)
    add("granite", "granite", merged(BASE, attention_bias=True, mlp_bias=True, **granite_scales), **extra)
    add("helium", "helium", merged(BASE, head_dim=16), **extra)
    add("glm", "glm", merged(BASE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), **extra)
    add("glm4", "glm4", merged(BASE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), **extra)
    add("nemotron", "nemotron", merged(BASE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), **extra)
    add("exaone4", "exaone4", merged(BASE, num_hidden_layers=4, sliding_window=6), **extra)
    add("seed_oss", "seed_oss", merged(BASE, head_dim=24), **extra)
    add("ernie4_5", "ernie4_5", merged(BASE, head_dim=16, use_bias=True), **extra)
    add("hunyuan_v1_dense", "hunyuan_v1_dense", merged(BASE, head_dim=16), **extra)
    add("gpt_neox", "gpt_neox", {k: v for k, v in merged(BASE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}).items() if k != "num_key_value_heads"}, **extra)
    add("gpt2", "gpt2", dict(vocab_size=300, n_positions=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0), **extra)
    add("dots1", "dots1", merged(BASE, head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=40,
        first_k_dense_replace=1, n_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.0), layouts=("fused",), **extra)
    add("glm4_moe", "glm4_moe", merged(BASE, head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=40,
        first_k_dense_replace=1, n_group=2, topk_group=1, routed_scaling_factor=2.0, use_qk_norm=True, num_mtp_layers=0, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}), layouts=("fused",), **extra)
    add("ernie4_5_moe", "ernie4_5_moe", merged(BASE, moe_intermediate_size=40, moe_k=3, moe_num_experts=6, moe_num_shared_experts=1,
        moe_layer_start_index=1), layouts=("fused",), **extra)

    # Sentence encoders: pooling and normalization as sentence-transformers' modules describe them.
    bert = dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=64, pad_token_id=0)
    add("bert", "bert", bert, cls="BertModel", tokenizer="wordpiece", encoder="mean")
    add("bert-cls-relu", "bert", merged(bert, hidden_act="relu", num_attention_heads=3, layer_norm_eps=1e-5), cls="BertModel", tokenizer="wordpiece", encoder="cls")
    add("distilbert", "distilbert", dict(vocab_size=300, dim=48, hidden_dim=96, n_layers=3, n_heads=4, max_position_embeddings=64, pad_token_id=0),
        cls="DistilBertModel", tokenizer="wordpiece", encoder="mean")
    add("roberta", "roberta", merged(bert, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5),
        cls="RobertaModel", tokenizer="roberta", encoder="mean")
    add("roberta-max", "roberta", merged(bert, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2),
        cls="RobertaModel", tokenizer="roberta", encoder="max")
    return out


def seed_of(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


def randomize(model, name):
    """Draws every parameter and floating buffer that is saved anew. Matrices keep the scale of their input."""
    import torch

    g = torch.Generator().manual_seed(seed_of(name))
    zero_centred = {"gemma", "gemma2", "gemma3", "gemma3_text"}
    zero = model.config.model_type in zero_centred
    centred = zero or model.config.model_type == "nemotron"
    transposed = model.config.model_type in ("gpt_oss", "gpt2")  # [in, out] instead of [out, in]
    saved = dict(model.named_parameters())
    saved.update({k: b for k, b in model.named_buffers() if k in model.state_dict() and b.is_floating_point()})
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for key, p in saved.items():
            leaf = key.rsplit(".", 1)[-1]
            noise = torch.randn(p.shape, generator=g)
            if "e_score_correction_bias" in key:
                value = 0.3 * noise
            elif leaf == "sinks":
                value = noise
            elif id(p) in embeddings or p.dim() == 2 and "embed" in key:
                # Families multiply embeddings: without this the residual stream would hold little else.
                text = model.config.get_text_config()
                value = 0.7 * noise / (math.sqrt(text.hidden_size) if zero else getattr(text, "embedding_multiplier", 1.0))
            elif "bias" in leaf:
                value = 0.25 * noise
            elif p.dim() == 1 or "norm" in key.split(".")[-2]:
                value = 0.25 * noise if centred else 1 + 0.25 * noise
            elif p.dim() >= 2:
                fan_in = p.shape[-2] if transposed and "router" not in key and "self_attn" not in key and "lm_head" not in key else p.shape[-1]
                router = re.search(r"(router|mlp\.gate|moe\.gate|shared_expert_gate|router\.layer)\.weight$", key)
                value = noise * (2.0 if router else 1.3) / math.sqrt(fan_in)
            else:
                value = noise
            p.copy_(value.to(p.dtype))


def unit_scale(model):
    """Scales the head, or the last norm when the head is tied, so that logits have about unit variance."""
    import torch

    text = model.config.get_text_config()
    ids = torch.arange(3, 99).view(4, 24) % text.vocab_size
    with torch.no_grad():
        model.eval()
        head = model.get_output_embeddings()
        cap = getattr(text, "final_logit_softcapping", None)
        logits = model(input_ids=ids).logits.float()
        if cap:
            logits = cap * torch.atanh((logits / cap).clamp(-0.999999, 0.999999))
        scale = 1.0 / logits.std().item()
        if not text.tie_word_embeddings:
            head.weight.mul_(scale)
            if head.bias is not None:
                head.bias.mul_(scale)
            return
        norms = [m for n, m in model.named_modules() if re.fullmatch(r"(model\.)?(language_model\.)?(transformer\.)?(norm|final_layernorm|ln_f)", n)]
        norm = norms[-1]
        if type(norm).__name__.startswith("Gemma"):
            norm.weight.copy_((1 + norm.weight) * scale - 1)
        else:
            norm.weight.mul_(scale)
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(scale)


def small_text():
    return (ROOT / "LICENSE").read_text().splitlines()


def make_tokenizer(kind, vocab_size, directory, config):
    """A real tokenizer of exactly `vocab_size` entries, so that conversions carry one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "wordpiece":
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer = normalizers.BertNormalizer(lowercase=True)
        t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        t.train_from_iterator(small_text(), trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False))
        t.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        t.decoder = decoders.WordPiece()
        names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
        cls = "BertTokenizer"
    else:
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "roberta" else ["<pad>", "<s>", "</s>"]
        t.train_from_iterator(small_text(), trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if kind == "roberta":
            t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
            cls = "RobertaTokenizer"
            names = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
        else:
            cls = "PreTrainedTokenizerFast"
            names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert t.get_vocab_size() == vocab_size, (t.get_vocab_size(), vocab_size)
    t.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", dict(names, tokenizer_class=cls, model_max_length=config.get("max_position_embeddings", 128)))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sentence_modules(directory, pooling, width):
    write_json(directory / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}][: 2 if pooling == "max" else 3])
    (directory / "1_Pooling").mkdir()
    write_json(directory / "1_Pooling/config.json", {
        "word_embedding_dimension": width, "pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": pooling == "max", "pooling_mode_mean_sqrt_len_tokens": False})
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    if pooling != "max":
        (directory / "2_Normalize").mkdir()


def old_config(config):
    """config.json as releases before 5 wrote it: rope_theta and rope_scaling beside the other keys, torch_dtype."""
    c = json.loads(json.dumps(config))
    c["transformers_version"] = "4.45.0"
    if "dtype" in c:
        c["torch_dtype"] = c.pop("dtype")
    rope = c.pop("rope_parameters", None)
    if c.get("model_type") == "gemma3_text":
        full, local = rope["full_attention"], rope["sliding_attention"]
        c["rope_theta"], c["rope_local_base_freq"] = full.pop("rope_theta"), local["rope_theta"]
        c["rope_scaling"] = full if full["rope_type"] != "default" else None
        types = c.pop("layer_types")
        c["sliding_window_pattern"] = types.index("full_attention") + 1
        return c
    if rope:
        c["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            c["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        if kind == "default":
            c["rope_scaling"] = None
        else:
            # Both spellings are on hubs.
            c["rope_scaling"] = dict(rope, **({"type": kind} if kind in ("longrope", "linear", "dynamic", "yarn") else {"rope_type": kind}))
    if c.get("model_type") in ("qwen2", "qwen3", "smollm3", "gpt_oss", "gemma2"):
        c.pop("layer_types", None)
    if c.get("model_type") == "phimoe" and c.get("rope_scaling"):
        c["original_max_position_embeddings"] = c["rope_scaling"]["original_max_position_embeddings"]
    return c


def sparse_config(config):
    """config.json without what the family's class would fill in anyway, in the keys of releases before 5."""
    import transformers

    defaults = transformers.AutoConfig.for_model(config["model_type"]).to_dict()
    kept = {k: v for k, v in config.items() if k in ("model_type", "architectures", "rope_parameters") or v != defaults.get(k)}
    if config.get("num_key_value_heads") == config["num_attention_heads"] and config["model_type"] in ("llama", "olmoe"):
        kept.pop("num_key_value_heads", None)
    if config.get("head_dim") in (config["hidden_size"] // config["num_attention_heads"], config.get("qk_rope_head_dim")):
        kept.pop("head_dim", None)
    kept.pop("qk_head_dim", None)
    old = old_config({**config, **kept})
    out = {k: v for k, v in old.items() if k in kept or (k not in config and v is not None)}
    theta = getattr(transformers.AutoConfig.for_model(config["model_type"]), "default_theta", None)
    if out.get("rope_theta") == theta:
        del out["rope_theta"]
    return out


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def to_mxfp4(w):
    """w [..., n] f32, n a multiple of 32 -> blocks [..., n/32, 16] uint8 (low nibble first), scales [..., n/32] uint8, value f32."""
    import torch

    x = w.reshape(*w.shape[:-1], -1, 32)
    exponent = torch.floor(torch.log2(x.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = x / torch.exp2(exponent)[..., None]
    grid = torch.tensor(FP4)
    code = (scaled.abs()[..., None] - grid).abs().argmin(-1)
    value = (grid[code] * torch.where(scaled < 0, -1.0, 1.0)) * torch.exp2(exponent)[..., None]
    nibble = code + 8 * (scaled < 0)
    blocks = (nibble[..., 0::2] + 16 * nibble[..., 1::2]).to(torch.uint8)
    return blocks.contiguous(), (exponent + 127).to(torch.uint8), value.reshape(w.shape)


def write_mxfp4(model, directory, reference):
    """Experts of gpt-oss as the released checkpoints hold them; `reference` gets the dequantized model."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for i, layer in enumerate(model.model.layers):
        for leaf in ("gate_up_proj", "down_proj"):
            p = getattr(layer.mlp.experts, leaf)
            blocks, scales, value = to_mxfp4(p.data.float().transpose(1, 2).contiguous())
            p.data.copy_(value.transpose(1, 2))
            prefix = f"model.layers.{i}.mlp.experts.{leaf}"
            tensors[prefix + "_blocks"], tensors[prefix + "_scales"] = blocks, scales
    model.save_pretrained(reference)
    plain = load_file(reference / "model.safetensors")
    dropped = {k.rsplit("_", 1)[0] for k in tensors}
    tensors.update({k: v for k, v in plain.items() if k not in dropped})
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((reference / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    write_json(directory / "config.json", config)


def build(fixture):
    import torch
    import transformers

    f = fixture
    target = FIXTURES / f.name
    stamp = target / "fixture.json"
    key = f.key()
    if stamp.exists() and json.loads(stamp.read_text()).get("key") == key:
        return False
    for variant in ("", "-fused", "-old", "-sparse", "-reference"):
        shutil.rmtree(FIXTURES / (f.name + variant), ignore_errors=True)
    work = FIXTURES / f".{f.name}.{os.getpid()}"
    work.mkdir(parents=True)
    try:
        torch.manual_seed(seed_of(f.name))
        config = transformers.AutoConfig.for_model(f.family, **json.loads(json.dumps(f.config)))
        dtype = getattr(torch, f.dtype)
        if f.cls:
            model = getattr(transformers, f.cls)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        model = model.float().eval()
        randomize(model, f.name)
        if not f.encoder:
            unit_scale(model)
        model = model.to(dtype)

        info = dict(key=key, name=f.name, family=f.family, dtype=f.dtype, extra=f.extra, gguf=f.gguf, encoder=f.encoder,
                    layout="stored", config_style="current", cls=f.cls, note=f.note, reference=f.name)
        written = {}

        def finish(directory, **changes):
            written[f.name + changes.pop("suffix", "")] = directory
            text = f.config.get("text_config", f.config)
            make_tokenizer(f.tokenizer, text["vocab_size"], directory, text)
            write_json(directory / "fixture.json", {**info, **changes})

        main = work / "main"
        if f.edit == "mxfp4":
            write_mxfp4(model, main, work / "reference")
            written[f.name + "-reference"] = work / "reference"
            finish(main, layout="mxfp4", reference=f.name + "-reference")
        else:
            model.save_pretrained(main, **({"max_shard_size": "60KB"} if f.shards else {}))
            if f.edit == "mtp":
                from safetensors.torch import load_file, save_file

                tensors = load_file(main / "model.safetensors")
                n, last = f.config["num_hidden_layers"], f.config["num_hidden_layers"] - 1
                prefix = f"model.layers.{last}."
                more = {k.replace(prefix, f"model.layers.{n}."): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
                d = f.config["hidden_size"]
                more[f"model.layers.{n}.eh_proj.weight"] = torch.zeros(d, 2 * d)
                for leaf in ("enorm", "hnorm", "shared_head.norm"):
                    more[f"model.layers.{n}.{leaf}.weight"] = torch.ones(d)
                save_file({**tensors, **more}, main / "model.safetensors", metadata={"format": "pt"})
                c = json.loads((main / "config.json").read_text())
                write_json(main / "config.json", {**c, "num_nextn_predict_layers": 1})
            finish(main)
        if f.encoder:
            write_sentence_modules(main, f.encoder, f.config.get("hidden_size", f.config.get("dim")))
        if "fused" in f.layouts:
            fused = work / "fused"
            model.save_pretrained(fused, save_original_format=False)
            finish(fused, suffix="-fused", layout="fused", name=f.name + "-fused")
        if f.old:
            old = work / "old"
            shutil.copytree(main, old)
            write_json(old / "config.json", old_config(json.loads((main / "config.json").read_text())))
            finish(old, suffix="-old", config_style="old", name=f.name + "-old", gguf=None)
        if f.name in SPARSE:
            sparse = work / "sparse"
            shutil.copytree(main, sparse)
            write_json(sparse / "config.json", sparse_config(json.loads((main / "config.json").read_text())))
            finish(sparse, suffix="-sparse", config_style="sparse", name=f.name + "-sparse")
        # The stamp of the plain fixture says that all variants are there: it moves last.
        for name, directory in reversed(list(written.items())):
            shutil.rmtree(FIXTURES / name, ignore_errors=True)
            if name != f.name:
                directory.rename(FIXTURES / name)
        main.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def make(only=None, force=False, quiet=False):
    """Generates what is missing or outdated; returns the descriptions of all fixtures, sorted by name."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    chosen = [f for f in fixtures() if not only or re.search(only, f.name)]
    failed = []
    for f in chosen:
        if force:
            shutil.rmtree(FIXTURES / f.name, ignore_errors=True)
        try:
            if build(f) and not quiet:
                print("made", f.name, flush=True)
        except Exception as error:  # a family that this transformers release cannot build must not hide the others
            failed.append(f.name)
            print(f"cannot make {f.name}: {type(error).__name__}: {error}", file=sys.stderr)
    found = []
    for f in chosen:
        for suffix in ("", "-fused", "-old", "-sparse"):
            stamp = FIXTURES / (f.name + suffix) / "fixture.json"
            if stamp.exists():
                found.append({**json.loads(stamp.read_text()), "path": str(stamp.parent)})
    return found, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names that match this regular expression")
    parser.add_argument("--list", action="store_true", help="print name, family and path of each fixture")
    parser.add_argument("--force", action="store_true", help="make them again")
    args = parser.parse_args()
    found, failed = make(args.only, args.force)
    if args.list:
        for f in found:
            print(f"{f['name']:28} {f['family']:18} {f['dtype']:9} {f['path']}")
    print(f"{len(found)} fixtures in {FIXTURES}" + (f", {len(failed)} failed" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
