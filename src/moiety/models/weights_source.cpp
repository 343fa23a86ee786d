#include "moiety/models/weights_source.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/io/peft.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

torch::Dtype compute_dtype(const std::string& name, const Checkpoint* checkpoint) {
  if (name == "f32") return torch::kFloat32;
  if (name == "bf16") return torch::kBFloat16;
  check(name == "auto", "unknown dtype '{}'; known are auto, f32, bf16", name);
  if (!checkpoint) return torch::kFloat32;
  // As stored: bf16 when most bytes are bf16. Everything else, half included, computes in f32.
  int64_t bf16 = 0, all = 0;
  for (const TensorInfo& t : checkpoint->tensors()) {
    all += t.bytes();
    if (t.format == Format::BF16) bf16 += t.bytes();
  }
  return 2 * bf16 > all ? torch::kBFloat16 : torch::kFloat32;
}

}  // namespace

namespace {

thread_local int merging = 0;  // 1: parts are added to their matrices, -1: taken out

}  // namespace

StoreMerged::StoreMerged(bool backwards) {
  check(merging == 0, "two merges at once");
  merging = backwards ? -1 : 1;
}

StoreMerged::~StoreMerged() {
  merging = 0;
}

torch::Tensor stored_matrix(const Linear& matrix) {
  auto w = matrix->weight.defined() ? matrix->weight : matrix->dense(torch::kFloat32);
  if (merging != 0 && !matrix->attached().empty()) {
    w = w.to(torch::kFloat32);
    for (const auto& [beside, place] : matrix->attached())
      w = merging > 0 ? beside->merged(w, place) : beside->unmerged(w, place);
  }
  return w;
}

torch::Tensor stored_matrix(const LinearStack& stack, int64_t expert) {
  auto w = stack->weight.defined() ? stack->weight.select(0, expert) : stack->dense(expert, torch::kFloat32);
  return merging != 0 && stack->beside() ? w.to(torch::kFloat32) + merging * stack->beside()->delta(expert) : w;
}

torch::Tensor stored_matrices(const LinearStack& stack) {
  if (stack->weight.defined() && !(merging != 0 && stack->beside())) return stack->weight;
  std::vector<torch::Tensor> all;
  for (int64_t e = 0; e < stack->count(); ++e) all.push_back(stored_matrix(stack, e));
  return torch::stack(all);
}

torch::Tensor stored_bias(const Linear& matrix) {
  auto b = matrix->bias;
  if (merging > 0)
    for (const auto& [beside, place] : matrix->attached()) b = beside->merged_bias(b, place);
  return b;
}

WeightsSource::WeightsSource(const Checkpoint& checkpoint, const LoadOptions& options)
    : checkpoint_(&checkpoint), options_(options), dtype_(compute_dtype(options.dtype, &checkpoint)) {
  for (const TensorInfo& t : checkpoint.tensors()) {
    const auto at = t.name.find("embed_tokens.weight");
    if (at != std::string::npos) {
      prefix_ = t.name.substr(0, at);
      return;
    }
  }
  fail("{}: no tensor named '...embed_tokens.weight': this does not look like a decoder", checkpoint.path().string());
}

WeightsSource::WeightsSource(const Checkpoint& checkpoint, const LoadOptions& options, std::string prefix)
    : checkpoint_(&checkpoint),
      options_(options),
      prefix_(std::move(prefix)),
      dtype_(compute_dtype(options.dtype, &checkpoint)) {}

WeightsSource::WeightsSource(double std, const LoadOptions& options)
    : options_(options), std_(std), dtype_(compute_dtype(options.dtype, nullptr)) {}

