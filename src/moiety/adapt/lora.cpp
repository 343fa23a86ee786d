#include "moiety/adapt/lora.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/adapt/low_rank.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/io/peft.h"
#include "moiety/moe/grouped.h"

namespace moiety {
namespace {

using torch::Tensor;

template <class T>
const T* by_pattern(const std::map<std::string, T>& patterns, const std::string& path, const char* key) {
  for (const auto& [pattern, value] : patterns)
    if (means_path(pattern, path, key)) return &value;
  return nullptr;
}

}  // namespace

void LoraConfig::fields(Fields& f) {
  f("rank", rank, "rank of the matrices").min(1);
  f("alpha", alpha, "what they add is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what they read, while training").min(0).max(0.99);
  f("rslora", rslora, "multiply by alpha / sqrt(rank) instead (rsLoRA)");
  f("dora", dora, "learn the norms of rows apart from their directions (DoRA)");
  f("bias", bias, "which biases of the model learn too: none, those of adapted matrices (lora_only), or all")
      .choices({"none", "lora_only", "all"});
  f("experts", experts,
    "beside the matrices of experts: own (every expert has its own pair), shared (one A for all, a B each), all (one "
    "pair for all experts)")
      .choices({"own", "shared", "all"});
  f("init", init, "how A starts: uniform, as PEFT does, or normal with a deviation of 1 / rank; B starts at 0")
      .choices({"uniform", "gaussian"});
  f("rank_pattern", rank_pattern, "another rank where a path matches, e.g. {layers.3.self_attn.q_proj: 16}");
  f("alpha_pattern", alpha_pattern, "another alpha where a path matches");
  f("strength", strength, "times what it adds").min(-100).max(100);
}

int64_t LoraConfig::rank_at(const std::string& path) const {
  const auto* own = by_pattern(rank_pattern, path, "rank_pattern");
  check(own == nullptr || *own >= 1, "rank_pattern: {} is no rank", own == nullptr ? 0 : *own);
  return own != nullptr ? *own : rank;
}

double LoraConfig::alpha_at(const std::string& path) const {
  const auto* own = by_pattern(alpha_pattern, path, "alpha_pattern");
  return own != nullptr ? *own : alpha;
}

double LoraConfig::scale_at(const std::string& path) const {
  const auto r = static_cast<double>(rank_at(path));
  return strength * alpha_at(path) / (rslora ? std::sqrt(r) : r);
}

Tensor dora_norm(const Tensor& weight, const Tensor& a, const Tensor& b, double scale) {
  const torch::NoGradGuard frozen;
  return torch::addmm(weight, b.to(weight.scalar_type()), a.to(weight.scalar_type()), 1.0, scale)
      .square()
      .sum(1)
      .sqrt();
}

Lora::Lora(Tensor first, Tensor second, double scale, double dropout, LinearImpl* matrix, Tensor m, Tensor own_bias)
    : scale_(scale), dropout_(dropout), matrix_(matrix) {
  check(first.dim() == 2 && second.dim() == 2 && first.size(0) == second.size(1),
        "LoRA needs A [r, in] and B [out, r]");
  a = register_parameter("lora_A", first, first.requires_grad());
  b = register_parameter("lora_B", second, second.requires_grad());
  check((!m.defined() && !own_bias.defined()) || matrix != nullptr, "magnitudes and biases need the matrix");
  check(!own_bias.defined() || matrix->bias.defined(), "a bias can take the place of one only");
  if (m.defined()) magnitude = register_parameter("magnitude", m, m.requires_grad());
  if (own_bias.defined()) bias = register_parameter("bias", own_bias, own_bias.requires_grad());
}

Tensor Lora::row_norms() const {
  return dora_norm(matrix_->dense(torch::kFloat32), a, b, scale_);
}

void Lora::apply(const Tensor& x, std::vector<Tensor>& outputs, Pass& pass) {
  auto& y = outputs.at(0);
  if (bias.defined()) y = y - like(matrix_->bias, y);  // goes back at the end
  const bool biased = magnitude.defined() && !bias.defined() && matrix_->bias.defined();
  if (biased) y = y - like(matrix_->bias, y);
  y = add_low_rank(y, dropped(x, dropout_, pass.training), a, b, {}, scale_);
  if (magnitude.defined()) {
    Tensor norms;
    if (torch::GradMode::is_enabled()) {
      norms = row_norms();
      norms_ = Tensor();
    } else {
      const std::tuple<const void*, const void*, int64_t> now{a.const_data_ptr(), b.const_data_ptr(),
                                                              int64_t{a._version()} + int64_t{b._version()}};
      if (!norms_.defined() || now != of_) norms_ = row_norms();
      of_ = now;
      norms = norms_;
    }
    y = y * like(magnitude / norms, y);
  }
  if (biased) y = y + like(matrix_->bias, y);
  if (bias.defined()) y = y + like(bias, y);
}

Tensor Lora::merged(const Tensor& weight, int64_t) const {
  const torch::NoGradGuard frozen;
  auto sum = torch::addmm(weight, b.to(torch::kFloat32), a.to(torch::kFloat32), 1.0, scale_);
  if (magnitude.defined()) sum = sum * (magnitude / sum.square().sum(1).sqrt()).unsqueeze(1);
  return sum;
}

Tensor Lora::unmerged(const Tensor& weight, int64_t place) const {
  check(!magnitude.defined(),
        "it cannot be taken out again: DoRA gives every row a new length, and the one that it had is gone");
  check(!bias.defined(), "it cannot be taken out again: the bias that a trained one replaced is gone");
  return Beside::unmerged(weight, place);
}

Tensor Lora::merged_bias(const Tensor& own, int64_t) const {
  return bias.defined() ? bias : own;
}

LoraStack::LoraStack(Tensor first, Tensor second, double scale) : scale_(scale) {
  check(first.dim() == 3 && second.dim() == 3 && first.size(1) == second.size(2),
        "LoRA of experts needs A [E, r, in] and B [E, out, r]");
  a = register_parameter("lora_A", first, first.requires_grad());
  b = register_parameter("lora_B", second, second.requires_grad());
}

Tensor LoraStack::apply(const Tensor& x, const std::vector<int64_t>& counts, Tensor y) {
  const auto times = [&](const Tensor& v, const Tensor& m) {
    return m.size(0) == 1 ? torch::matmul(v, like(m[0], v).t()) : grouped_linear(v, like(m, v), {}, counts);
  };
  return y + times(times(x, a), b) * scale_;
}

Tensor LoraStack::delta(int64_t expert) const {
  const torch::NoGradGuard frozen;
  const auto of = [&](const Tensor& m) { return m[m.size(0) == 1 ? 0 : expert].to(torch::kFloat32); };
  return torch::matmul(of(b), of(a)) * scale_;
}

namespace {

Init init_of(const LoraConfig& c, int64_t rank) {
  return c.init == "gaussian" ? normal_init(1.0 / static_cast<double>(rank)) : uniform_init();
}

const RegisterMethod registered(
    {.slug = "lora",
     .kind = "part",
     .title = "LoRA",
     .summary = "low-rank matrices beside frozen ones, with rsLoRA and DoRA; reads and writes PEFT's adapters",
     .paper = {"LoRA: Low-Rank Adaptation of Large Language Models", "Hu et al.", 2021, "2106.09685"},
     .sites = {"linear"},
     .config = describe<LoraConfig>,
     .make = MakeBeside{
         .per_input = false,
         .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<LoraConfig>(settings, "lora");
           const LinearTarget& t = site.targets.at(0);
           const int64_t rank = c.rank_at(t.path);
           auto a = site.own.get("lora_A", {rank, t.in}, init_of(c, rank));
           auto b = site.own.get("lora_B", {t.out, rank}, constant_init(0.0));
           Tensor magnitude, bias;
           if (c.dora) {
             // Of the adapted matrix, that nothing changes at the start, whatever B is.
             const double scale = c.scale_at(t.path);
             magnitude = site.own.get("magnitude", {t.out}, [&](Tensor m) {
               m.copy_(dora_norm(t.matrix->dense(torch::kFloat32), a, b, scale));
             });
           }
           // What the first adds to a bias of its own the second does not see.
           for (const auto& other : t.matrix->attached())
             if (const auto* l = dynamic_cast<const Lora*>(other.beside.get()))
               check(!l->bias.defined() || (!c.dora && c.bias != "lora_only"),
                     "a LoRA with a trained bias stands beside the matrix already: {} cannot join it",
                     c.dora ? "DoRA" : "another trained bias");
           if (c.bias == "lora_only" && t.matrix->bias.defined())
             bias = site.own.get("bias", {t.out}, [&](Tensor v) { v.copy_(t.matrix->bias); });
           return std::make_shared<Lora>(a, b, c.scale_at(t.path), c.dropout, t.matrix, magnitude, bias);
         },
         .make_stack = [](StackSite& site,
                          const nlohmann::json& settings) -> std::vector<std::shared_ptr<BesideStack>> {
           const auto c = parse<LoraConfig>(settings, "lora");
           check(!c.dora, "DoRA beside the matrices of experts is not defined; leave `dora` out");
           check(c.dropout == 0.0, "dropout cannot be used beside the matrices of experts");
           const int64_t rank = c.rank_at(site.path), of_a = c.experts == "own" ? site.experts : 1,
                         of_b = c.experts == "all" ? 1 : site.experts;
           // Gate and up read one input, and transformers stores them as one: A is theirs together.
           const auto a = site.own.get("lora_A", {of_a, rank, site.in}, init_of(c, rank));
           std::vector<std::shared_ptr<BesideStack>> out;
           int64_t rows = 0;
           for (const auto* s : site.stacks) rows += s->out();
           if (site.stacks.size() == 1) {
             const auto b = site.own.get("lora_B", {of_b, rows, rank}, constant_init(0.0));
             out.push_back(std::make_shared<LoraStack>(a, b, c.scale_at(site.path)));
             return out;
           }
           const char* names[] = {"lora_B_gate", "lora_B_up"};
           for (size_t i = 0; i < site.stacks.size(); ++i) {
             const auto b = site.own.get(names[i], {of_b, site.stacks[i]->out(), rank}, constant_init(0.0));
             out.push_back(std::make_shared<LoraStack>(a, b, c.scale_at(site.path)));
           }
           return out;
         }}});

}  // namespace
}  // namespace moiety
