#include "moiety/compress/compeft_model.h"

#include <torch/torch.h>

#include <algorithm>
#include <cstring>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"
#include "moiety/io/name_patterns.h"
#include "moiety/io/overlay.h"
#include "moiety/io/safetensors.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

constexpr const char *kAdapterConfig = "adapter_config.json", *kAdapterWeights = "adapter_model.safetensors";
constexpr int64_t kEntriesOfByte = 4096;  // that a file may claim
constexpr const char* kPeftFront = "base_model.model.";
constexpr const char *kEmbedding = "model.embed_tokens.weight", *kHead = "lm_head.weight";

// What --exclude means, whatever PEFT puts in front of a name.
bool means(const NamePatterns& patterns, const std::string& name) {
  return patterns.match(name.rfind(kPeftFront, 0) == 0 ? name.substr(std::strlen(kPeftFront)) : name);
}

// Whether it stores its head and its embedding, which are one.
bool tied(const Checkpoint& c) {
  return c.config().is_object() && c.config().value("tie_word_embeddings", json()) == true && c.has(kEmbedding) &&
         c.has(kHead);
}

void check_plain(const Checkpoint& c) {
  check(c.gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        c.path().string());
}

// The tensors of a model that differences are taken of, mapped; integers and what `exclude` names are not among them.
ExpertTensors tensors_of(const Checkpoint& c, const NamePatterns& exclude) {
  check_plain(c);
  ExpertTensors out;
  for (const TensorInfo& t : c.tensors()) {
    if (means(exclude, t.name) || (tied(c) && t.name == kHead)) continue;
    check(!is_block(t.format),
          "{}: '{}' is stored in blocks: a difference is taken of plain numbers (`moiety convert`)", c.path().string(),
          shown(t.name));
    auto value = as_tensor(c.get(t.name));
    if (value.is_floating_point()) out[t.name] = std::move(value);
  }
  return out;
}

void check_integers(const Checkpoint& expert, const Checkpoint& base) {
  for (const TensorInfo& t : expert.tensors()) {
    if (is_block(t.format) || !base.has(t.name)) continue;
    const TensorView own = expert.get(t.name), other = base.get(t.name);
    if (as_tensor(own).is_floating_point()) continue;
    check(own.format == other.format &&
              std::equal(own.data.begin(), own.data.end(), other.data.begin(), other.data.end()),
          "'{}' holds integers, and other ones in {} than in {}: only fractions are compressed", shown(t.name),
          expert.path().string(), base.path().string());
  }
}

struct Expert {
  ExpertTensors tensors, base;
  TaskVectorHeader header;
  std::vector<TensorView> others;
  int64_t bytes = 0;
};

CompeftReport compress(const Expert& expert, const CompeftOptions& o, const fs::path& out) {
  check(!expert.tensors.empty(), "the expert has no tensors to compress");
  const auto tau = task_vector(expert.tensors, expert.header.kind, expert.base);
  const auto compressed = compeft_compress(tau, o.config);
  TaskVectorHeader header = expert.header;
  header.entries = task_vector_entries(expert.tensors);
  header.density = o.config.density;
  header.alpha = o.config.alpha;
  header.form = o.masks ? "masks" : "golomb";
  CompeftReport r;
  r.kind = header.kind;
  r.form = compressed.form == "golomb" ? header.form : compressed.form;
  r.d = compressed.d;
  r.kept = compressed.form == "dense" ? compressed.d : compressed.signs.kept();
  r.scale = compressed.scale;
  r.bytes_before = expert.bytes;
  r.entropy_bits = ternary_entropy_bits(r.kept, r.d);
  if (!o.dry_run) r.bytes = save_task_vector(out, compressed, std::move(header), expert.others);
  return r;
}

}  // namespace

CompeftReport compress_expert(const Checkpoint& expert, const Checkpoint& base, const std::string& base_name,
                              const CompeftOptions& options, const fs::path& out) {
  const NamePatterns exclude(options.exclude, "--exclude");
  Expert e;
  e.tensors = tensors_of(expert, exclude);
  e.base = tensors_of(base, exclude);
  check_integers(expert, base);
  e.header.kind = "full";
  e.header.notes["base"] = base_name;
  if (tied(expert) || tied(base)) e.header.aliases[kHead] = kEmbedding;
  for (const TensorInfo& t : expert.tensors()) {
    if (means(exclude, t.name)) {
      e.others.push_back(expert.get(t.name));
      e.others.back().name = t.name;
    }
    if (e.tensors.count(t.name) != 0) e.bytes += t.bytes();
  }
  return compress(e, options, out);
}

