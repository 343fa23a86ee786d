#include "moiety/decode/sampling.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The k-th largest value. A heap of k costs one comparison for nearly every element when k is small.
float kth_largest(std::span<const float> values, size_t k) {
  if (k > values.size() / 16) {
    std::vector<float> copy(values.begin(), values.end());
    std::replace_if(
        copy.begin(), copy.end(), [](float x) { return std::isnan(x); }, kMinusInfinity);
    std::nth_element(copy.begin(), copy.begin() + static_cast<int64_t>(k) - 1, copy.end(), std::greater<>());
    return copy[k - 1];
  }
  std::vector<float> heap(values.begin(), values.begin() + static_cast<int64_t>(k));
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  for (const float value : values.subspan(k)) {
    if (value <= heap.front()) continue;
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.back() = value;
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  return heap.front();
}

// Sorts growing heads of `items` until `enough(item)` says that one reached the goal; returns how many are in order.
template <class T, class Less, class Enough>
size_t sort_until(std::vector<T>& items, Less less, Enough enough) {
  size_t sorted = 0;
  for (size_t head = 128; sorted < items.size(); head *= 8) {
    const size_t end = std::min(items.size(), sorted + head);
    const auto at = [&](size_t i) { return items.begin() + static_cast<int64_t>(i); };
    if (end < items.size()) std::nth_element(at(sorted), at(end), items.end(), less);
    std::sort(at(sorted), at(end), less);
    for (; sorted < end; ++sorted)
      if (enough(items[sorted])) return sorted + 1;
  }
  return sorted;
}

}  // namespace

bool SamplerConfig::processes() const {
  return !logit_bias.empty() || repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0;
}

void SamplerConfig::fields(Fields& f) {
  f("greedy", greedy, "take the most probable token; nothing below is drawn by chance");
  f("temperature", temperature, "logits are divided by this before sampling; 0 is greedy").min(0);
  f("top_k", top_k, "sample among the k most probable tokens; 0: all").min(0);
  f("top_p", top_p, "sample among the most probable tokens that reach this probability together").min(0).max(1);
  f("min_p", min_p, "sample among tokens with at least this share of the largest probability").min(0).max(1);
  f("typical_p", typical_p, "sample among tokens nearest to the expected surprise, up to this probability")
      .min(1e-6)
      .max(1);
  f("repetition_penalty", repetition_penalty, "above 1: tokens of the prompt and the answer become rarer").min(1e-6);
  f("frequency_penalty", frequency_penalty, "subtracted for every time the answer used the token");
  f("presence_penalty", presence_penalty, "subtracted when the answer used the token");
  // JSON keys are text.
  std::map<std::string, double> bias;
  for (const auto& [id, value] : logit_bias) bias[std::to_string(id)] = value;
  f("logit_bias", bias, "added to the logits of these token ids");
  logit_bias.clear();
  for (const auto& [key, value] : bias) {
    int64_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    check(error == std::errc() && end == key.data() + key.size() && id >= 0,
          "logit_bias has the key `{}` but its keys must be token ids", shown(key));
    logit_bias[id] = value;
  }
}

void SamplerConfig::validate() const {
  check(std::isfinite(temperature) && std::isfinite(repetition_penalty) && std::isfinite(frequency_penalty) &&
            std::isfinite(presence_penalty),
        "temperature and penalties must be finite numbers");
  SamplerConfig rest = *this;
  rest.logit_bias.clear();
  parse<SamplerConfig>(dump(rest), "sampling");
  for (const auto& [id, bias] : logit_bias)
    check(id >= 0 && !std::isnan(bias) && bias < std::numeric_limits<double>::infinity(),
          "logit_bias of token {} is {}: ids start at 0 and a bias is a number or -inf", id, bias);
}

int64_t argmax(std::span<const float> values) {
  int64_t best = -1;
  float largest = kMinusInfinity;
  for (size_t i = 0; i < values.size(); ++i)
    if (values[i] > largest) {
      largest = values[i];
      best = static_cast<int64_t>(i);
    }
  check(best >= 0, "there is no token to choose: all {} logits are -inf or not a number", values.size());
  return best;
}

std::vector<std::pair<int64_t, float>> top(std::span<const float> values, int64_t k) {
  k = std::clamp<int64_t>(k, 0, static_cast<int64_t>(values.size()));
  std::vector<std::pair<int64_t, float>> found;
  if (k == 0) return found;
  const float limit = kth_largest(values, static_cast<size_t>(k));
  for (size_t i = 0; i < values.size(); ++i)
    if (values[i] >= limit) found.emplace_back(static_cast<int64_t>(i), values[i]);
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  if (static_cast<int64_t>(found.size()) > k) found.resize(static_cast<size_t>(k));
  return found;
}

