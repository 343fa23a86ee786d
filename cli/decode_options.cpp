#include "decode_options.h"

#include <charconv>
#include <cmath>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/kernels/format.h"

namespace moiety::cli {
namespace {

std::optional<std::pair<int64_t, double>> parse_bias(const std::string& text) {
  const size_t split = text.find_first_of("=:");
  if (split == std::string::npos) return std::nullopt;
  int64_t id = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + split, id);
  if (error != std::errc() || end != text.data() + split || id < 0) return std::nullopt;
  const std::string value = text.substr(split + 1);
  char* rest = nullptr;
  const double bias = std::strtod(value.c_str(), &rest);
  if (value.empty() || *rest != '\0' || std::isnan(bias) || bias == HUGE_VAL) return std::nullopt;
  return std::pair{id, bias};
}

// Finite numbers in [low, high] (low itself excluded when `open`).
CLI::Validator number(double low, double high, const std::string& allowed, bool open = false) {
  return CLI::Validator(
      [=](std::string& text) {
        char* rest = nullptr;
        const double value = std::strtod(text.c_str(), &rest);
        const bool ok = !text.empty() && *rest == '\0' && std::isfinite(value) && value >= low && value <= high &&
                        !(open && value == low);
        return ok ? std::string() : "is `" + text + "` but must be " + allowed;
      },
      "", "number");
}

}  // namespace

void DecodeOptions::add(CLI::App& app) {
  constexpr double kMost = 1e30;
  app.add_option("-n,--max-tokens", max_tokens, "How many tokens to generate at most; -1: until the context is full")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 40));
  auto* greedy_flag = app.add_flag("--greedy", greedy, "Always take the most probable token");
  app.add_option("--temperature,--temp", temperature, "Divide logits by this before sampling; 0 is greedy")
      ->check(number(0, kMost, "0 or more"))
      ->excludes(greedy_flag);
  app.add_option("--top-k", top_k, "Sample among the k most probable tokens; 0: all")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  app.add_option("--top-p", top_p, "Sample among the most probable tokens that reach this probability together")
      ->check(number(0, 1, "between 0 and 1"));
  app.add_option("--min-p", min_p, "Sample among tokens with at least this share of the largest probability")
      ->check(number(0, 1, "between 0 and 1"));
  app.add_option("--typical", typical_p, "Sample among tokens nearest to the expected surprise, up to this probability")
      ->check(number(0, 1, "above 0 and at most 1", true));
  app.add_option("--repetition-penalty", repetition_penalty,
                 "Above 1: tokens of the prompt and the answer become rarer")
      ->check(number(0, kMost, "above 0", true));
  app.add_option("--frequency-penalty", frequency_penalty, "Subtracted for every time the answer used the token")
      ->check(number(-kMost, kMost, "a number"));
  app.add_option("--presence-penalty", presence_penalty, "Subtracted when the answer used the token")
      ->check(number(-kMost, kMost, "a number"));
  app.add_option("--logit-bias", logit_bias, "ID=VALUE: add VALUE to the logit of token ID; -inf bans it")
      ->allow_extra_args(false)
      ->check(CLI::Validator(
          [](std::string& text) {
            return parse_bias(text) ? std::string()
                                    : "is `" + text + "` but must be ID=VALUE, such as 42=-5 or 42=-inf";
          },
          "", "bias"));
  app.add_option("--stop", stop, "End the answer before this text; may be given several times")
      ->allow_extra_args(false)
      ->check(CLI::Validator([](std::string& text) { return text.empty() ? std::string("is empty") : std::string(); },
                             "", "text"));
  app.add_option("--seed", seed, "Seed of the random numbers")->capture_default_str();
}

SamplerConfig DecodeOptions::sampler(const GenerationDefaults& defaults) const {
  SamplerConfig config = defaults.sampler;
  if (temperature || top_k || top_p || min_p || typical_p) config.greedy = false;
  if (greedy) config.greedy = true;
  config.temperature = temperature.value_or(config.temperature);
  config.top_k = top_k.value_or(config.top_k);
  config.top_p = top_p.value_or(config.top_p);
  config.min_p = min_p.value_or(config.min_p);
  config.typical_p = typical_p.value_or(config.typical_p);
  config.repetition_penalty = repetition_penalty.value_or(config.repetition_penalty);
  config.frequency_penalty = frequency_penalty.value_or(config.frequency_penalty);
  config.presence_penalty = presence_penalty.value_or(config.presence_penalty);
  for (const auto& text : logit_bias) {
    const auto bias = parse_bias(text);
    check(bias.has_value(), "--logit-bias is `{}` but must be ID=VALUE", text);
    config.logit_bias.insert_or_assign(bias->first, bias->second);
  }
  config.validate();
  return config;
}

void CacheOptions::add(CLI::App& app) {
  const CLI::IsMember types({"auto", "f32", "bf16", "f16", "q8_0"});
  app.add_option("--cache-type", both,
                 "How keys and values of past tokens are kept: auto (as they are computed), f32, bf16, f16, or q8_0")
      ->check(types);
  app.add_option("--cache-type-k", k, "The same for keys alone")->check(types);
  app.add_option("--cache-type-v", v, "And for values alone")->check(types);
}

const std::string& CacheOptions::of(const std::string& one) const {
  static const std::string automatic = "auto";
  return !one.empty() ? one : !both.empty() ? both : automatic;
}

void CacheOptions::apply(CausalModel& model) const {
  const auto format = [](const std::string& name) {
    const FormatInfo* found = find_format(name);
    return found == nullptr ? std::optional<Format>() : found->format;
  };
  model.cache_formats = {format(of(k)), format(of(v))};
}

bool CacheOptions::given() const {
  return of(k) != "auto" || of(v) != "auto";
}

nlohmann::json CacheOptions::json() const {
  return {{"k", of(k)}, {"v", of(v)}};
}

}  // namespace moiety::cli