CompeftReport compress_adapter(const fs::path& folder, const CompeftOptions& options, const fs::path& out) {
  const NamePatterns exclude(options.exclude, "--exclude");
  const std::string text = read_text(folder / kAdapterConfig), where = (folder / kAdapterConfig).string();
  const json config = parse_json(text, where);
  check(config.is_object(), "{}: a JSON object was expected", where);
  const std::string type = reading_json(where, [&] { return config.value("peft_type", std::string("LORA")); });
  check(type == "LORA" || type == "IA3", "{}: the adapter is of the type {}; LORA and IA3 are compressed", where,
        shown(type));
  check(fs::exists(folder / kAdapterWeights), "{}: no {} in it", folder.string(), kAdapterWeights);
  const auto file = SafetensorsFile::open(folder / kAdapterWeights);
  Expert e;
  e.header.kind = type == "IA3" ? "ia3" : "lora";
  e.header.notes["adapter_config"] = text;
  for (const TensorInfo& t : file->tensors()) {
    TensorView v = file->get(t.name);
    v.name = t.name;
    if (means(exclude, t.name)) {
      e.others.push_back(std::move(v));
      continue;
    }
    e.tensors[t.name] = as_tensor(v);
    check(e.tensors[t.name].is_floating_point(), "{}: '{}' holds integers", folder.string(), shown(t.name));
    e.bytes += t.bytes();
  }
  return compress(e, options, out);
}

namespace {

class CompressedDelta : public ExpertDelta {
 public:
  explicit CompressedDelta(std::shared_ptr<const TaskVectorFile> file)
      : file_(std::move(file)), vector_(load_task_vector(*file_)) {
    for (const auto& e : file_->header().entries) entries_[e.name] = &e;
  }
  Tensor get(const std::string& name) const override {
    const auto it = entries_.find(name);
    if (it == entries_.end()) return {};
    return vector_.expand(it->second->begin, it->second->end).view(it->second->shape);
  }
  std::vector<TensorView> others() const override {
    std::vector<TensorView> out;
    for (const TensorInfo& t : file_->others()) {
      out.push_back(file_->other(t.name));
      out.back().name = t.name;
    }
    return out;
  }

 private:
  std::shared_ptr<const TaskVectorFile> file_;
  CompressedVector vector_;
  std::map<std::string, const TaskVectorEntry*> entries_;
};

class ModelDelta : public ExpertDelta {
 public:
  ModelDelta(std::shared_ptr<const Checkpoint> expert, std::shared_ptr<const Checkpoint> base, double density,
             const std::vector<std::string>& exclude)
      : expert_(std::move(expert)), base_(std::move(base)) {
    const NamePatterns left_out(exclude, "--exclude");
    tensors_ = tensors_of(*expert_, left_out);
    of_base_ = tensors_of(*base_, left_out);
    if (density < 1.0) {
      const auto tau = task_vector(tensors_, "full", of_base_);
      entries_ = task_vector_entries(tensors_);
      kept_ = compeft_compress(tau, {density, 1.0, "prune"});
      return;
    }
    for (const auto& [name, t] : of_base_)
      check(tensors_.count(name) != 0 && tensors_.at(name).sizes() == t.sizes(),
            "{}: '{}' is not there, or of another shape than in {}", expert_->path().string(), shown(name),
            base_->path().string());
  }
  Tensor get(const std::string& name) const override {
    const auto it = tensors_.find(name);
    if (it == tensors_.end() || of_base_.count(name) == 0) return {};
    for (const auto& e : entries_)
      if (e.name == name) return kept_.expand(e.begin, e.end).view(e.shape);
    const torch::NoGradGuard frozen;
    return it->second.to(torch::kFloat32) - of_base_.at(name).to(torch::kFloat32);
  }

