#include "moiety/offload/offload.h"

#include <sys/mman.h>
#include <unistd.h>

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <set>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/mapped_file.h"
#include "moiety/io/sha256.h"
#include "moiety/models/decoder.h"
#include "moiety/moe/grouped.h"
#include "moiety/moe/router.h"
#include "moiety/moe/topk.h"
#include "moiety/nn/packed.h"
#include "moiety/nn/shortcut.h"
#include "moiety/nn/weights.h"
#include "moiety/offload/checkpoint_experts.h"
#include "moiety/offload/edge_source.h"

namespace moiety {
namespace {

using torch::Tensor;

// ---- Pages of mapped files ----

struct Pages {
  std::byte* begin;
  size_t bytes;
};

// Whole pages around (`inner`: inside of) a piece of memory.
Pages pages_of(std::span<const std::byte> data, bool inner) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  auto begin = reinterpret_cast<uintptr_t>(data.data()), end = begin + data.size();
  begin = (inner ? begin + page - 1 : begin) / page * page;
  end = (inner ? end : end + page - 1) / page * page;
  return {reinterpret_cast<std::byte*>(begin), end > begin ? end - begin : 0};
}

// Has the pages read now, in long reads, instead of one by one when they are touched.
void read_pages(std::span<const std::byte> data) {
  const Pages p = pages_of(data, false);
  if (p.bytes == 0) return;
#if defined(MADV_POPULATE_READ)
  if (::madvise(p.begin, p.bytes, MADV_POPULATE_READ) == 0) return;
#endif
  ::madvise(p.begin, p.bytes, MADV_WILLNEED);
}

void drop_pages(std::span<const std::byte> data) {
  const Pages p = pages_of(data, true);
  if (p.bytes > 0) ::madvise(p.begin, p.bytes, MADV_DONTNEED);
}

// Packs what products read packed, and leaves of the mapped files only those pages resident that are still needed.
void keep_resident(Decoder& model) {
  std::vector<std::span<const std::byte>> kept;
  std::set<const std::byte*> seen;
  std::vector<std::span<const std::byte>> files;
  const auto in_file = [&](const std::byte* data) {
    const auto place = MappedFile::locate(data);
    if (place && seen.insert(place->whole.data()).second) files.push_back(place->whole);
    return place.has_value();
  };
  for (const auto& module : model.modules()) {
    auto* linear = dynamic_cast<LinearImpl*>(module.get());
    if (linear == nullptr || linear->mapped() == nullptr) continue;
    const auto data = linear->mapped()->data;
    if (!in_file(data.data()) || linear->streamed()) continue;
    const bool looked_up = linear == model.embed.get();
    if (!looked_up || model.head.get() == model.embed.get()) {
      read_pages(data);
      if (linear->pack()) {
        drop_pages(data);
        if (!looked_up) continue;
      }
    }
    kept.push_back(data);
  }
  // Norms, biases and routers, and whatever else is in plain numbers, become the process's own: nothing of it depends
  // on the file any more, whatever happens to that.
  const torch::NoGradGuard frozen;
  for (auto list : {model.parameters(), model.buffers()})
    for (Tensor& t : list) {
      if (!t.defined() || !t.device().is_cpu() || t.numel() == 0) continue;
      if (in_file(static_cast<const std::byte*>(t.const_data_ptr()))) t.set_data(t.clone());
    }
  for (const auto& file : files) drop_pages(file);
  for (const auto& data : kept) read_pages(data);
}

int64_t status_line(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(key, 0) == 0) return std::atoll(line.c_str() + std::char_traits<char>::length(key)) * 1024;
  return 0;
}

// What memory the system, and the control group that the process is in, can still give; 0 where nothing is known.
int64_t memory_left() {
  int64_t left = 0;
  {
    std::ifstream info("/proc/meminfo");
    for (std::string line; std::getline(info, line);)
      if (line.rfind("MemAvailable:", 0) == 0) left = std::atoll(line.c_str() + 13) * 1024 + resident_bytes();
  }
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // ID:CONTROLLERS:PATH
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    std::string file;
    if (controllers.empty()) file = "/sys/fs/cgroup" + path + "/memory.max";
    if (controllers == "memory") file = "/sys/fs/cgroup/memory" + path + "/memory.limit_in_bytes";
    std::ifstream limit(file);
    int64_t bytes = 0;
    if (!file.empty() && limit >> bytes && bytes > 0 && (left == 0 || bytes < left)) left = bytes;
  }
  return left;
}

