#include "moiety/adapt/flylora.h"

#include <torch/torch.h>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"

namespace moiety {

void FlyLoraConfig::fields(Fields& f) {
  f("rank", rank, "ranks in all").min(1);
  f("top_k", top_k, "ranks that a token uses").min(1);
  f("alpha", alpha, "what is added is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what A reads, while training").min(0).max(0.99);
  f("bias_rate", bias_rate, "the bias on the choice moves by this towards less used ranks at every training pass")
      .min(0);
  f("seed", seed, "of A: adapters of one seed share it, and can be averaged").min(0);
  f("select", select, "by the projection, or by its size").choices({"signed", "magnitude"});
  f("grad_through_a", grad_through_a,
    "gradients reach the input through A; false: as the authors' full-precision code");
  f("strength", strength, "times what is added: adapters side by side at 1 / N each are their stack")
      .min(-100)
      .max(100);
  f("update_in_eval", update_in_eval, "the bias moves in evaluation, too, as in the authors' code");
}

std::string FlyLoraConfig::problem() const {
  return top_k > rank ? fmt::format("top_k is {}, and there are {} ranks", top_k, rank) : "";
}

int64_t fly_nonzeros(int64_t in, int64_t rank, int64_t top_k) {
  check(top_k >= 1 && top_k <= rank, "{} of {} ranks cannot be used", top_k, rank);
  const int64_t p = in / (rank / top_k);
  check(p >= 1, "rows of A would be empty: {} features over {} ranks, {} of them used", in, rank, top_k);
  return p;
}

torch::Tensor fly_projection(const torch::Tensor& perm, const torch::Tensor& normal, int64_t top_k) {
  const int64_t rank = perm.size(0), in = perm.size(1), p = fly_nonzeros(in, rank, top_k);
  const auto kept = torch::zeros_like(normal).scatter_(1, perm.narrow(1, 0, p), 1.0);
  return normal / static_cast<double>(rank) * kept;
}

torch::Tensor fly_projection(int64_t rank, int64_t in, int64_t top_k, int64_t seed, const std::string& path) {
  RandomStream stream(static_cast<uint64_t>(seed), "flylora." + path);
  auto perm = torch::empty({rank, in}, torch::kInt64);
  auto normal = torch::empty({rank, in});
  for (int64_t r = 0; r < rank; ++r) {
    const auto order = stream.permutation(in);
    std::copy(order.begin(), order.end(), perm.data_ptr<int64_t>() + r * in);
    for (int64_t i = 0; i < in; ++i) normal.data_ptr<float>()[r * in + i] = static_cast<float>(stream.normal());
  }
  return fly_projection(perm, normal, top_k);
}

torch::Tensor fly_choose(const torch::Tensor& a, const torch::Tensor& bias, int64_t k, const std::string& select) {
  const auto seen = a.detach();
  if (select == "magnitude") return top_k(seen.abs() + bias, k).second;
  check(select == "signed", "unknown select `{}`; known are signed and magnitude", select);
  return top_k(seen + bias, k).second;
}

namespace {

// 1 at the chosen ranks.
torch::Tensor mask_of(const torch::Tensor& indices, int64_t ranks, const torch::TensorOptions& options) {
  return torch::zeros({indices.size(0), ranks}, options).scatter_(1, indices, 1.0);
}

}  // namespace

FlyLora::FlyLora(std::string site, torch::Tensor a, torch::Tensor b, torch::Tensor bias, const FlyLoraConfig& config)
    : site_(std::move(site)), config_(config), bias_(register_buffer("bias", bias.detach()), config.bias_rate) {
  a_ = register_buffer("lora_A", a.detach());
  b_ = register_parameter("lora_B", b, b.requires_grad());
  check(a.size(0) == b.size(1) && a.size(0) == bias.size(0), "A has {} ranks, B {}, the bias {}", a.size(0), b.size(1),
        bias.size(0));
  check(config.top_k >= 1 && config.top_k <= a.size(0), "top_k is {}, and there are {} ranks", config.top_k, a.size(0));
}

bool FlyLora::set_active(int64_t k) {
  check(k >= 1 && k <= a_.size(0), "{} active ranks are impossible: there are {} to choose from", k, a_.size(0));
  config_.top_k = k;
  return true;
}

void FlyLora::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  auto v = dropped(x, config_.dropout, pass.training);
  if (!config_.grad_through_a) v = v.detach();
  const auto flat = v.reshape({-1, v.size(-1)});
  Routing r;
  {
    const torch::NoGradGuard frozen;
    r.logits = torch::matmul(flat, a_.to(flat.scalar_type()).t());
    if (r.logits.scalar_type() != torch::kFloat64) r.logits = r.logits.to(torch::kFloat32);
    r.experts = fly_choose(r.logits, bias_.now(pass), config_.top_k, config_.select);
  }
  r.scores = r.logits;
  r.gates = torch::ones({r.experts.size(0), r.experts.size(1)}, r.logits.options());
  const Site site = pass.at(site_);
  for (const auto& edit : pass.edits) edit->choice(site, pass, r);
  if (pass.training || config_.update_in_eval) bias_.move(r.experts, pass);
  auto& y = outputs.at(0);
  y = add_low_rank(y, v, a_, b_, gate_table(r, a_.size(0)), scale());
  report_beside(pass, site, r, a_.size(0), flat, y);
}

