// The architectures of pretrained models that load, as methods of kind "family": `moiety methods --kind family`.
#include <algorithm>

#include "moiety/base/registry.h"

namespace moiety {
namespace {

struct FamilyEntry {
  const char* model_type;  ///< as config.json spells it
  const char* title;
  const char* summary;
  const char* paper;
  const char* authors;
  int year;
  const char* arxiv;
};

const FamilyEntry kFamilies[] = {
    {"llama", "Llama", "decoder: Llama 1 to 3, SmolLM2 and what shares their layout, all rope scalings",
     "The Llama 3 Herd of Models", "Llama Team", 2024, "2407.21783"},
    {"mistral", "Mistral", "decoder with a sliding window", "Mistral 7B", "Jiang et al.", 2023, "2310.06825"},
    {"ministral", "Ministral", "decoder: Mistral with windows in some layers", "", "Mistral AI", 2024, ""},
    {"qwen2", "Qwen2 and 2.5", "decoder with query, key and value biases", "Qwen2 Technical Report", "Yang et al.",
     2024, "2407.10671"},
    {"qwen3", "Qwen3", "decoder with normed queries and keys", "Qwen3 Technical Report", "Yang et al.", 2025,
     "2505.09388"},
    {"qwen2_moe", "Qwen2-MoE", "mixture of experts with a gated shared expert", "Qwen2 Technical Report", "Yang et al.",
     2024, "2407.10671"},
    {"qwen3_moe", "Qwen3-MoE", "mixture of experts without shared ones", "Qwen3 Technical Report", "Yang et al.", 2025,
     "2505.09388"},
    {"gemma", "Gemma", "decoder with scaled embeddings and one-offset norms",
     "Gemma: Open Models Based on Gemini Research and Technology", "Gemma Team", 2024, "2403.08295"},
    {"gemma2", "Gemma 2", "decoder with sandwich norms, soft caps and alternating windows",
     "Gemma 2: Improving Open Language Models at a Practical Size", "Gemma Team", 2024, "2408.00118"},
    {"gemma3", "Gemma 3", "the language model of Gemma 3", "Gemma 3 Technical Report", "Gemma Team", 2025,
     "2503.19786"},
    {"gemma3_text", "Gemma 3 (text)", "decoder with two rotary bases and five windowed layers to a full one",
     "Gemma 3 Technical Report", "Gemma Team", 2025, "2503.19786"},
    {"phi", "Phi-1, 1.5 and 2", "decoder with parallel attention and feed-forward",
     "Textbooks Are All You Need II: phi-1.5 "
     "technical report",
     "Li et al.", 2023, "2309.05463"},
    {"phi3", "Phi-3 and 4", "decoder with fused projections and LongRoPE",
     "Phi-3 Technical Report: A Highly Capable Language Model Locally on Your Phone", "Abdin et al.", 2024,
     "2404.14219"},
    {"phimoe", "Phi-3.5-MoE", "mixture of experts routed by SparseMixer",
     "Phi-3 Technical Report: A Highly Capable Language Model Locally on Your Phone", "Abdin et al.", 2024,
     "2404.14219"},
    {"smollm3", "SmolLM3", "decoder with some layers without positions", "", "Hugging Face", 2025, ""},
    {"mixtral", "Mixtral", "mixture of eight experts, two a token", "Mixtral of Experts", "Jiang et al.", 2024,
     "2401.04088"},
    {"olmo", "OLMo", "decoder with norms without weights", "OLMo: Accelerating the Science of Language Models",
     "Groeneveld et al.", 2024, "2402.00838"},
    {"olmo2", "OLMo 2", "decoder with norms behind attention and feed-forward", "2 OLMo 2 Furious", "OLMo Team", 2024,
     "2501.00656"},
    {"olmo3", "OLMo 3", "OLMo 2 with windows", "", "OLMo Team", 2025, ""},
    {"olmoe", "OLMoE", "mixture of 64 experts, eight a token", "OLMoE: Open Mixture-of-Experts Language Models",
     "Muennighoff et al.", 2024, "2409.02060"},
    {"flex_olmo", "FlexOlmo", "mixture of experts trained apart",
     "FlexOlmo: Open Language Models for Flexible Data Use", "Shi et al.", 2025, "2507.07024"},
    {"deepseek", "DeepSeekMoE", "mixture of fine experts beside shared ones",
     "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models", "Dai et al.", 2024,
     "2401.06066"},
    {"deepseek_v2", "DeepSeek-V2", "latent attention, shared experts, routing in the best groups",
     "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", "DeepSeek-AI", 2024,
     "2405.04434"},
    {"deepseek_v3", "DeepSeek-V3 and R1", "latent attention, sigmoid scores with a bias that balances",
     "DeepSeek-V3 Technical Report", "DeepSeek-AI", 2024, "2412.19437"},
    {"dots1", "dots.llm1", "mixture of experts with sigmoid scores", "dots.llm1 Technical Report", "Huo et al.", 2025,
     "2506.05767"},
    {"glm", "GLM-4-9B", "decoder with half-rotary positions",
     "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools", "Team GLM", 2024, "2406.12793"},
    {"glm4", "GLM-4-0414", "GLM with sandwich norms", "", "Z.ai", 2025, ""},
    {"glm4_moe", "GLM-4.5", "mixture of experts with sigmoid scores and a shared expert",
     "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models", "GLM-4.5 Team", 2025, "2508.06471"},
    {"granite", "Granite 3", "decoder with multipliers of embeddings, attention, residuals and logits", "",
     "IBM Research", 2024, ""},
    {"granitemoe", "GraniteMoE", "Granite as a mixture of experts",
     "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler", "Shen et al.", 2024,
     "2408.13359"},
    {"granitemoeshared", "GraniteMoE with shared experts", "GraniteMoE with a shared expert", "", "IBM Research", 2025,
     ""},
    {"gpt_oss", "gpt-oss", "mixture of clamped experts in MXFP4, attention sinks",
     "gpt-oss-120b & gpt-oss-20b Model Card", "OpenAI", 2025, "2508.10925"},
    {"starcoder2", "StarCoder 2", "decoder with biases and layer norms",
     "StarCoder 2 and The Stack v2: The Next Generation", "Lozhkov et al.", 2024, "2402.19173"},
    {"stablelm", "Stable LM 2", "decoder with partly rotary positions", "Stable LM 2 1.6B Technical Report",
     "Bellagente et al.", 2024, "2402.17834"},
    {"cohere", "Command R", "decoder with parallel attention and scaled logits", "", "Cohere", 2024, ""},
    {"cohere2", "Command R7B and A", "Command R with windows", "Command A: An Enterprise-Ready Large Language Model",
     "Team Cohere", 2025, "2504.00698"},
    {"helium", "Helium", "decoder of Kyutai", "", "Kyutai", 2025, ""},
    {"ernie4_5", "ERNIE 4.5", "decoder of Baidu", "", "Baidu", 2025, ""},
    {"exaone4", "EXAONE 4", "decoder with norms behind and windows without positions in full layers",
     "EXAONE 4.0: Unified Large Language Models Integrating Non-reasoning and Reasoning Modes", "LG AI Research", 2025,
     "2507.11407"},
    {"seed_oss", "Seed-OSS", "decoder of ByteDance", "", "ByteDance Seed", 2025, ""},
    {"hunyuan_v1_dense", "Hunyuan", "decoder with queries and keys normed behind the rotation", "", "Tencent", 2025,
     ""},
    {"arcee", "AFM", "decoder with squared ReLU and no gates", "", "Arcee", 2025, ""},
    {"moduleformer", "MoLM", "decoder whose attention and feed-forward layers are mixtures of modules",
     "ModuleFormer: Modularity Emerges from Mixture-of-Experts", "Shen et al.", 2023, "2306.04640"},
    {"bert", "BERT", "encoder", "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
     "Devlin et al.", 2018, "1810.04805"},
    {"roberta", "RoBERTa", "encoder", "RoBERTa: A Robustly Optimized BERT Pretraining Approach", "Liu et al.", 2019,
     "1907.11692"},
    {"xlm-roberta", "XLM-R", "encoder of 100 languages", "Unsupervised Cross-lingual Representation Learning at Scale",
     "Conneau et al.", 2019, "1911.02116"},
    {"camembert", "CamemBERT", "encoder of French", "CamemBERT: a Tasty French Language Model", "Martin et al.", 2019,
     "1911.03894"},
    {"distilbert", "DistilBERT", "encoder",
     "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", "Sanh et al.", 2019,
     "1910.01108"},
    {"mpnet", "MPNet", "encoder with relative positions",
     "MPNet: Masked and Permuted Pre-training for Language Understanding", "Song et al.", 2020, "2004.09297"},
    {"electra", "ELECTRA", "encoder with small embeddings",
     "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", "Clark et al.", 2020,
     "2003.10555"},
    {"modernbert", "ModernBERT", "encoder with rotary positions and windows",
     "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", "Warner et al.", 2024, "2412.13663"},
    {"nomic_bert", "Nomic Embed", "encoder with rotary positions and gated feed-forward",
     "Nomic Embed: Training a Reproducible Long Context Text Embedder", "Nussbaum et al.", 2024, "2402.01613"},
};

struct RegisterFamilies {
  RegisterFamilies() {
    for (const FamilyEntry& f : kFamilies) {
      std::string slug = f.model_type;
      std::replace(slug.begin(), slug.end(), '_', '-');
      RegisterMethod({.slug = slug,
                      .kind = "family",
                      .title = f.title,
                      .summary = f.summary,
                      .paper = {f.paper, f.authors, f.year, f.arxiv}});
    }
  }
} const registered;

}  // namespace
}  // namespace moiety