std::string WeightsSource::full(const std::string& name) const {
  if (name.rfind("lm_head", 0) != 0) return prefix_ + name;
  // The head stands beside the inner model, not inside it: "model." falls away, "language_model.model." leaves its
  // front.
  std::string outer = prefix_;
  if (outer.size() >= 6 && outer.compare(outer.size() - 6, 6, "model.") == 0) outer.resize(outer.size() - 6);
  for (const std::string& candidate : {outer + name, name, prefix_ + name})
    if (checkpoint_->has(candidate)) return candidate;
  // transformers 5 moved the head out of "model.language_model.".
  return name;
}

bool WeightsSource::has(const std::string& name, bool fallback) const {
  return random() ? fallback : checkpoint_->has(full(name));
}

std::string WeightsSource::pick(const std::vector<std::string>& names) const {
  if (random()) return names.front();
  for (const std::string& name : names)
    if (checkpoint_->has(full(name))) return name;
  fail("{}: the model needs tensor '{}', which is not there", checkpoint_->path().string(), fmt::join(names, "' or '"));
}

TensorView WeightsSource::view(const std::string& name, const std::vector<int64_t>& shape) {
  const std::string key = full(name);
  check(checkpoint_->has(key), "{}: the model needs tensor '{}' {}, which is not there", checkpoint_->path().string(),
        key, shape);
  TensorView v = checkpoint_->get(key);
  check(v.shape == shape, "{}: tensor '{}' has shape {}, the config asks for {}", checkpoint_->path().string(), key,
        v.shape, shape);
  check(v.format != Format::F8_E4M3 && v.format != Format::F8_E5M2,
        "{}: tensor '{}' is stored in 8-bit floats with separate scales, which is not supported; convert the "
        "checkpoint to bfloat16 first",
        checkpoint_->path().string(), key);
  used_.insert(key);
  return v;
}

torch::Dtype WeightsSource::parameter_dtype() const {
  return trainable() ? torch::kFloat32 : dtype_;
}

torch::Tensor WeightsSource::values(const TensorView& v) const {
  return (is_block(v.format) ? dequantize(v) : as_tensor(v)).to(options_.device, parameter_dtype());
}

torch::Tensor WeightsSource::bias_values(const TensorView& v) const {
  return (is_block(v.format) ? dequantize(v) : as_tensor(v))
      .to(options_.device, learns_biases() ? torch::kFloat32 : parameter_dtype());
}

torch::Tensor WeightsSource::bias_parameter(const torch::Tensor& t) const {
  return learns_biases() ? leaf(t) : parameter(t);
}

torch::Tensor WeightsSource::parameter(const torch::Tensor& t) const {
  return trainable() ? leaf(t) : t;
}

torch::Tensor WeightsSource::leaf(const torch::Tensor& t) const {
  return t.detach().to(torch::kFloat32).clone(torch::MemoryFormat::Contiguous).requires_grad_(true);
}

torch::Tensor WeightsSource::random_matrix(std::vector<int64_t> shape) {
  if (options_.device.is_meta())  // a model without values, to look at
    return parameter(torch::empty(shape, torch::TensorOptions().dtype(parameter_dtype()).device(options_.device)));
  return parameter((torch::randn(shape) * std_).to(options_.device, parameter_dtype()));
}

torch::Tensor WeightsSource::fresh(const std::vector<int64_t>& shape, double fill) const {
  return parameter(torch::full(shape, fill, torch::TensorOptions().dtype(parameter_dtype()).device(options_.device)));
}

torch::Tensor WeightsSource::tensor(const std::string& name, std::vector<int64_t> shape, double fill) {
  auto t = random() ? fresh(shape, fill) : torch::Tensor();
  if (is_bias(name))
    t = bias_parameter(t.defined() ? t : bias_values(view(name, shape)));
  else if (!t.defined())
    t = floats(view(name, shape));
  store(name, [t] { return t; });
  return t;
}