torch::Tensor FlyLora::merged(const torch::Tensor& weight, int64_t place) const {
  if (config_.top_k < a_.size(0)) return Beside::merged(weight, place);
  const torch::NoGradGuard frozen;
  return torch::addmm(weight, b_.to(torch::kFloat32), a_.to(torch::kFloat32), 1.0, scale());
}

FlyAdapter fly_average(const std::vector<FlyAdapter>& adapters) {
  check(!adapters.empty(), "there is no adapter to average");
  const torch::NoGradGuard frozen;
  FlyAdapter out{adapters[0].a, torch::zeros_like(adapters[0].b), torch::zeros_like(adapters[0].bias)};
  for (const auto& f : adapters) {
    check(f.a.sizes() == out.a.sizes() && f.b.sizes() == out.b.sizes(), "the adapters' shapes differ");
    check(torch::equal(f.a, out.a), "A differs: adapters of one seed can be averaged, others be stacked");
    out.b += f.b / static_cast<double>(adapters.size());
    out.bias += f.bias / static_cast<double>(adapters.size());
  }
  return out;
}

torch::Tensor fly_delta(const torch::Tensor& x, const FlyAdapter& f, int64_t top_k, double scale,
                        const std::string& select) {
  const auto a = torch::matmul(x, f.a.t());
  const auto chosen = fly_choose(a, f.bias, top_k, select);
  return add_low_rank(torch::zeros({x.size(0), f.b.size(0)}, x.options()), x, f.a, f.b,
                      mask_of(chosen, f.a.size(0), x.options()), scale);
}

torch::Tensor fly_stack(const torch::Tensor& x, const std::vector<FlyAdapter>& adapters, int64_t top_k, double scale,
                        const std::string& select) {
  check(!adapters.empty(), "there is no adapter to stack");
  torch::Tensor sum;
  for (const auto& f : adapters) {
    const auto one = fly_delta(x, f, top_k, scale, select);
    sum = sum.defined() ? sum + one : one;
  }
  return sum / static_cast<double>(adapters.size());
}

namespace {

const RegisterMethod registered(
    {.slug = "flylora",
     .kind = "part",
     .title = "FlyLoRA",
     .summary = "a frozen sparse random A that routes by its own projections; only B learns",
     .paper = {"FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts",
               "Zou et al.", 2025, ""},
     .sites = {"linear"},
     .config = describe<FlyLoraConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<FlyLoraConfig>(settings, "flylora");
           const LinearTarget& t = site.targets.at(0);
           const auto a = site.own.get("lora_A", {c.rank, t.in}, [&](torch::Tensor to) {
             to.copy_(fly_projection(c.rank, t.in, c.top_k, c.seed, t.path));
           });
           return std::make_shared<FlyLora>(t.name, a, site.own.get("lora_B", {t.out, c.rank}, constant_init(0.0)),
                                            site.own.get("bias", {c.rank}, constant_init(0.0)), c);
         }}});

}  // namespace
}  // namespace moiety
