#pragma once
// Sentence embeddings as sentence-transformers defines them: one model, then the modules that modules.json lists
// (pooling, dense layers, norms), with its settings for prompts, lengths and similarity. Works over encoders and over
// causal models.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "moiety/nn/activation.h"
#include "moiety/nn/linear.h"

namespace moiety {

/// What a sentence-transformers folder says beside its weights; the defaults hold for a checkpoint that says nothing.
struct SentenceSettings {
  std::vector<std::string> pooling = {"mean"};  ///< several are concatenated
  bool include_prompt = true;                   ///< false: the prompt's tokens are not pooled
  int64_t max_length = 0;                       ///< tokens, special ones included; 0: not given
  bool lower_case = false;                      ///< lower-case the text before tokenizing
  std::map<std::string, std::string> prompts;   ///< name -> text put before the input
  std::string default_prompt;                   ///< name, "" for none
  std::string similarity = "cosine";            ///< cosine, dot, euclidean, manhattan
};

/// The pooling modes by sentence-transformers' names; "weighted_mean", "last" and "mean_sqrt_len" are understood too.
/// Returns the canonical name. Error: unknown mode, naming the known ones.
std::string pooling_mode(const std::string& name);

/// hidden [B, T, d], mask [B, T] bool (undefined: all real) -> [B, modes * d] f32.
/// cls: first real token; lasttoken: last real token; max, mean: over real tokens; mean_sqrt_len_tokens: sum /
/// sqrt(count); weightedmean: token i (from 1) weighs i. The first `prompt` real tokens of a row are left out. A row
/// without tokens gives 0.
torch::Tensor pool(const torch::Tensor& hidden, const torch::Tensor& mask, const std::vector<std::string>& modes,
                   int64_t prompt = 0);

/// Pooling and what follows it.
class SentenceHead : public torch::nn::Module {
 public:
  /// Reads modules.json and what it names beside `checkpoint`; of a GGUF file its pooling type. Without either: mean,
  /// normalized. Error: a module that is not supported, or weights that do not fit, naming the file.
  explicit SentenceHead(const Checkpoint& checkpoint, const LoadOptions& options = {});

  /// hidden [B, T, d] -> [B, d'] f32. `pooling` (not empty) replaces the checkpoint's modes and then only normalization
  /// follows; `normalize` false leaves out the L2 normalization, true adds it.
  torch::Tensor forward(const torch::Tensor& hidden, const torch::Tensor& mask, int64_t prompt = 0,
                        const std::vector<std::string>& pooling = {}, std::optional<bool> normalize = std::nullopt);

  SentenceSettings settings;

 private:
  struct Step {
    enum Kind { dense, norm, l2 } kind = l2;
    Linear linear{nullptr}, residual{nullptr};
    bool use_residual = false;
    Activation activation = nullptr;
    torch::Tensor weight, bias;  // of a layer norm
  };
  std::vector<Step> steps_;
};

struct EmbedOptions {
  std::vector<std::string> pooling;   ///< empty: the checkpoint's own
  std::optional<bool> normalize;      ///< unset: the checkpoint's own
  std::string prompt_name;            ///< "": the checkpoint's default prompt
  std::optional<std::string> prompt;  ///< literal text before every input, instead of a named prompt
  int64_t batch_size = 32;
  int64_t max_length = 0;  ///< 0: the checkpoint's own
};

/// Texts in, vectors out.
class SentenceModel {
 public:
  /// Error as of Checkpoint::open, load_encoder, load_causal and Tokenizer::load.
  explicit SentenceModel(const std::string& location, const LoadOptions& options = {});

  /// [n, d] f32 on the CPU, in the order of `texts`. Batches are made of texts of like length. `progress` gets the
  /// number done.
  torch::Tensor embed(const std::vector<std::string>& texts, const EmbedOptions& options = {},
                      const std::function<void(int64_t)>& progress = {});
  /// Token ids of one text, cut to `max_length` with the special tokens kept.
  std::vector<int64_t> encode(const std::string& text, int64_t max_length) const;

  const SentenceSettings& settings() const { return head_->settings; }
  int64_t max_length() const { return max_length_; }
  const Checkpoint& checkpoint() const { return *checkpoint_; }

 private:
  torch::Tensor hidden(const torch::Tensor& ids, const torch::Tensor& mask);
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<EncoderModel> encoder_;
  std::shared_ptr<CausalModel> causal_;
  std::shared_ptr<SentenceHead> head_;
  torch::Device device_;
  int64_t max_length_ = 0;
};

/// a [n, d], b [m, d] -> [n, m]: cosine, dot, or minus the euclidean or manhattan distance.
torch::Tensor similarity(const torch::Tensor& a, const torch::Tensor& b, const std::string& kind);

}  // namespace moiety