std::string mib(int64_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / 1048576);
}

}  // namespace

int64_t resident_bytes() {
  return status_line("VmRSS:");
}

int64_t peak_resident_bytes() {
  return status_line("VmHWM:");
}

namespace {

// "12.5MiB" -> 12.5, "MiB".
std::pair<double, std::string> number_and_unit(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || !std::isfinite(value) || value <= 0) return {0.0, ""};
  return {value, std::string(end)};
}

double factor(const std::string& unit) {
  static const std::map<std::string, double> units = {{"", 1},
                                                      {"B", 1},
                                                      {"KB", 1e3},
                                                      {"MB", 1e6},
                                                      {"GB", 1e9},
                                                      {"TB", 1e12},
                                                      {"K", 1024},
                                                      {"KiB", 1024},
                                                      {"M", 1048576},
                                                      {"MiB", 1048576},
                                                      {"G", 1073741824.0},
                                                      {"GiB", 1073741824.0},
                                                      {"T", 1099511627776.0},
                                                      {"TiB", 1099511627776.0},
                                                      {"k", 1024},
                                                      {"kB", 1e3}};
  const auto at = units.find(unit);
  return at == units.end() ? 0.0 : at->second;
}

}  // namespace

int64_t parse_memory(const std::string& text) {
  if (text == "auto") {
    const int64_t left = memory_left();
    check(left > 0, "how much memory there is cannot be found out here: give --memory a size, such as 2GiB");
    return left / 10 * 9;
  }
  const auto [value, unit] = number_and_unit(text);
  const double bytes = value * factor(unit);
  check(bytes >= 1 && bytes < 9e18, "a memory of `{}` is no size: 512MiB, 2GiB, a number of bytes, and auto are",
        shown(text));
  return static_cast<int64_t>(bytes);
}

double parse_rate(const std::string& text) {
  std::string size = text;
  if (size.ends_with("/s")) size.resize(size.size() - 2);
  const auto [value, unit] = number_and_unit(size);
  const double rate = value * factor(unit);
  check(rate >= 1, "a rate of `{}` is none: 200MB/s, 1.5GB/s and a number of bytes a second are", shown(text));
  return rate;
}

std::string router_hash(CausalModel& model) {
  Sha256 hash;
  bool any = false;
  for (const auto& module : model.modules()) {
    const auto* mixture = dynamic_cast<Mixture*>(module.get());
    if (mixture == nullptr) continue;
    for (const auto& inner : mixture->router->modules()) {
      const auto* linear = dynamic_cast<LinearImpl*>(inner.get());
      if (linear == nullptr) continue;
      // Rounded, so that it is the same whatever dtype the model was loaded in.
      const auto weight = linear->dense(torch::kFloat32).to(torch::kBFloat16).to(torch::kCPU).contiguous();
      hash.update({static_cast<const std::byte*>(weight.const_data_ptr()), weight.nbytes()});
      any = true;
    }
  }
  return any ? hash.hex() : "";
}

nlohmann::ordered_json MemoryPlan::json() const {
  return {{"budget", budget},
          {"base", base},
          {"cache", cache},
          {"work", work},
          {"buffers", buffers},
          {"experts", experts()},
          {"capacity_high", capacity_high},
          {"capacity_low", capacity_low},
          {"slot_high", slot_high},
          {"slot_low", slot_low},
          {"least", least},
          {"chunk", chunk}};
}

// ---- Demands and guesses ----

Demand demand_of(const Dispatch& d, int64_t rows, int64_t layer, int64_t token) {
  Demand out;
  out.layer = layer;
  out.token = token;
  out.rows = rows;
  const auto gates = d.gates.detach().to(torch::kCPU, torch::kFloat32).contiguous();
  const auto tokens = d.tokens.to(torch::kCPU).contiguous();
  const float* gate = gates.const_data_ptr<float>();
  const int64_t* token_of = tokens.const_data_ptr<int64_t>();
  int64_t p = 0;
  for (size_t e = 0; e < d.counts.size(); ++e)
    for (int64_t i = 0; i < d.counts[e]; ++i, ++p) out.pairs.push_back({token_of[p], static_cast<int64_t>(e), gate[p]});
  sort_pairs(out, static_cast<int64_t>(d.counts.size()));
  return out;
}

