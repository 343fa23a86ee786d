#include "moiety/offload/hobbit.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"

namespace moiety {

using nlohmann::json;

std::string HobbitWeights::problem() const {
  for (const auto& [name, value] : {std::pair{"lru", lru}, {"lfu", lfu}, {"lhu", lhu}, {"fld", fld}})
    if (!(value >= 0.0) || !std::isfinite(value))
      return fmt::format("weight {} is {}, which is not 0 or more", name, value);
  const double sum = lru + lfu + lhu + fld;
  if (std::abs(sum - 1.0) > 1e-6)
    return fmt::format("the weights lru {}, lfu {}, lhu {}, fld {} add up to {}, not to 1", lru, lfu, lhu, fld, sum);
  return "";
}

void HobbitConfig::fields(Fields& f) {
  f("t1", t1, "experts whose unimportance is at most this are read in high precision").min(0.0).max(1.0);
  f("t2", t2, "those above t1 up to this in low precision; those above are left out").min(0.0).max(1.0);
  f("lookahead", lookahead, "layers whose experts are guessed ahead; 0: none").min(0).max(64);
  f("weights", weights,
    "of the cache's priority: auto (MODEL.hobbit.json, or 0.25 each), or lru, lfu, lhu and fld, that add up to 1");
  f("prefetch_input", input,
    "what later routers are given: the running router's input, or that input under their own norm")
      .choices({"router", "renorm"});
}

std::string HobbitConfig::problem() const {
  if (t1 > t2) return fmt::format("t1 is {} and t2 {}: t1 must not be above t2", t1, t2);
  return "";
}

std::optional<HobbitWeights> HobbitConfig::given_weights() const {
  if (weights == "auto") return std::nullopt;
  HobbitWeights w;
  double* const places[] = {&w.lru, &w.lfu, &w.lhu, &w.fld};
  const char* const names[] = {"lru", "lfu", "lhu", "fld"};
  const auto bad = [&] {
    fail("weights is `{}` but must be auto, four numbers lru,lfu,lhu,fld, or a section with these keys",
         shown(weights.is_string() ? weights.get<std::string>() : weights.dump()));
  };
  if (weights.is_object()) {
    for (const auto& [key, value] : weights.items()) {
      const auto* name = std::find(std::begin(names), std::end(names), key);
      if (name == std::end(names) || !value.is_number()) bad();
    }
    for (size_t i = 0; i < 4; ++i) *places[i] = weights.value(names[i], 0.0);
  } else if (weights.is_string()) {
    const auto text = weights.get<std::string>();
    const char* at = text.c_str();
    for (size_t i = 0; i < 4; ++i) {
      char* end = nullptr;
      *places[i] = std::strtod(at, &end);
      if (end == at || *end != (i == 3 ? '\0' : ',')) bad();
      at = end + 1;
    }
  } else {
    bad();
  }
  const auto wrong = w.problem();
  check(wrong.empty(), "{}", wrong);
  return w;
}

std::vector<Scored> hobbit_scores(std::span<const Demand::Pair> row, double t1, double t2) {
  double sum = 0.0;
  for (const auto& p : row) sum += p.gate;
  std::vector<Scored> out;
  double before = 0.0;
  for (const auto& p : row) {
    const double weight = sum > 0.0 ? p.gate / sum : 1.0 / static_cast<double>(row.size());
    const Precision precision = out.empty() || before <= t1 ? Precision::high
                                : before <= t2              ? Precision::low
                                                            : Precision::skip;
    out.push_back({p.expert, weight, before, precision});
    before = std::min(1.0, before + weight);  // t1 = 1 asks for high precision whatever sums round to
  }
  return out;
}

double hobbit_priority(const UseRecord& r, int64_t layer, const Moment& now, int64_t layers, const HobbitWeights& w) {
  const auto token = static_cast<double>(std::max<int64_t>(1, now.token));
  const int64_t ahead = (layer - now.layer + layers) % layers;
  return w.lru * static_cast<double>(r.last_used) / token + w.lfu * static_cast<double>(r.count) / token +
         w.lhu * static_cast<double>(r.count_high) / token +
         w.fld * (1.0 - static_cast<double>(ahead) / static_cast<double>(layers));
}

Hobbit::Hobbit(int64_t layers, int64_t experts, double t1, double t2, int64_t lookahead, HobbitWeights weights)
    : layers_(layers), experts_(experts), t1_(t1), t2_(t2), lookahead_(lookahead), weights_(weights) {
  check(t1 >= 0.0 && t1 <= t2 && t2 <= 1.0, "t1 is {} and t2 {}: 0 <= t1 <= t2 <= 1 is needed", t1, t2);
  check(lookahead >= 0, "a lookahead of {} layers is impossible", lookahead);
  const auto wrong = weights.problem();
  check(wrong.empty(), "{}", wrong);
  records_.resize(static_cast<size_t>(layers * experts));
}

Hobbit::Hobbit(const PolicySetup& s, HobbitConfig c)
    : Hobbit(s.layers, s.experts, c.t1, c.t2, c.lookahead, c.given_weights().value_or(HobbitWeights())) {
  check(s.has_low || t1_ >= 1.0,
        "{} has no low-precision copies of its experts, which t1 = {} asks for: `moiety compress {} --add-low-experts "
        "q4_0 -o NEW.gguf` makes a file with them, --t1 1 --t2 1 does without",
        s.model.empty() ? "the model" : s.model, t1_, s.model.empty() ? "MODEL" : s.model);
  if (c.weights != "auto") return;
  weights_from_ = "default";
  const auto file = hobbit_file(s.model);
  if (s.model.empty() || !std::filesystem::exists(file)) return;
  const auto found = read_calibration(file);
  check(found.router_hash == s.router_hash,
        "{} was made for another model: its routers are {}, those of {} are {}; calibrate again with `moiety analyze`, "
        "or give --weights",
        file, found.router_hash.substr(0, 12), s.model, s.router_hash.substr(0, 12));
  weights_ = found.weights;
  weights_from_ = file;
}

void Hobbit::begin_sequence() {
  std::fill(records_.begin(), records_.end(), UseRecord());
}

namespace {

// Calls use(scored pairs of the row) for every row.
template <class Body>
void for_rows(const Demand& demand, double t1, double t2, Body body) {
  const auto& pairs = demand.pairs;
  for (size_t begin = 0; begin < pairs.size();) {
    size_t end = begin + 1;
    while (end < pairs.size() && pairs[end].row == pairs[begin].row) ++end;
    body(hobbit_scores(std::span(pairs).subspan(begin, end - begin), t1, t2));
    begin = end;
  }
}

// Every expert once, in the best precision that a row asks for.
std::vector<Wanted> wanted(const Demand& demand, double t1, double t2) {
  std::vector<Wanted> out;
  if (demand.rows == 1) {
    for_rows(demand, t1, t2, [&](const std::vector<Scored>& row) {
      for (const Scored& s : row) out.push_back({s.expert, s.precision, 1});
    });
    return out;
  }
  std::map<int64_t, Wanted> all;  // ascending
  for_rows(demand, t1, t2, [&](const std::vector<Scored>& row) {
    for (const Scored& s : row) {
      auto [at, fresh] = all.try_emplace(s.expert, Wanted{s.expert, s.precision, 1});
      if (fresh) continue;
      at->second.asked = std::max(at->second.asked, s.precision);
      ++at->second.tokens;
    }
  });
  for (const auto& [expert, w] : all) out.push_back(w);
  return out;
}

}  // namespace

std::vector<Wanted> Hobbit::ask(const Demand& demand) {
  return wanted(demand, t1_, t2_);
}

void Hobbit::used(const ExpertVersion& v, int64_t tokens, bool, const Moment& now) {
  UseRecord& r = records_[static_cast<size_t>(v.layer * experts_ + v.expert)];
  r.last_used = now.token;
  r.count += tokens;
  if (v.precision == Precision::high) r.count_high += tokens;
}

size_t Hobbit::victim(std::span<const ExpertVersion> candidates, const Moment& now) {
  return lowest(candidates, [&](const ExpertVersion& v) {
    return hobbit_priority(records_[static_cast<size_t>(v.layer * experts_ + v.expert)], v.layer, now, layers_,
                           weights_);
  });
}

std::vector<Guess> Hobbit::guess(const Demand& demand, const Cached& cached, LookAhead* look) {
  stopped_at_ = -1;
  // A prompt's rows name many experts: one layer is as far as the pool reaches.
  const int64_t last =
      std::min(demand.layer + (demand.rows > 1 ? std::min<int64_t>(1, lookahead_) : lookahead_), layers_ - 1);
  std::vector<Guess> out;
  if (look == nullptr || last <= demand.layer) return out;
  for (const Demand& later : look->route(demand.layer + 1, last)) {
    std::vector<Guess> loads;
    for (const Wanted& w : wanted(later, t1_, t2_)) {
      const Precision used = cached.look_up(later.layer, w.expert, w.asked);
      if (used == Precision::skip) continue;
      const ExpertVersion version{later.layer, w.expert, used};
      if (cached.has(version))
        out.push_back({version, false});
      else
        loads.push_back({version, true});
    }
    if (loads.empty()) continue;
    stopped_at_ = later.layer;
    out.insert(out.end(), loads.begin(), loads.end());
    break;
  }
  return out;
}

json Hobbit::settings() const {
  return {{"policy", "hobbit"},
          {"t1", t1_},
          {"t2", t2_},
          {"lookahead", lookahead_},
          {"weights", {{"lru", weights_.lru}, {"lfu", weights_.lfu}, {"lhu", weights_.lhu}, {"fld", weights_.fld}}},
          {"weights_from", weights_from_}};
}

std::string hobbit_file(const std::string& model) {
  std::string name = model;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  return name + ".hobbit.json";
}

void write_calibration(const std::string& file, const HobbitCalibration& c) {
  const json out = {
      {"weights", {{"lru", c.weights.lru}, {"lfu", c.weights.lfu}, {"lhu", c.weights.lhu}, {"fld", c.weights.fld}}},
      {"t1", c.t1},
      {"t2", c.t2},
      {"capacity_high", c.capacity_high},
      {"capacity_low", c.capacity_low},
      {"penalty", c.penalty},
      {"penalty_even", c.penalty_even},
      {"router_hash", c.router_hash}};
  write_file(file, out.dump(2) + "\n");
}

HobbitCalibration read_calibration(const std::string& file) {
  return reading_json(file, [&] {
    const json in = parse_json(read_text(file, 1 << 20), file);
    check(in.is_object() && in.contains("weights") && in.contains("router_hash"),
          "{} is no calibration: it has no `weights` and `router_hash`; `moiety analyze expert-traces` makes one",
          file);
    HobbitCalibration c;
    HobbitConfig config;
    config.weights = in.at("weights");
    c.weights = config.given_weights().value_or(HobbitWeights());
    c.t1 = in.value("t1", c.t1);
    c.t2 = in.value("t2", c.t2);
    c.capacity_high = in.value("capacity_high", int64_t{0});
    c.capacity_low = in.value("capacity_low", int64_t{0});
    c.penalty = in.value("penalty", 0.0);
    c.penalty_even = in.value("penalty_even", 0.0);
    c.router_hash = in.at("router_hash").get<std::string>();
    return c;
  });
}

namespace {

const RegisterMethod registered(
    {.slug = "hobbit",
     .kind = "policy",
     .title = "HOBBIT",
     .summary = "experts on disk: mixed precision on a miss, read-ahead by the next routers, "
                "a cache that weighs four things",
     .paper = {"HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference", "Tang et al.", 2024,
               "2411.01433"},
     .sites = {},
     .config = describe<HobbitConfig>,
     .make = MakeOffloadPolicy([](const PolicySetup& setup, const json& settings) {
       return std::make_shared<Hobbit>(setup, parse<HobbitConfig>(settings, "hobbit"));
     })});

}  // namespace
}  // namespace moiety
