#include "moiety/compress/edgemoe_experts.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/models/decoder.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

// Notes which experts have had a token.
template <class Base>
class Noted : public Base {
 public:
  template <class... Args>
  explicit Noted(std::shared_ptr<std::vector<bool>> used, Args&&... args)
      : Base(std::forward<Args>(args)...), used_(std::move(used)) {}
  torch::Tensor mix(const torch::Tensor& x, const Dispatch& d) override {
    for (size_t e = 0; e < d.counts.size(); ++e)
      if (d.counts[e] > 0) (*used_)[e] = true;
    return Base::mix(x, d);
  }

 private:
  std::shared_ptr<std::vector<bool>> used_;
};

std::vector<float> values_of(const LinearStack& stack, int64_t expert) {
  const auto t = stack->dense(expert, torch::kFloat32).to(torch::kCPU).contiguous();
  return {t.const_data_ptr<float>(), t.const_data_ptr<float>() + t.numel()};
}

}  // namespace

struct EdgeMoeExperts::Layer {
  LinearStack from[3] = {nullptr, nullptr, nullptr};  // gate, up, down as they came
  torch::Tensor to[3];
  std::shared_ptr<std::vector<bool>> used;
};

EdgeMoeExperts::EdgeMoeExperts(std::shared_ptr<CausalModel> model, Int2Scale int2, Accuracy accuracy)
    : model_(std::move(model)), int2_(int2), accuracy_(std::move(accuracy)) {
  auto* decoder = dynamic_cast<Decoder*>(model_.get());
  check(decoder != nullptr, "this is no decoder with expert layers");
  const DecoderConfig& c = decoder->parsed;
  const auto parameters = decoder->parameters();
  const auto options = parameters.empty() ? torch::TensorOptions(torch::kFloat32) : parameters.front().options();
  const auto dtype = decoder->dtype();
  layout_.bf16 = dtype == torch::kBFloat16;
  for (int64_t b = 0; b < decoder->blocks(); ++b) {
    auto* mixture = dynamic_cast<Mixture*>(decoder->layers[static_cast<size_t>(b)]->ffn.get());
    if (!mixture) {
      check(decoder->experts(b) == 0, "block {}: its experts are not those of an ordinary mixture layer", b);
      continue;
    }
    auto* gated = dynamic_cast<GatedExperts*>(mixture->experts.get());
    check(gated != nullptr, "block {}: its experts are no gated feed-forward layers", b);
    auto layer = std::make_unique<Layer>();
    layer->from[0] = gated->gate, layer->from[1] = gated->up, layer->from[2] = gated->down;
    if (layout_.blocks.empty()) {
      layout_.experts = gated->count();
      layout_.hidden = gated->gate->in();
      layout_.width = gated->gate->out();
    }
    check(gated->count() == layout_.experts && gated->gate->in() == layout_.hidden &&
              gated->gate->out() == layout_.width && gated->down->out() == layout_.hidden,
          "block {} has {} experts of {} x {}, the first mixture {} of {} x {}: they have to be alike", b,
          gated->count(), gated->gate->out(), gated->gate->in(), layout_.experts, layout_.width, layout_.hidden);
    layout_.blocks.push_back(b);
    layer->used = std::make_shared<std::vector<bool>>(static_cast<size_t>(layout_.experts));
    LinearStack stacks[3] = {nullptr, nullptr, nullptr};
    for (int p = 0; p < 3; ++p) {
      layer->to[p] = torch::empty({layout_.experts, layer->from[p]->out(), layer->from[p]->in()}, options.dtype(dtype));
      stacks[p] = LinearStack(layer->to[p], layer->from[p]->bias);
    }
    std::shared_ptr<Experts> own;
    if (c.moe.clamped)
      own = std::make_shared<Noted<ClampedExperts>>(layer->used, stacks[0], stacks[1], stacks[2], c.moe.clamp_alpha,
                                                    c.moe.clamp_limit);
    else
      own = std::make_shared<Noted<GatedExperts>>(layer->used, stacks[0], stacks[1], stacks[2], activation(c.act));
    mixture->experts = mixture->replace_module("experts", own);
    layers_.push_back(std::move(layer));
  }
  check(!layout_.blocks.empty(), "the model has no expert layers");
  set_bits(std::vector<int64_t>(static_cast<size_t>(experts()), 32));
}

EdgeMoeExperts::~EdgeMoeExperts() = default;

int64_t EdgeMoeExperts::experts() const {
  return layout_.layers() * layout_.experts;
}

EdgeExpert EdgeMoeExperts::original(int64_t layer, int64_t expert) const {
  const Layer& l = *layers_[static_cast<size_t>(layer)];
  return {values_of(l.from[0], expert), values_of(l.from[1], expert), values_of(l.from[2], expert)};
}

void EdgeMoeExperts::set_bits(const std::vector<int64_t>& bits) {
  check(static_cast<int64_t>(bits.size()) == experts(), "{} widths do not fit {} experts", bits.size(), experts());
  torch::NoGradGuard frozen;
  std::vector<int64_t> changed;
  for (size_t i = 0; i < bits.size(); ++i)
    if (layout_.bits.empty() || layout_.bits[i] != bits[i]) changed.push_back(static_cast<int64_t>(i));
  if (!changed.empty()) measured_ = false;
  const auto one = [&](int64_t i) {
    Layer& l = *layers_[static_cast<size_t>(i / layout_.experts)];
    const int64_t e = i % layout_.experts;
    for (int p = 0; p < 3; ++p) {
      auto w = values_of(l.from[p], e);
      const int64_t columns = l.from[p]->in();
      try {
        round_to_width(w, columns, bits[static_cast<size_t>(i)], int2_);
      } catch (const Error& error) {
        fail("layer {}, expert {}: {}", i / layout_.experts, e, error.what());
      }
      l.to[p].select(0, e).copy_(torch::from_blob(w.data(), {l.from[p]->out(), columns}, torch::kFloat32));
    }
  };
  parallel_for(0, static_cast<int64_t>(changed.size()), 1, [&](int64_t begin, int64_t end) {
    torch::NoGradGuard inside;
    for (int64_t i = begin; i < end; ++i) one(changed[static_cast<size_t>(i)]);
  });
  layout_.bits = bits;
}

double EdgeMoeExperts::accuracy() {
  for (auto& l : layers_) l->used->assign(l->used->size(), false);
  const double a = accuracy_(*model_);
  measured_ = true;
  return a;
}

std::vector<bool> EdgeMoeExperts::unused() {
  if (!measured_) accuracy();
  std::vector<bool> out;
  for (const auto& l : layers_)
    for (const bool used : *l->used) out.push_back(!used);
  return out;
}

}  // namespace moiety