StackedRouters::StackedRouters(std::vector<Layer> layers, bool renorm) : layers_(std::move(layers)), renorm_(renorm) {
  std::vector<Tensor> all;
  for (size_t l = 0; l < layers_.size(); ++l) {
    check(!renorm || layers_[l].norm.defined(),
          "prefetch_input = renorm needs an RMS norm in front of every mixture, which layer {} does not have", l);
    all.push_back(layers_[l].weight);
  }
  if (all.empty()) return;
  stack_ = torch::cat(all);
  // Rows of one tensor: what a look ahead multiplies by lies side by side.
  int64_t begin = 0;
  for (Layer& layer : layers_) {
    layer.weight = stack_.narrow(0, begin, layer.weight.size(0));
    begin_.push_back(begin);
    begin += layer.weight.size(0);
  }
  begin_.push_back(begin);
}

Tensor StackedRouters::stack(int64_t first, int64_t last) const {
  const int64_t begin = begin_.at(static_cast<size_t>(first)), end = begin_.at(static_cast<size_t>(last) + 1);
  const auto rows = stack_.narrow(0, begin, end - begin);
  if (!renorm_) return rows;
  // An RMS norm only scales: the next one makes x / norm * norm' of the same state.
  std::vector<Tensor> all;
  const Tensor& now = layers_.at(static_cast<size_t>(first - 1)).norm;
  for (int64_t l = first; l <= last; ++l) {
    const Layer& layer = layers_[static_cast<size_t>(l)];
    all.push_back(layer.weight * (layer.norm / now).to(layer.weight.scalar_type()));
  }
  return torch::cat(all);
}

std::vector<Demand> StackedRouters::route(const Tensor& x, int64_t first, int64_t last) {
  const torch::NoGradGuard frozen;
  const auto weight = stack(first, last);
  const auto logits = at::matmul(x.to(weight.scalar_type()), weight.t());
  std::vector<Demand> out;
  int64_t begin = 0;
  for (int64_t l = first; l <= last; ++l) {
    const Layer& layer = layers_[static_cast<size_t>(l)];
    const int64_t experts = layer.weight.size(0);
    auto own = logits.narrow(1, begin, experts);
    begin += experts;
    if (layer.bias.defined()) own = own + layer.bias.to(own.scalar_type());
    const Routing r = layer.rule(own.contiguous());
    Demand d;
    d.layer = l;
    d.rows = x.size(0);
    const auto chosen = r.experts.contiguous(), gates = r.gates.to(torch::kFloat64).contiguous();
    for (int64_t n = 0; n < chosen.size(0); ++n)
      for (int64_t k = 0; k < chosen.size(1); ++k) {
        const int64_t e = chosen.const_data_ptr<int64_t>()[n * chosen.size(1) + k];
        if (e >= 0) d.pairs.push_back({n, e, gates.const_data_ptr<double>()[n * chosen.size(1) + k]});
      }
    sort_pairs(d, experts);
    out.push_back(std::move(d));
  }
  return out;
}

// ---- Taking the experts out ----