double log_sum_exp(std::span<const float> values) {
  const float largest = values.empty() ? kMinusInfinity : *std::max_element(values.begin(), values.end());
  if (!std::isfinite(largest)) return largest;
  double sum = 0.0;
  for (const float value : values) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

Sampler::Sampler(SamplerConfig config, RandomStream random) : config_(std::move(config)), random_(std::move(random)) {
  config_.validate();
}

void Sampler::see_prompt(std::span<const int64_t> ids) {
  if (config_.repetition_penalty == 1.0) return;
  for (const int64_t id : ids) seen_.try_emplace(id, 0);
}

void Sampler::accept(int64_t id) {
  if (config_.processes()) ++seen_[id];
}

void Sampler::penalize(std::span<float> logits) const {
  const auto inside = [&](int64_t id) { return id >= 0 && id < static_cast<int64_t>(logits.size()); };
  for (const auto& [id, bias] : config_.logit_bias) {
    check(inside(id), "logit_bias names token {} but the vocabulary has {}", id, logits.size());
    logits[static_cast<size_t>(id)] += static_cast<float>(bias);
  }
  const auto repetition = static_cast<float>(config_.repetition_penalty);
  for (const auto& [id, count] : seen_) {
    if (!inside(id)) continue;
    float& logit = logits[static_cast<size_t>(id)];
    if (repetition != 1.0f) logit = logit < 0.0f ? logit * repetition : logit / repetition;
    if (count > 0)
      logit -= static_cast<float>(config_.frequency_penalty * static_cast<double>(count) + config_.presence_penalty);
  }
}

void Sampler::truncate(std::span<float> logits) const {
  if (config_.temperature != 1.0) {
    const auto temperature = static_cast<float>(config_.temperature);
    for (float& logit : logits) logit /= temperature;
  }
  float limit = kMinusInfinity;
  if (config_.top_k > 0 && config_.top_k < static_cast<int64_t>(logits.size()))
    limit = kth_largest(logits, static_cast<size_t>(config_.top_k));
  const float largest = logits[static_cast<size_t>(argmax(logits))];
  check(std::isfinite(largest), "a logit is infinite: the model or a bias overflows");
  // Min-p asks for a share of the largest probability, which the normalisation of any earlier step leaves as it is. It
  // must still come after top-p, whose mass counts what min-p would have cut.
  kept_.clear();
  double total = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    check(!std::isnan(logits[i]), "the logit of token {} is not a number", i);
    if (logits[i] >= limit && logits[i] > kMinusInfinity) {
      const float p = std::exp(logits[i] - largest);
      total += p;
      kept_.push_back({static_cast<int64_t>(i), logits[i], p, 0.0f});
    }
  }
  bool ordered = true;
  if (config_.top_p < 1.0) {
    // Tokens that hold less than 1 - p together, whichever they are, cannot belong to the head: no need to sort them.
    const double least = (1.0 - config_.top_p) * total / static_cast<double>(kept_.size()) * 0.999;
    std::erase_if(kept_, [&](const Candidate& c) { return c.probability < least; });
    // Seen from the largest down, a token stays while the mass before it is below p; one always stays.
    double mass = 0.0;
    const auto larger = [](const Candidate& a, const Candidate& b) {
      return a.score != b.score ? a.score > b.score : a.id < b.id;
    };
    kept_.resize(sort_until(kept_, larger,
                            [&](const Candidate& c) { return (mass += c.probability) >= config_.top_p * total; }));
    total = mass;
    ordered = false;
  }
  if (config_.min_p > 0.0) {
    // The largest has probability 1 here. Compared as probabilities, as the reference does.
    const auto least = static_cast<float>(config_.min_p);
    std::erase_if(kept_, [&](const Candidate& c) { return c.probability < least; });
    total = 0.0;
    for (const Candidate& c : kept_) total += c.probability;
  }
  if (config_.typical_p < 1.0) {
    const double log_total = std::log(total);
    double entropy = 0.0;
    for (const Candidate& c : kept_)
      entropy -= c.probability / total * (static_cast<double>(c.score - largest) - log_total);
    for (Candidate& c : kept_)
      c.distance = static_cast<float>(std::abs(-(static_cast<double>(c.score - largest) - log_total) - entropy));
    double mass = 0.0;
    const auto nearer = [](const Candidate& a, const Candidate& b) {
      return a.distance != b.distance ? a.distance < b.distance : a.id < b.id;
    };
    const size_t head = sort_until(
        kept_, nearer, [&](const Candidate& c) { return (mass += c.probability) >= config_.typical_p * total; });
    // Tokens as far from the entropy as the last one stay too.
    const float farthest = kept_[head - 1].distance;
    size_t end = head;
    for (size_t i = head; i < kept_.size(); ++i)
      if (kept_[i].distance <= farthest) std::swap(kept_[end++], kept_[i]);
    kept_.resize(end);
    ordered = false;
  }
  if (!ordered) std::sort(kept_.begin(), kept_.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
}

int64_t Sampler::sample(std::span<float> logits) {
  if (config_.processes()) penalize(logits);
  if (config_.is_greedy()) return argmax(logits);
  truncate(logits);
  double total = 0.0;
  for (const Candidate& c : kept_) total += c.probability;
  double left = random_.uniform() * total;
  for (const Candidate& c : kept_)
    if ((left -= c.probability) < 0.0) return c.id;
  // Rounding can leave a sliver behind the last candidate; it goes to the last one that has any probability.
  for (auto c = kept_.rbegin(); c != kept_.rend(); ++c)
    if (c->probability > 0.0f) return c->id;
  return argmax(logits);
}

void Sampler::process(std::span<float> logits) const {
  if (config_.processes()) penalize(logits);
  if (config_.is_greedy()) return;
  truncate(logits);
  std::fill(logits.begin(), logits.end(), kMinusInfinity);
  for (const Candidate& c : kept_) logits[static_cast<size_t>(c.id)] = c.score;
}

}  // namespace moiety
