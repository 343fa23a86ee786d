#pragma once
// Options that verbs which decode share: sampling, and how keys and values are kept.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/decode/generator.h"
#include "moiety/models/model.h"

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

/// How keys and values of past tokens are kept, for every verb that has a cache.
struct CacheOptions {
  std::string both, k, v;  ///< "": as the option for both says, auto

  /// Adds --cache-type, --cache-type-k and --cache-type-v.
  void add(CLI::App& app);
  /// Sets what caches of the model are made of from now on.
  void apply(CausalModel& model) const;
  /// Whether something else than the type that is computed in was asked for.
  bool given() const;
  /// The types by name, for reports.
  nlohmann::json json() const;

 private:
  const std::string& of(const std::string& one) const;
};

}  // namespace moiety::cli