namespace {

struct MixtureSite {
  int64_t block = 0;
  Mixture* mixture = nullptr;
  std::shared_ptr<GatedExperts> experts;
};

std::vector<MixtureSite> sites_of(Decoder& model) {
  std::vector<MixtureSite> sites;
  for (size_t b = 0; b < model.layers.size(); ++b) {
    auto* mixture = dynamic_cast<Mixture*>(model.layers[b]->ffn.get());
    if (mixture == nullptr) continue;
    auto experts = std::dynamic_pointer_cast<GatedExperts>(mixture->experts);
    check(experts != nullptr, "block {}: only gated experts can stay on disk, these are of another kind", b);
    sites.push_back({static_cast<int64_t>(b), mixture, std::move(experts)});
  }
  return sites;
}

std::vector<LinearStack> stacks_of(const GatedExperts& e) {
  return {e.gate, e.up, e.down};
}

std::shared_ptr<const ExpertSource> checkpoint_source(const std::vector<MixtureSite>& sites,
                                                      const Checkpoint& checkpoint, torch::Dtype compute) {
  std::vector<CheckpointExperts::Layer> layers;
  bool exact = false;
  for (const MixtureSite& s : sites) {
    CheckpointExperts::Layer layer;
    layer.high.resize(static_cast<size_t>(s.experts->count()));
    int which = 0;
    for (LinearStack stack : stacks_of(*s.experts)) {
      check(static_cast<int64_t>(stack->matrices().size()) == s.experts->count() &&
                stack->matrices()[0]->mapped() != nullptr,
            "block {}: the experts are in memory already; load the model with experts left in their file", s.block);
      for (size_t e = 0; e < layer.high.size(); ++e) {
        layer.high[e].matrices[which] = *stack->matrices()[e]->mapped();
        exact = exact || stack->matrices()[e]->exact;
      }
      ++which;
    }
    if (checkpoint.has(low_tensor(s.block, 0))) {
      layer.low.resize(layer.high.size());
      for (which = 0; which < 3; ++which) {
        const TensorView low = checkpoint.get(low_tensor(s.block, which));
        const auto& high = layer.high[0].matrices[which];
        check(low.shape.size() == 3 && low.shape[0] == s.experts->count() && low.shape[1] == high.shape[0] &&
                  low.shape[2] == high.shape[1],
              "{}: the low-precision copy '{}' has another shape than the experts of block {}",
              checkpoint.path().string(), low.name, s.block);
        for (size_t e = 0; e < layer.low.size(); ++e)
          layer.low[e].matrices[which] = select_first(low, static_cast<int64_t>(e));
      }
    }
    layers.push_back(std::move(layer));
  }
  return std::make_shared<CheckpointExperts>(std::move(layers), format_of(compute), exact);
}

StackedRouters::Layer router_of(const MixtureSite& s, const Decoder& model, int64_t top_k) {
  StackedRouters::Layer out;
  Linear projection{nullptr};
  for (const auto& module : s.mixture->router->modules())
    if (auto linear = std::dynamic_pointer_cast<LinearImpl>(module); linear && projection.is_empty())
      projection = Linear(linear);
  check(!projection.is_empty(), "block {}: a router without a matrix cannot be asked ahead", s.block);
  out.weight = projection->dense(torch::kFloat32);
  if (projection->bias.defined()) out.bias = projection->bias;
  if (auto* norm = dynamic_cast<RmsNorm*>(model.layers[static_cast<size_t>(s.block)]->before_ffn.get())) {
    // What the norm multiplies by, offset and all.
    out.norm = norm->scale();
  }
  if (auto top = std::dynamic_pointer_cast<TopKRouter>(s.mixture->router)) {
    out.rule = [top](const Tensor& logits) { return top->decide(logits); };
  } else {
    out.rule = [top_k](const Tensor& logits) {
      Routing r;
      auto [values, experts] = moiety::top_k(logits, top_k);
      r.experts = experts;
      r.gates = torch::softmax(values, -1);
      return r;
    };
  }
  return out;
}

}  // namespace