 private:
  std::shared_ptr<const Checkpoint> expert_, base_;
  ExpertTensors tensors_, of_base_;
  std::vector<TaskVectorEntry> entries_;  // when only some differences count
  CompressedVector kept_;
};

class DroppedDelta : public ExpertDelta {
 public:
  DroppedDelta(std::shared_ptr<const ExpertDelta> delta, double drop, uint64_t seed)
      : delta_(std::move(delta)), drop_(drop), seed_(seed) {}
  Tensor get(const std::string& name) const override {
    const Tensor whole = delta_->get(name);
    if (!whole.defined() || drop_ == 0.0) return whole;
    Tensor out = whole.clone(at::MemoryFormat::Contiguous);
    RandomStream random(seed_, "dare." + name);
    const auto scale = static_cast<float>(1.0 / (1.0 - drop_));
    float* const entries = out.data_ptr<float>();
    for (int64_t i = 0; i < out.numel(); ++i) entries[i] = random.chance(drop_) ? 0.f : entries[i] * scale;
    return out;
  }
  std::vector<TensorView> others() const override { return delta_->others(); }

 private:
  std::shared_ptr<const ExpertDelta> delta_;
  double drop_;
  uint64_t seed_;
};

}  // namespace

std::shared_ptr<const ExpertDelta> dropped_delta(std::shared_ptr<const ExpertDelta> delta, double drop, uint64_t seed) {
  check(drop >= 0.0 && drop < 1.0, "a share of {} cannot be dropped: it is at least 0 and below 1", drop);
  return std::make_shared<DroppedDelta>(std::move(delta), drop, seed);
}

std::shared_ptr<const ExpertDelta> compressed_delta(std::shared_ptr<const TaskVectorFile> file,
                                                    const Checkpoint& base) {
  const TaskVectorHeader& h = file->header();
  check(h.kind == "full", "{} holds an adapter ({}), and {} is a model: adapters are merged with adapters",
        file->where(), h.kind, base.path().string());
  std::vector<std::string> off;
  for (const auto& e : h.entries)
    if (!base.has(e.name) || base.get(e.name).shape != e.shape) off.push_back(fmt::format("'{}'", shown(e.name)));
  const size_t all = off.size();
  off.resize(std::min<size_t>(5, all));
  check(all == 0, "{} was made for another base: {} of its tensors are not in {} or of another shape: {}",
        file->where(), all, base.path().string(), list_of(off, "and"));
  return std::make_shared<CompressedDelta>(std::move(file));
}

std::shared_ptr<const ExpertDelta> model_delta(std::shared_ptr<const Checkpoint> expert,
                                               std::shared_ptr<const Checkpoint> base, double density,
                                               const std::vector<std::string>& exclude) {
  return std::make_shared<ModelDelta>(std::move(expert), std::move(base), density, exclude);
}

namespace {

// All that the experts add to one tensor, [N, elements]; undefined when none adds anything.
Tensor stacked(const std::vector<std::shared_ptr<const ExpertDelta>>& deltas, const std::string& name,
               int64_t elements) {
  std::vector<Tensor> rows;
  bool any = false;
  for (const auto& d : deltas) {
    const auto t = d->get(name);
    any = any || t.defined();
    rows.push_back(t.defined() ? t.flatten() : torch::zeros({elements}));
  }
  return any ? torch::stack(rows) : Tensor();
}

}  // namespace

std::shared_ptr<const Checkpoint> merged_experts(std::shared_ptr<const Checkpoint> base,
                                                 std::vector<std::shared_ptr<const ExpertDelta>> deltas,
                                                 const TaskMergeConfig& config, double lambda) {
  const torch::NoGradGuard frozen;
  check_plain(*base);
  check(!deltas.empty(), "there is no expert to merge");
  // Tied tensors are stored as one, or follow the one that is in the vector.
  const bool twice = tied(*base);
  std::vector<TensorView> heads;
  std::set<std::string> replaced;
  for (const auto& d : deltas)
    for (const TensorView& v : d->others()) heads.push_back(v);
  if (deltas.size() > 1 && !heads.empty()) {
    log::warn("'{}' and other heads are each expert's own: the merged model keeps the base's", shown(heads[0].name));
    heads.clear();
  }
  for (const TensorView& v : heads) replaced.insert(v.name);
  std::vector<TensorInfo> changed;
  for (const TensorInfo& t : base->tensors()) {
    if ((twice && t.name == kHead) || replaced.count(t.name) != 0) continue;
    if (is_block(t.format) || !as_tensor(base->get(t.name)).is_floating_point()) continue;
    changed.push_back(t);
  }
  int64_t balance = 0;
  if (config.method == "ties")
    for (const TensorInfo& t : changed)
      if (const auto rows = stacked(deltas, t.name, t.elements()); rows.defined()) balance += ties_balance(rows);
  std::vector<OverlayTensor> tensors;
  for (const TensorInfo& t : changed) {
    OverlayTensor one;
    one.info = t;
    one.get = [base, deltas, config, lambda, balance, info = t] {
      const torch::NoGradGuard frozen;
      const TensorView own = base->get(info.name);
      const auto rows = stacked(deltas, info.name, info.elements());
      if (!rows.defined()) return own;
      const auto added = merge_task_vectors(rows, config, balance).view(info.shape);
      return view_of(as_tensor(own).to(torch::kFloat32) + lambda * added, info.format);
    };
    if (twice && t.name == kEmbedding) {
      OverlayTensor head = one;
      head.info.name = kHead;
      tensors.push_back(std::move(head));
    }
    tensors.push_back(std::move(one));
  }
  for (const TensorView& v : heads) {
    OverlayTensor head;
    head.info = v;
    head.get = [v] { return v; };
    tensors.push_back(std::move(head));
  }
  json settings = base->config();
  return overlay(std::move(base), std::move(settings), std::move(tensors));
}