torch::Tensor WeightsSource::tensor(const std::string& name, std::vector<int64_t> shape,
                                    const std::function<void(torch::Tensor)>& init, bool optional, bool beside) {
  const bool learns = (beside ? options_.trainable : trainable()) || (is_bias(name) && learns_biases());
  torch::Tensor t;
  if (has(name, false)) {
    const auto v = view(name, shape);
    t = (is_block(v.format) ? dequantize(v) : as_tensor(v)).to(options_.device, learns ? torch::kFloat32 : dtype_);
  } else {
    check(random() || may_create || optional, "{}: the model needs tensor '{}' {}, which is not there",
          random() ? "" : checkpoint_->path().string(), full(name), shape);
    torch::NoGradGuard frozen;
    t = torch::empty(shape, torch::TensorOptions().dtype(torch::kFloat32).device(options_.device));
    init(t);
    t = t.to(parameter_dtype());
  }
  if (learns) t = leaf(t);
  store(name, [t] { return t; });
  return t;
}

void WeightsSource::store(const std::string& name, Value value, int64_t dim, int64_t begin) {
  const bool head = name.rfind("lm_head", 0) == 0;
  auto& parts = stored_[!random() ? full(name) : (head ? "" : inner) + (rename ? rename(name) : name)];
  parts.dim = dim;
  parts.values[begin] = std::move(value);
}

std::vector<StoredTensor> WeightsSource::stored() const {
  std::vector<StoredTensor> out;
  for (const auto& [name, parts] : stored_) {
    if (parts.values.size() == 1) {
      out.push_back({name, parts.values.begin()->second});
      continue;
    }
    out.push_back({name, [parts = parts] {
                     std::vector<torch::Tensor> pieces;
                     for (const auto& [begin, value] : parts.values) pieces.push_back(value());
                     return torch::cat(pieces, parts.dim);
                   }});
  }
  return out;
}

Linear WeightsSource::matrix(const TensorView& v, torch::Tensor bias) {
  if (!is_block(v.format)) return Linear(floats(v), bias);
  Linear linear(v, bias);
  // Who asks for f32 wants the model's own numbers, not the fastest ones.
  linear->exact = options_.dtype == "f32";
  return linear;
}

Linear WeightsSource::made_matrix(const TensorInfo& info, std::function<TensorView()> make) {
  Linear linear(info, std::move(make));
  linear->exact = options_.dtype == "f32";
  return linear;
}

Linear WeightsSource::expert_matrix(const TensorView& v) {
  return leave_experts() && !is_block(v.format) ? Linear(v) : matrix(v);
}

Linear WeightsSource::linear(const std::string& name, int64_t in, int64_t out, bool bias) {
  return rows(name, in, out, 0, out, bias);
}

Linear WeightsSource::rows(const std::string& name, int64_t in, int64_t total, int64_t begin, int64_t out, bool bias) {
  torch::Tensor b;
  if (has(name + ".bias", bias)) {
    b = bias_parameter(random() ? fresh({out}, 0.0) : bias_values(view(name + ".bias", {total})).narrow(0, begin, out));
  }
  Linear linear{nullptr};
  if (random()) {
    linear = Linear(random_matrix({out, in}), b);
  } else {
    TensorView v = view(name + ".weight", {total, in});
    if (out != total) v = slice_rows(v, begin, begin + out);
    linear = matrix(v, b);
  }
  store(
      name + ".weight", [linear] { return stored_matrix(linear); }, 0, begin);
  if (b.defined())
    store(
        name + ".bias", [linear] { return stored_bias(linear); }, 0, begin);
  return linear;
}

void WeightsSource::check_all_used(const std::function<bool(const std::string&)>& ignored) const {
  if (random()) return;
  std::vector<std::string> left;
  for (const TensorInfo& t : checkpoint_->tensors())
    if (!used_.count(t.name) && !ignored(t.name)) left.push_back(t.name);
  if (left.empty()) return;
  const size_t count = left.size();
  left.resize(std::min<size_t>(count, 5));
  fail("{}: {} tensor(s) have no place in a model of this config, among them {}; running without them would be wrong",
       checkpoint_->path().string(), count, fmt::join(left, ", "));
}

}  // namespace moiety