std::shared_ptr<Offload> Offload::attach(CausalModel& causal, const Checkpoint& checkpoint, OffloadOptions options,
                                         std::shared_ptr<const ExpertSource> source) {
  auto* model = dynamic_cast<Decoder*>(&causal);
  check(model != nullptr, "only decoders can leave their experts on disk");
  for (const Tensor& p : model->parameters())
    check(p.device().is_cpu(), "experts on disk are computed on the CPU: use --device cpu");
  const auto sites = sites_of(*model);
  check(!sites.empty(), "{} has no expert layers: there is nothing that could stay on disk",
        checkpoint.path().string());
  std::shared_ptr<Offload> out(new Offload);
  out->options_ = options;
  const auto edge = edge_experts_of(checkpoint);
  if (!source && edge) {
    check((model->dtype() == torch::kBFloat16) == edge->layout().bf16,
          "{}: its experts are decoded to {}, which the model has to compute in: leave --dtype out",
          checkpoint.path().string(), edge->layout().bf16 ? "bf16" : "f32");
    source = std::make_shared<EdgeExpertSource>(edge);
  }
  out->source_ = source ? std::move(source) : checkpoint_source(sites, checkpoint, model->dtype());
  PolicySetup& setup = out->setup_;
  setup.layers = static_cast<int64_t>(sites.size());
  setup.experts = sites[0].experts->count();
  for (const MixtureSite& s : sites) {
    check(s.experts->count() == setup.experts, "blocks {} and {} have {} and {} experts: one store needs equal numbers",
          sites[0].block, s.block, setup.experts, s.experts->count());
    check(!s.mixture->expert_map.defined(),
          "block {}: several rows of its router share an expert, which experts on disk do not know yet", s.block);
    const auto* top = dynamic_cast<TopKRouter*>(s.mixture->router.get());
    setup.top_k = std::max(setup.top_k, top != nullptr ? top->options.top_k : model->parsed.moe.router.top_k);
  }
  check(out->source_->layers() == setup.layers && out->source_->experts() == setup.experts,
        "the file of experts has {} layers of {}, the model {} of {}", out->source_->layers(), out->source_->experts(),
        setup.layers, setup.experts);
  setup.has_low = out->source_->has_low();
  setup.model = checkpoint.path().string();
  setup.router_hash = router_hash(causal);
  const Method& method = get_method("policy", options.policy);
  const auto offered = offload_policies();
  check(std::find(offered.begin(), offered.end(), options.policy) != offered.end(),
        "{} is no policy for experts on disk; {} are", options.policy, list_of(offered, "and"));
  out->policy_ = factory<MakeOffloadPolicy>(method)(setup, options.settings);

  std::vector<StackedRouters::Layer> routers;
  for (size_t l = 0; l < sites.size(); ++l) {
    const MixtureSite& s = sites[l];
    for (LinearStack stack : stacks_of(*s.experts))
      for (auto& matrix : stack->matrices()) matrix->stream();
    routers.push_back(router_of(s, *model, setup.top_k));
    const bool silu = (model->parsed.act == "silu" || model->parsed.act == "swish") && !model->parsed.moe.clamped;
    s.mixture->experts = std::make_shared<OffloadedExperts>(s.experts, out, static_cast<int64_t>(l), silu);
  }
  out->routers_ =
      std::make_shared<StackedRouters>(std::move(routers), options.settings.value("prefetch_input", "") == "renorm");
  keep_resident(*model);

  out->warm_ = [model, self = out.get()] {
    const torch::NoGradGuard frozen;
    self->warming_ = true;
    auto cache = model->make_cache();
    for (const int64_t tokens : {int64_t{16}, int64_t{1}}) {
      Pass pass;
      pass.cache = &cache;
      pass.last_logits_only = true;
      model->forward(torch::zeros({1, tokens}, torch::kInt64), pass);
    }
    self->warming_ = false;
  };
  const DecoderConfig c = model->parsed;
  const int64_t top_k = setup.top_k, element = model->dtype() == torch::kBFloat16 ? 2 : 4;
  out->needs_ = [c, top_k, element, model](const OffloadWork& w) {
    MemoryPlan plan;
    const auto layers = static_cast<int64_t>(c.layers.size());
    const CacheFormats& kept = model->cache_formats;
    const auto head = [&](const std::optional<Format>& format) {
      return format ? row_bytes(*format, c.head_dim) : element * c.head_dim;
    };
    const int64_t per_token =
        c.latent ? element * c.heads * (c.head_dim + c.mla.v) : c.kv_heads * (head(kept.k) + head(kept.v));
    const int64_t widened = kept.k || kept.v ? int64_t{8} << 20 : 0;
    // The cache grows by half; while it does, one layer's is there twice.
    const int64_t capacity = std::max(w.context + 64, w.context * 3 / 2);
    plan.cache = w.rows * per_token * capacity * (layers + 1);
    const auto work = [&](int64_t chunk) {
      const int64_t tokens = w.rows * chunk, pairs = tokens * top_k;
      const int64_t experts = pairs * (4 * c.moe.width + 2 * c.hidden) * 4;
      const int64_t dense = tokens * 3 * std::max(c.moe.shared_width, c.intermediate) * 4;
      const int64_t attention = tokens * (3 * c.heads * c.head_dim + 10 * c.hidden) * 4 +
                                c.heads * tokens * std::min(w.context, int64_t{2048}) * 4;
      return std::max(experts + dense, attention) + 3 * w.rows * w.logits * c.vocab * 4;
    };
    plan.chunk = w.chunk;
    const int64_t fixed = int64_t{16} << 20;  // threads, allocator, text
    while (!w.fixed_chunk && plan.chunk > 16 && work(plan.chunk) > int64_t{24} << 20) plan.chunk /= 2;
    plan.work = fixed + widened + work(plan.chunk);
    return plan;
  };
  return out;
}