namespace {

// Settings of an adapter that decide what its tensors mean.
json settings_of(const TaskVectorFile& file) {
  const auto& notes = file.header().notes;
  const auto it = notes.find("adapter_config");
  check(it != notes.end(), "{}: it holds no adapter_config", file.where());
  json config = parse_json(it->second, file.where() + ": adapter_config");
  check(config.is_object(), "{}: its adapter_config is no JSON object", file.where());
  return config;
}

void check_same_adapter(const TaskVectorFile& a, const TaskVectorFile& b) {
  check(a.header().kind == b.header().kind, "{} is of the kind {}, and {} of the kind {}", a.where(), a.header().kind,
        b.where(), b.header().kind);
  const auto &x = a.header().entries, &y = b.header().entries;
  check(x.size() == y.size(), "{} has {} tensors, and {} has {}", a.where(), x.size(), b.where(), y.size());
  for (size_t i = 0; i < x.size(); ++i)
    check(x[i].name == y[i].name && x[i].shape == y[i].shape, "'{}' of {} is not in {}, or of another shape",
          shown(x[i].name), a.where(), b.where());
  const json one = settings_of(a), other = settings_of(b);
  for (const char* key : {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
    check(one.value(key, json()) == other.value(key, json()), "`{}` differs between {} and {}: {} and {}", key,
          a.where(), b.where(), one.value(key, json()).dump(), other.value(key, json()).dump());
}

}  // namespace

void merge_adapters(const std::vector<std::shared_ptr<const TaskVectorFile>>& files, const TaskMergeConfig& config,
                    double lambda, const std::string& base_name, const fs::path& folder) {
  const torch::NoGradGuard frozen;
  check(!files.empty(), "there is no adapter to merge");
  std::vector<Tensor> rows;
  for (const auto& f : files) {
    check(f->header().kind != "full", "{} holds a model, and adapters are merged with adapters", f->where());
    check_same_adapter(*files[0], *f);
    // No model vouches for the size of an adapter: its file has to.
    check(f->header().d / kEntriesOfByte <= f->bytes(), "{}: {} entries cannot be what a file of {} bytes holds",
          f->where(), f->header().d, f->bytes());
    rows.push_back(load_task_vector(*f).expand());
  }
  const TaskVectorFile& first = *files[0];
  json settings = settings_of(first);
  settings["base_model_name_or_path"] = base_name;
  const auto merged = lambda * merge_task_vectors(torch::stack(rows), config);
  const auto tensors = apply_task_vector(merged, first.header().entries, first.header().kind);
  std::vector<TensorView> views;
  for (const auto& [name, value] : tensors) {
    views.push_back(view_of(value, Format::F32));
    views.back().name = name;
  }
  if (files.size() == 1)
    for (const TensorInfo& t : first.others()) {
      views.push_back(first.other(t.name));
      views.back().name = t.name;
    }
  fs::create_directories(folder);
  SafetensorsWriter writer(folder / kAdapterWeights, std::vector<TensorInfo>(views.begin(), views.end()),
                           {{"format", "pt"}});
  for (const TensorView& v : views) writer.write(v.name, v.data);
  writer.finish();
  write_file(folder / kAdapterConfig, settings.dump(2) + "\n");
}

}  // namespace moiety
