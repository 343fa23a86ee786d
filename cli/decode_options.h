#pragma once
// The sampling options that generate and chat share.
#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/decode/generator.h"

namespace moiety::cli {

struct DecodeOptions {
  std::optional<double> temperature, top_p, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty;
  std::optional<int64_t> top_k, max_tokens;
  std::vector<std::string> logit_bias;  ///< ID=VALUE
  std::vector<std::string> stop;
  bool greedy = false;
  uint64_t seed = 0;

  /// Adds --greedy, --temperature, --top-k, --top-p, --min-p, --typical, the penalties, --logit-bias, --stop, --seed
  /// and -n/--max-tokens.
  void add(CLI::App& app);
  /// The checkpoint's settings with the given options over them. A temperature above 0 or a truncation samples, as does
  /// `do_sample` of the checkpoint; otherwise decoding is greedy.
  SamplerConfig sampler(const GenerationDefaults& defaults) const;
};

}  // namespace moiety::cli