std::shared_ptr<Offload> Offload::over(const std::vector<std::shared_ptr<GatedExperts>>& layers,
                                       std::shared_ptr<const ExpertSource> source,
                                       std::shared_ptr<OffloadPolicy> policy, int64_t top_k, OffloadOptions options) {
  check(!layers.empty(), "no expert layers: there is nothing to offload");
  std::shared_ptr<Offload> out(new Offload);
  out->options_ = std::move(options);
  out->source_ = std::move(source);
  out->policy_ = std::move(policy);
  out->setup_ = {.layers = static_cast<int64_t>(layers.size()),
                 .experts = layers[0]->count(),
                 .top_k = top_k,
                 .has_low = out->source_->has_low(),
                 .model = {},
                 .router_hash = {}};
  for (const auto& experts : layers)
    for (LinearStack stack : stacks_of(*experts))
      for (auto& matrix : stack->matrices()) matrix->stream();
  out->routers_ = std::make_shared<StackedRouters>(std::vector<StackedRouters::Layer>());
  out->needs_ = [](const OffloadWork&) { return MemoryPlan(); };
  out->start({});
  return out;
}

Offload::~Offload() = default;

void Offload::start(const OffloadWork& work) {
  check(!store_, "the experts' store runs already");
  MemoryPlan plan = needs_(work);
  // Code and threads come into memory when they are first used: before what is resident is counted.
  if (warm_) warm_();
#if defined(__GLIBC__)
  ::malloc_trim(0);
#endif
  const bool low = policy_->uses_low();
  plan.budget = options_.memory;
  plan.base = resident_bytes();
  plan.buffers = ExpertStore::overhead(*source_, low);
  plan.slot_high = ExpertStore::slot_stride(*source_, Precision::high);
  plan.slot_low = low ? ExpertStore::slot_stride(*source_, Precision::low) : 0;
  const int64_t all = setup_.layers * setup_.experts, least = policy_->least_high(setup_);
  // Slots lie in pages of 2 MiB.
  const int64_t rounding = (low ? 2 : 1) * (int64_t{2} << 20);
  const int64_t other = plan.base + plan.cache + plan.work + plan.buffers + rounding;
  const double share = low ? 0.8 : 1.0;
  plan.least = other + static_cast<int64_t>(std::ceil(static_cast<double>(least * plan.slot_high) / share));
  const int64_t asked = options_.capacity_high > 0 ? options_.capacity_high : policy_->capacity();
  if (asked > 0 || options_.memory == 0) {
    check(asked == 0 || asked >= least, "the high-precision cache holds {} experts, a token needs {}", asked, least);
    plan.capacity_high = asked > 0 ? asked : all;
    plan.capacity_low = low ? (asked > 0 ? options_.capacity_low : all) : 0;
    plan.least = other + plan.experts();
    check(
        options_.memory == 0 || plan.least <= options_.memory,
        "a memory of {} bytes is too small for {} experts in full and {} in low precision: the smallest that works is "
        "{} bytes ({})",
        options_.memory, plan.capacity_high, plan.capacity_low, plan.least, mib(plan.least));
  } else {
    const int64_t left = options_.memory - other;
    plan.capacity_high = left <= 0 ? 0 : static_cast<int64_t>(share * static_cast<double>(left)) / plan.slot_high;
    check(
        plan.capacity_high >= least,
        "a memory of {} bytes is too small: the high-precision cache holds {} experts, a token needs {}; the smallest "
        "that works is {} bytes ({}): {} for the program and weights that stay, {} for keys and values, {} to work in, "
        "{} to read into, {} for experts",
        options_.memory, std::max<int64_t>(0, plan.capacity_high), least, plan.least, mib(plan.least), mib(plan.base),
        mib(plan.cache), mib(plan.work), mib(plan.buffers + rounding), mib(plan.least - other));
    if (low) plan.capacity_low = static_cast<int64_t>((1.0 - share) * static_cast<double>(left)) / plan.slot_low;
  }
  plan.capacity_high = std::min(plan.capacity_high, all);
  plan.capacity_low = std::min(plan.capacity_low, all);
  plan_ = plan;
  StoreOptions store;
  store.capacity_high = plan.capacity_high;
  store.capacity_low = plan.capacity_low;
  store.sync = options_.sync;
  store.read = options_.read;
  store_ = std::make_unique<ExpertStore>(source_, policy_, setup_, store);
}

