#include "moiety/compress/expert_merging.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"

namespace moiety {
namespace {

using torch::Tensor;

// Coefficients this close to where they began have not moved: two sigmoids of one number differ by as much.
constexpr double kRounding = 4.0 * static_cast<double>(std::numeric_limits<float>::epsilon());

void check_tasks(const Tensor& base, const std::vector<Tensor>& tasks, int64_t coefficients) {
  check(!tasks.empty(), "there is no expert to merge");
  check(coefficients == static_cast<int64_t>(tasks.size()), "coefficients of {} experts for {}", coefficients,
        tasks.size());
  for (const Tensor& t : tasks) check(t.sizes() == base.sizes(), "a task vector has another shape than its base");
}

// alpha [m] spread over n elements, in the shape of `like`.
Tensor spread(const Tensor& alpha, const Tensor& like) {
  const int64_t n = like.numel(), size = chunk_elements(n, alpha.size(0));
  return alpha.repeat_interleave(size).slice(0, 0, n).view(like.sizes());
}

// Sums over chunks [m]; those behind the last element are 0.
Tensor chunk_sums(const Tensor& values, int64_t chunks) {
  const int64_t n = values.numel(), size = chunk_elements(n, chunks);
  return torch::constant_pad_nd(values.flatten(), {0, size * chunks - n}).view({chunks, size}).sum(1);
}

Tensor merged(const Tensor& base, const std::vector<Tensor>& tasks, const Tensor& alpha) {
  const torch::NoGradGuard frozen;
  auto out = base.to(torch::kFloat32, /*non_blocking=*/false, /*copy=*/true);
  for (size_t k = 0; k < tasks.size(); ++k) {
    const auto a = alpha[static_cast<int64_t>(k)];
    if (a.numel() == 1)
      out.add_(tasks[k], a.item<float>());
    else
      out.addcmul_(spread(a, out), tasks[k].to(torch::kFloat32));
  }
  return out;
}

class Merge : public torch::autograd::Function<Merge> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& raw, const Tensor& base,
                        at::TensorList tasks) {
    const std::vector<Tensor> all(tasks.begin(), tasks.end());
    torch::autograd::variable_list saved{raw};
    saved.insert(saved.end(), all.begin(), all.end());
    context->save_for_backward(std::move(saved));
    return merged(base, all, raw.sigmoid());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    const std::vector<Tensor> tasks(saved.begin() + 1, saved.end());
    torch::autograd::variable_list out(2 + tasks.size());
    out[0] = coefficient_gradient(grads[0], tasks, saved[0]);
    return out;
  }
};

const RegisterMethod registered(
    {.slug = "expert-merging",
     .kind = "transform",
     .title = "Expert Merging",
     .summary =
         "several experts of one base as one model: coefficients a tensor and expert, learned from a few samples",
     .paper = {"Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer Chunking",
               "Zhang et al.", 2025, "2509.25712"},
     .sites = {},
     .config = describe<ExpertMergingConfig>,
     .make = {}});

}  // namespace

void ExpertMergingConfig::fields(Fields& f) {
  f("init", init, "coefficient of every expert's task vector at the beginning, between 0 and 1").min(0).max(1);
  f("temperature", temperature, "of the logits of expert and merged model").min(0);
  f("reg_weight", reg_weight, "what holds coefficients where they began").min(0);
  f("hidden_weight", hidden_weight, "of the hidden states' loss").min(0);
  f("hidden_layers", hidden_layers, "hidden states that are compared: 0 the embeddings, the last behind the last norm");
  f("beta", beta, "of each task's losses; none: 1");
  f("samples", samples, "samples of each task; 0: all").min(0);
  f("epochs", epochs, "passes over all samples; the best one counts, and three without a better one end it").min(1);
  f("accumulation", accumulation, "samples a step").min(1);
  f("lr", lr, "peak rate of AdamW").min(0);
  f("weight_decay", weight_decay, "of AdamW").min(0);
  f("clip", clip, "largest norm of the coefficients' gradient; 0: as it is").min(0);
  f("plus_plus", plus_plus, "learn a second time, with chunks where the first found importance");
  f("budget", budget, "plus_plus: coefficients an expert for each merged tensor").min(0);
  f("kappa", kappa, "plus_plus: power of the importance").min(0);
  f("exclude", exclude, "regular expressions, from the start of a name: tensors that stay the base's");
  f("seed", seed, "of the order of samples").min(0);
}

std::string ExpertMergingConfig::problem() const {
  if (!(init > 0.0 && init < 1.0)) return fmt::format("init is {}; it lies between 0 and 1", init);
  if (!(temperature > 0.0)) return fmt::format("the temperature is {}; it has to be above 0", temperature);
  for (const double b : beta)
    if (!(b >= 0.0)) return fmt::format("a beta is {}; it cannot be below 0", b);
  return "";
}

int64_t chunk_elements(int64_t n, int64_t chunks) {
  check(chunks >= 1 && chunks <= n, "a tensor of {} elements cannot be cut into {} chunks", n, chunks);
  return (n + chunks - 1) / chunks;
}

Tensor initial_coefficients(const Tensor& init, int64_t chunks) {
  const auto a = init.to(torch::kFloat64);
  check(((a > 0) & (a < 1)).all().item<bool>(), "coefficients begin between 0 and 1");
  return torch::log(a / (1 - a)).to(torch::kFloat32).unsqueeze(1).repeat({1, chunks});
}

