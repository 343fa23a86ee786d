#pragma once
// Optimizers: AdamW, SGD, Lion. State is per parameter, made when the parameter first gets a gradient, with a step
// counter of its own: experts that no token chose stand still.
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moiety/base/config.h"

namespace moiety {

struct OptimizerConfig {
  std::string name = "adamw";
  double lr = 1e-3;
  double weight_decay = 0.1;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double momentum = 0.9;
  bool nesterov = false;
  double clip = 1.0;

  void fields(Fields& f) {
    f("name", name, "adamw, sgd (with momentum) or lion").choices({"adamw", "sgd", "lion"});
    f("lr", lr, "peak learning rate; lion wants about a tenth of adamw's").min(0);
    f("weight_decay", weight_decay,
      "decoupled for adamw and lion, added to the gradient for sgd; norms, biases, embeddings and other vectors have "
      "none unless a group says so")
        .min(0);
    f("beta1", beta1, "adamw, lion: decay of the mean of gradients").min(0).max(0.999999);
    f("beta2", beta2, "adamw: decay of the mean of squares; lion: of the momentum").min(0).max(0.999999999);
    f("eps", eps, "adamw: added to the root of the mean of squares").min(0);
    f("momentum", momentum, "sgd").min(0).max(0.999999);
    f("nesterov", nesterov, "sgd: look ahead by one step");
    f("clip", clip, "largest norm of all gradients together; longer ones are scaled down; 0: as they are").min(0);
  }
};

/// One parameter under training.
struct Slot {
  std::string name;
  torch::Tensor parameter;  ///< f32, asks for gradients
  double lr = 0.0;          ///< peak rate
  double weight_decay = 0.0;
  int64_t step = 0;    ///< updates that it got
  bool share = false;  ///< this process holds a share of the experts: gradients of others belong to other weights
  std::map<std::string, torch::Tensor> state;
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// One update of every slot whose parameter has a gradient; rates are multiplied by `factor`, gradients by `scale`,
  /// which may change them.
  void step(double factor, double scale = 1.0);
  void zero_grad();
  std::vector<Slot>& slots() { return slots_; }
  /// Names of the tensors that a slot holds ("exp_avg", ...), in order.
  virtual std::vector<std::string> state_names() const = 0;

 protected:
  explicit Optimizer(std::vector<Slot> slots);
  /// Slots of one rate and decay, all with gradients, which are `scale` times what is to be used.
  virtual void update(const std::vector<Slot*>& slots, double lr, double weight_decay, double scale) = 0;
  /// The slot's tensor, zeros of the parameter's shape at first.
  static torch::Tensor& state_of(Slot& slot, const std::string& name);

 private:
  std::vector<Slot> slots_;
};

/// adamw (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's fused kernel, one pass over each parameter. sgd: torch's
/// rule (momentum m = mu m + g, dampening 0). lion (Chen et al. 2023, arXiv 2302.06675): p -= lr * (sign(b1 m + (1-b1)
/// g) + wd p), m = b2 m + (1-b2) g. Throws Error unless every parameter is f32.
std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config, std::vector<Slot> slots);

struct GradientNorm {
  double norm = 0.0, scale = 1.0;
};
/// Norm of all gradients together, in f32 per piece of a tensor and double across them, and what an update has to
/// multiply them with so that it does not pass `limit` (0: they stay), as torch's clip_grad_norm_ does.
/// `sum`: adds up a number over the processes that hold the other shares; unset: there are none.
GradientNorm gradient_norm(const std::vector<Slot>& slots, double limit, const std::function<double(double)>& sum = {});

}  // namespace moiety