ExpertStore& Offload::store() const {
  check(store_ != nullptr, "the experts' store has not been started");
  return *store_;
}

nlohmann::ordered_json Offload::report() const {
  nlohmann::ordered_json out = stats().json();
  if (mark_) out["decode"] = stats().since(*mark_).json();
  out["policy"] = policy_->settings();
  out["memory"] = plan_.json();
  out["memory"]["peak_resident"] = peak_resident_bytes();
  return out;
}

std::string Offload::summary() const {
  std::string out = stats().summary();
  out += fmt::format("\nmemory: {} at most", mib(peak_resident_bytes()));
  if (plan_.budget > 0) out += fmt::format(" of {} allowed", mib(plan_.budget));
  out += fmt::format("; {} of {} experts fit", plan_.capacity_high, setup_.layers * setup_.experts);
  if (plan_.slot_low > 0) out += fmt::format(", and {} in low precision", plan_.capacity_low);
  return out;
}

// ---- Computing ----

namespace {

std::shared_ptr<const LinearImpl::Place> place_of(const SlotMatrix& m, const std::byte* slot) {
  auto place = std::make_shared<LinearImpl::Place>();
  const std::byte* data = slot + m.offset;
  if (m.packed) {
    place->packed = std::make_shared<const PackedMatrix>(m.format, m.rows, m.cols, data);
    return place;
  }
  TensorView view;
  view.name = "expert";
  view.format = m.format;
  view.shape = {m.rows, m.cols};
  view.data = {data, static_cast<size_t>(m.rows * row_bytes(m.format, m.cols))};
  if (is_block(m.format))
    place->blocks = std::make_shared<const TensorView>(std::move(view));
  else
    place->weight = as_tensor(view);
  return place;
}

}  // namespace

OffloadedExperts::OffloadedExperts(std::shared_ptr<GatedExperts> inner, std::shared_ptr<Offload> offload, int64_t layer,
                                   bool silu)
    : inner_(std::move(inner)), offload_(std::move(offload)), layer_(layer) {
  // Plain numbers of one tensor each are a stacked tensor when they are in memory, which runs in another way than
  // matrices one by one.
  fused_ = silu;
  for (LinearStack stack : stacks_of(*inner_)) {
    const TensorView* first = stack->matrices().at(0)->mapped();
    fused_ = fused_ && !stack->bias.defined();
    for (auto& matrix : stack->matrices())
      fused_ = fused_ && matrix->mapped() != nullptr && !is_block(matrix->mapped()->format) &&
               matrix->mapped()->name == first->name;
  }
}

Tensor OffloadedExperts::forward(const Tensor&, const std::vector<int64_t>&) {
  fail("experts on disk follow a sequence: they run as part of a model's pass only");
}

