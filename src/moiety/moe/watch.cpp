#include "moiety/moe/watch.h"

#include <torch/torch.h>

namespace moiety {
namespace {

class Watched : public Experts {
 public:
  Watched(std::shared_ptr<Experts> experts, std::shared_ptr<const std::function<void(const ExpertCall&)>> see)
      : experts_(std::move(experts)), see_(std::move(see)) {}
  int64_t count() const override { return experts_->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override {
    return experts_->forward(x, counts);
  }
  torch::Tensor mix_in(const torch::Tensor& x, const Dispatch& dispatch, const Pass& pass) override {
    const auto in = dispatch.gather(x), out = experts_->forward(in, dispatch.counts);
    ExpertCall call{pass.at("ffn"), dispatch, in, out, {}, dynamic_cast<GatedExperts*>(experts_.get())};
    if (pass.mask.defined()) call.real = pass.mask.reshape({-1}).index_select(0, dispatch.tokens);
    (*see_)(call);
    return dispatch.reduce(out, x.size(0));
  }

 private:
  std::shared_ptr<Experts> experts_;
  std::shared_ptr<const std::function<void(const ExpertCall&)>> see_;
};

}  // namespace

WatchExperts::WatchExperts(torch::nn::Module& model, std::function<void(const ExpertCall&)> see) {
  const auto shared = std::make_shared<const std::function<void(const ExpertCall&)>>(std::move(see));
  for (const auto& module : model.modules(/*include_self=*/false)) {
    auto mixture = std::dynamic_pointer_cast<Mixture>(module);
    if (!mixture) continue;
    held_.emplace_back(mixture, mixture->experts);
    mixture->experts = std::make_shared<Watched>(mixture->experts, shared);
  }
}

WatchExperts::~WatchExperts() {
  for (auto& [mixture, experts] : held_) mixture->experts = experts;
}

}  // namespace moiety