Tensor merge_experts(const Tensor& base, const std::vector<Tensor>& tasks, const Tensor& raw) {
  check(raw.dim() == 2, "coefficients are [experts, chunks]");
  check_tasks(base, tasks, raw.size(0));
  chunk_elements(base.numel(), raw.size(1));
  return Merge::apply(raw, base, at::TensorList(tasks));
}

Tensor merge_experts_fixed(const Tensor& base, const std::vector<Tensor>& tasks, const Tensor& alpha) {
  check_tasks(base, tasks, alpha.numel());
  return merged(base, tasks, alpha.view({-1, 1}));
}

Tensor coefficient_gradient(const Tensor& merged_gradient, const std::vector<Tensor>& tasks, const Tensor& raw) {
  const torch::NoGradGuard frozen;
  const auto dy = merged_gradient.to(torch::kFloat32);
  std::vector<Tensor> rows;
  for (const Tensor& t : tasks) rows.push_back(chunk_sums(dy * t, raw.size(1)));
  const auto alpha = raw.sigmoid();
  return torch::stack(rows) * alpha * (1 - alpha);
}

namespace {

Tensor logits_loss(const MergeSample& s, double temperature) {
  check(s.teacher_logits.sizes() == s.student_logits.sizes(), "expert and merged model have logits of other shapes");
  const auto teacher = (s.teacher_logits.to(torch::kFloat32) / temperature).softmax(-1).detach();
  const auto student = (s.student_logits.to(torch::kFloat32) / temperature).log_softmax(-1);
  return -(teacher * student).sum(-1).mean() * (temperature * temperature);
}

Tensor hidden_loss(const MergeSample& s, const std::vector<int64_t>& layers) {
  const auto count = static_cast<int64_t>(s.student_hidden.size());
  auto sum = torch::zeros({}, torch::TensorOptions().device(s.student_logits.device()));
  for (const int64_t l : layers) {
    check(l >= 0 && l < count && count == static_cast<int64_t>(s.teacher_hidden.size()),
          "there is no hidden state {}: the model has 0 to {}", l, count - 1);
    const auto& student = s.student_hidden[static_cast<size_t>(l)];
    const auto& teacher = s.teacher_hidden[static_cast<size_t>(l)];
    sum = sum + torch::mse_loss(student.to(torch::kFloat32), teacher.detach().to(torch::kFloat32));
  }
  return layers.empty() ? sum : sum / static_cast<double>(layers.size());
}

}  // namespace

Tensor merge_regulariser(const std::vector<Tensor>& raw, const Tensor& init) {
  auto sum = torch::zeros({}, init.options().dtype(torch::kFloat32));
  int64_t coefficients = 0;
  for (const Tensor& a : raw) {
    const auto off = (a.sigmoid() - init.to(torch::kFloat32).unsqueeze(1)).abs();
    sum = sum + torch::where(off > kRounding, off, torch::zeros_like(off)).sum();
    coefficients += a.numel();
  }
  if (coefficients == 0) return sum;
  return sum * (static_cast<double>(init.numel()) / static_cast<double>(coefficients));
}

MergeLoss expert_merging_loss(const MergeSample& sample, const std::vector<Tensor>& raw, const Tensor& init,
                              const ExpertMergingConfig& config, double beta) {
  check(beta >= 0.0, "a beta is {}; it cannot be below 0", beta);
  check(config.reg_weight >= 0.0 && config.hidden_weight >= 0.0, "weights of losses cannot be below 0");
  check(config.temperature > 0.0, "the temperature is {}; it has to be above 0", config.temperature);
  for (const Tensor& a : raw)
    check(a.dim() == 2 && a.size(0) == init.numel(), "coefficients are [experts, chunks], of {} experts", init.numel());
  MergeLoss out;
  out.logits = logits_loss(sample, config.temperature) * beta;
  out.hidden = hidden_loss(sample, config.hidden_layers) * (config.hidden_weight * beta);
  out.reg = merge_regulariser(raw, init) * config.reg_weight;
  out.total = out.logits + out.hidden + out.reg;
  return out;
}

std::vector<double> layer_importance(const Tensor& alpha, const Tensor& sizes) {
  check(alpha.dim() == 2 && alpha.sizes() == sizes.sizes(), "coefficients and sizes are [experts, tensors] both");
  const auto weight = (alpha.to(torch::kFloat64).abs() * sizes.to(torch::kFloat64)).sum(0);
  const double all = weight.sum().item<double>();
  check(std::isfinite(all) && all > 0.0, "no expert differs from the base: there is nothing to be important");
  const auto share = (weight / all).contiguous();
  return {share.data_ptr<double>(), share.data_ptr<double>() + share.numel()};
}

std::vector<int64_t> allocate_chunks(const std::vector<double>& importance, const std::vector<int64_t>& elements,
                                     double budget_ratio, double kappa) {
  check(importance.size() == elements.size() && !importance.empty(), "every tensor has an importance and a size");
  check(budget_ratio >= 0.0 && kappa >= 0.0, "budget {} and kappa {} cannot be below 0", budget_ratio, kappa);
  std::vector<double> power;
  for (const double i : importance) power.push_back(std::pow(i, kappa));
  const double sum = std::accumulate(power.begin(), power.end(), 0.0),
               budget = budget_ratio * static_cast<double>(importance.size());
  std::vector<int64_t> out;
  for (size_t l = 0; l < power.size(); ++l) {
    // Shares that are whole numbers but for rounding are those numbers.
    const double share = std::floor(budget * power[l] / sum + 1e-9);
    out.push_back(std::min(elements[l], static_cast<int64_t>(share)));
  }
  return out;
}

}  // namespace moiety