Tensor OffloadedExperts::mix_in(const Tensor& x, const Dispatch& d, const Pass& pass) {
  check(may_shorten({x, d.gates}), "experts on disk compute no gradients");
  if (offload_->warming_) return torch::zeros_like(x);
  const int64_t rows = x.size(0), tokens = pass.batch > 0 ? rows / pass.batch : rows;
  const int64_t past = pass.cache != nullptr ? pass.cache->length() : 0;
  ExpertStore& store = offload_->store();
  if (layer_ == 0 && past == 0 && pass.round == 0) store.begin_sequence();
  const Demand demand = demand_of(d, rows, layer_, past + tokens);
  std::vector<int64_t> begin(d.counts.size() + 1, 0);
  for (size_t e = 0; e < d.counts.size(); ++e) begin[e + 1] = begin[e] + d.counts[e];
  const int64_t pairs = begin.back();
  if (pairs == 0) return torch::zeros_like(x);

  Tensor y;  // of all pairs
  std::vector<SwigluMatrices> plain(fused_ ? d.counts.size() : 0);
  LookAheadFrom look(*offload_->routers_, x);
  const auto stacks = stacks_of(*inner_);
  // Experts that compute in one way: all fused, or none.
  const auto compute_alike = [&](std::vector<ReadyExpert> all, bool fused) {
    if (all.empty()) return;
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.expert < b.expert; });
    Dispatch part;
    part.counts.assign(d.counts.size(), 0);
    std::vector<Tensor> at;
    int64_t count = 0;
    for (const ReadyExpert& r : all) {
      const auto e = static_cast<size_t>(r.expert);
      part.counts[e] = d.counts[e];
      count += d.counts[e];
      at.push_back(d.tokens.narrow(0, begin[e], d.counts[e]));
      for (int which = 0; which < 3; ++which) {
        LinearStack stack = stacks[static_cast<size_t>(which)];
        auto place = place_of(offload_->source_->matrix({layer_, r.expert, r.precision}, which), r.memory);
        if (fused) (which == 0 ? plain[e].gate : which == 1 ? plain[e].up : plain[e].down) = place->weight;
        stack->matrices()[e]->put(std::move(place));
      }
    }
    const bool whole = count == pairs;
    part.tokens = whole ? d.tokens : torch::cat(at);
    part.gates = d.gates;
    auto out = fused ? swiglu_outputs(x, part.tokens, d.gates, part.counts, d.counts, plain) : inner_->outputs(x, part);
    if (fused_) out = out.to(x.scalar_type());
    for (const ReadyExpert& r : all)
      for (LinearStack stack : stacks) stack->matrices()[static_cast<size_t>(r.expert)]->put(nullptr);
    if (whole) {
      y = out;
      return;
    }
    if (!y.defined()) y = torch::empty({pairs, out.size(1)}, out.options());
    int64_t from = 0;
    for (const ReadyExpert& r : all) {
      const auto e = static_cast<size_t>(r.expert);
      y.narrow(0, begin[e], d.counts[e]).copy_(out.narrow(0, from, d.counts[e]));
      from += d.counts[e];
    }
  };
  last_ = store.run(demand, &look, [&](std::span<const ReadyExpert> ready) {
    std::vector<ReadyExpert> plain_ones, others;
    for (const ReadyExpert& r : ready) {
      const bool blocks = is_block(offload_->source_->matrix({layer_, r.expert, r.precision}, 0).format);
      (fused_ && !blocks ? plain_ones : others).push_back(r);
    }
    compute_alike(std::move(plain_ones), true);
    compute_alike(std::move(others), false);
  });
  const bool skips = std::any_of(last_.begin(), last_.end(), [](const Use& u) { return u.used == Precision::skip; });
  if (!skips) return fused_ ? swiglu_sum(x, y, d.tokens, d.gates, d.counts) : d.reduce(y, rows).to(x.scalar_type());

  // Pairs of experts that were left out go.
  Dispatch kept = d;
  std::vector<bool> out_of(d.counts.size(), false);
  for (const Use& u : last_) out_of[static_cast<size_t>(u.expert)] = u.used == Precision::skip;
  std::vector<Tensor> where;
  for (size_t e = 0; e < d.counts.size(); ++e) {
    if (out_of[e]) kept.counts[e] = 0;
    if (kept.counts[e] > 0) where.push_back(torch::arange(begin[e], begin[e + 1], torch::kInt64));
  }
  if (where.empty()) return torch::zeros_like(x);
  const auto index = torch::cat(where);
  kept.tokens = d.tokens.index_select(0, index);
  kept.gates = d.gates.index_select(0, index);
  if (offload_->options_.skip_renormalize) {
    const auto sum = [&](const Dispatch& of) {
      return torch::zeros({rows}, torch::kFloat32).index_add(0, of.tokens, of.gates.to(torch::kFloat32));
    };
    kept.gates = kept.gates * (sum(d) / sum(kept)).index_select(0, kept.tokens);
  }
  return kept.reduce(y.index_select(0, index), rows).to(x.scalar_type());
}

}  // namespace moiety
