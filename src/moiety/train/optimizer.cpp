#include "moiety/train/optimizer.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;

struct Lists {
  std::vector<Tensor> parameters, gradients;
  explicit Lists(const std::vector<Slot*>& slots) {
    for (Slot* s : slots) {
      parameters.push_back(s->parameter);
      gradients.push_back(s->parameter.grad());
    }
  }
  void scale(double by) {
    if (by != 1.0) at::_foreach_mul_(gradients, by);
  }
};

class AdamW : public Optimizer {
 public:
  AdamW(const OptimizerConfig& c, std::vector<Slot> slots) : Optimizer(std::move(slots)), c_(c) {}
  std::vector<std::string> state_names() const override { return {"exp_avg", "exp_avg_sq"}; }

 protected:
  void update(const std::vector<Slot*>& slots, double lr, double weight_decay, double scale) override {
    const Lists lists(slots);
    std::vector<Tensor> mean, square, steps;
    for (Slot* s : slots) {
      mean.push_back(state_of(*s, "exp_avg"));
      square.push_back(state_of(*s, "exp_avg_sq"));
      steps.push_back(torch::tensor(static_cast<float>(s->step), s->parameter.options().requires_grad(false)));
    }
    // The scale goes into the one pass over all that there is.
    const auto grad_scale =
        scale == 1.0 ? std::optional<Tensor>() : torch::tensor(static_cast<float>(1.0 / scale), steps[0].options());
    at::_fused_adamw_(lists.parameters, lists.gradients, mean, square, {}, steps, lr, c_.beta1, c_.beta2, weight_decay,
                      c_.eps, /*amsgrad=*/false, /*maximize=*/false, grad_scale);
  }

 private:
  OptimizerConfig c_;
};

class Sgd : public Optimizer {
 public:
  Sgd(const OptimizerConfig& c, std::vector<Slot> slots) : Optimizer(std::move(slots)), c_(c) {}
  std::vector<std::string> state_names() const override {
    return c_.momentum > 0 ? std::vector<std::string>{"momentum"} : std::vector<std::string>{};
  }

 protected:
  void update(const std::vector<Slot*>& slots, double lr, double weight_decay, double scale) override {
    Lists(slots).scale(scale);
    for (Slot* s : slots) {
      auto g = s->parameter.grad();
      if (weight_decay > 0) g = g.add(s->parameter, weight_decay);
      if (c_.momentum > 0) {
        auto& m = state_of(*s, "momentum");
        m.mul_(c_.momentum).add_(g);
        g = c_.nesterov ? g.add(m, c_.momentum) : m;
      }
      s->parameter.add_(g, -lr);
    }
  }

 private:
  OptimizerConfig c_;
};

class Lion : public Optimizer {
 public:
  Lion(const OptimizerConfig& c, std::vector<Slot> slots) : Optimizer(std::move(slots)), c_(c) {}
  std::vector<std::string> state_names() const override { return {"exp_avg"}; }

 protected:
  void update(const std::vector<Slot*>& slots, double lr, double weight_decay, double scale) override {
    Lists(slots).scale(scale);
    for (Slot* s : slots) {
      const auto g = s->parameter.grad();
      auto& m = state_of(*s, "exp_avg");
      s->parameter.mul_(1.0 - lr * weight_decay);
      s->parameter.add_(torch::lerp(m, g, 1.0 - c_.beta1).sign_(), -lr);
      m.lerp_(g, 1.0 - c_.beta2);
    }
  }

 private:
  OptimizerConfig c_;
};

}  // namespace

Optimizer::Optimizer(std::vector<Slot> slots) : slots_(std::move(slots)) {
  for (const Slot& s : slots_)
    check(s.parameter.scalar_type() == torch::kFloat32, "parameter '{}' is not float32: an optimizer needs f32 weights",
          s.name);
}

torch::Tensor& Optimizer::state_of(Slot& slot, const std::string& name) {
  auto& t = slot.state[name];
  if (!t.defined()) t = torch::zeros_like(slot.parameter, torch::TensorOptions().requires_grad(false));
  return t;
}

void Optimizer::step(double factor, double scale) {
  const torch::NoGradGuard frozen;
  std::map<std::pair<double, double>, std::vector<Slot*>> groups;
  for (Slot& s : slots_) {
    if (!s.parameter.grad().defined()) continue;
    ++s.step;
    groups[{s.lr, s.weight_decay}].push_back(&s);
  }
  for (const auto& [key, slots] : groups) update(slots, key.first * factor, key.second, scale);
}

void Optimizer::zero_grad() {
  for (Slot& s : slots_) s.parameter.mutable_grad() = torch::Tensor();
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config, std::vector<Slot> slots) {
  if (config.name == "adamw") return std::make_unique<AdamW>(config, std::move(slots));
  if (config.name == "sgd") return std::make_unique<Sgd>(config, std::move(slots));
  check(config.name == "lion", "unknown optimizer '{}'; known are adamw, sgd and lion", config.name);
  return std::make_unique<Lion>(config, std::move(slots));
}

namespace {

// In f32 over pieces of a tensor, which threads share, in double over all of them.
double norm_of(const std::vector<Tensor>& list) {
  constexpr int64_t kPiece = int64_t{1} << 18;
  std::vector<Tensor> pieces, elsewhere;
  for (const Tensor& t : list) {
    if (!t.is_cpu() || !t.is_contiguous()) {
      elsewhere.push_back(t);
      continue;
    }
    const auto flat = t.view({-1});
    for (int64_t begin = 0; begin < flat.numel(); begin += kPiece)
      pieces.push_back(flat.narrow(0, begin, std::min(kPiece, flat.numel() - begin)));
  }
  std::vector<double> norms(pieces.size());
  run_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    norms[static_cast<size_t>(i)] = at::linalg_vector_norm(pieces[static_cast<size_t>(i)]).item<double>();
  });
  if (!elsewhere.empty())
    norms.push_back(torch::stack(at::_foreach_norm(elsewhere)).to(torch::kCPU, torch::kFloat64).norm().item<double>());
  double squares = 0.0;
  for (const double n : norms) squares += n * n;
  return std::sqrt(squares);
}

}  // namespace

GradientNorm gradient_norm(const std::vector<Slot>& slots, double limit, const std::function<double(double)>& sum) {
  const torch::NoGradGuard frozen;
  std::vector<Tensor> gradients, shares;
  for (const Slot& s : slots)
    if (s.parameter.grad().defined()) (s.share ? shares : gradients).push_back(s.parameter.grad());
  double norm = norm_of(gradients);
  if (sum) norm = std::hypot(norm, std::sqrt(sum(std::pow(norm_of(shares), 2))));
  // The small number as in torch's clip_grad_norm_.
  return {norm, limit > 0 && norm > limit ? limit / (norm + 1e-6) : 1.0};
}

}  // namespace moiety
