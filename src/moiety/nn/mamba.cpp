#include "moiety/nn/mamba.h"

#include <torch/torch.h>

#include <cmath>
#include <deque>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/kernels/scan.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"
#include "moiety/nn/selective_scan.h"

namespace moiety {
namespace {

using torch::Tensor;

// What padding and packing make of the tokens of a pass. Inputs of a convolution are numbered with those that the cache
// kept in front: token t of a row is input kernel - 1 + t.
struct Tokens {
  Tensor what;     // [B, T] uint8 for the scan, undefined: all are steps
  Tensor inputs;   // [kernel, B * T]: rows of [B * (kernel - 1 + T) + 1, inner] that a token sees, oldest first, the
                   // last row where there is none; undefined: token t sees inputs t ... t + kernel - 1
  Tensor reaches;  // [kernel, B, T, 1] bool where `inputs` is undefined: whether it sees them; undefined: all
  Tensor window;   // [B * (kernel - 1)]: the inputs that the next token will see; undefined: the last ones
};

Tokens tokens_of(const Pass& pass, int64_t batch, int64_t tokens, int64_t kernel) {
  Tokens out;
  if (!pass.mask.defined() && !pass.segments.defined()) return out;
  check(!pass.segments.defined() || !pass.cache || pass.cache->length() == 0,
        "packed sequences cannot continue a cache: give each sequence a row of its own");
  const auto device = pass.mask.defined() ? pass.mask.device() : pass.segments.device();
  const auto mask = pass.mask.defined() ? pass.mask.to(torch::kCPU, torch::kBool).contiguous() : Tensor();
  const auto segments = pass.segments.defined() ? pass.segments.to(torch::kCPU, torch::kInt64).contiguous() : Tensor();
  const int64_t past = kernel - 1, row = past + tokens, none = batch * row;
  auto what = torch::zeros({batch, tokens}, torch::kUInt8);
  auto inputs = torch::empty({kernel, batch, tokens}, torch::kInt64);
  auto reaches = torch::ones({kernel, batch, tokens, 1}, torch::kBool);
  auto window = torch::empty({batch, past}, torch::kInt64);
  bool regular = true, whole = true, last = true;
  for (int64_t b = 0; b < batch; ++b) {
    std::deque<int64_t> seen;  // inputs of this sequence, the newest last
    for (int64_t k = 0; k < past; ++k) seen.push_back(b * row + k);
    bool any = false;
    int64_t segment = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const bool real = !mask.defined() || mask.const_data_ptr<bool>()[b * tokens + t];
      if (!real) {
        what.data_ptr<uint8_t>()[b * tokens + t] = static_cast<uint8_t>(ScanToken::skip);
      } else {
        const int64_t own = segments.defined() ? segments.const_data_ptr<int64_t>()[b * tokens + t] : 0;
        if (any && own != segment) {
          what.data_ptr<uint8_t>()[b * tokens + t] = static_cast<uint8_t>(ScanToken::fresh);
          seen.assign(static_cast<size_t>(past), none);
        }
        any = true;
        segment = own;
        seen.push_back(b * row + past + t);
      }
      // What padding sees is nobody's concern.
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t at = real ? seen[static_cast<size_t>(k)] : none, i = (k * batch + b) * tokens + t;
        inputs.data_ptr<int64_t>()[i] = at;
        reaches.data_ptr<bool>()[i] = at != none;
        whole = whole && at != none;
        regular = regular && (at == none || at == b * row + t + k);
      }
      if (real) seen.pop_front();
    }
    for (int64_t k = 0; k < past; ++k) {
      window.data_ptr<int64_t>()[b * past + k] = seen[static_cast<size_t>(k)];
      last = last && seen[static_cast<size_t>(k)] == b * row + tokens + k;
    }
  }
  out.what = what.to(device);
  if (!regular)
    out.inputs = inputs.view({kernel, batch * tokens}).to(device);
  else if (!whole)
    out.reaches = reaches.to(device);
  if (!last) out.window = window.view({-1}).to(device);
  return out;
}

}  // namespace

Mamba::Mamba(Parts p) : parts(std::move(p)) {
  inner_ = parts.out->in();
  rank_ = parts.dt->in();
  states_ = parts.a_log.size(1);
  kernel_ = parts.conv.size(2);
  check(parts.in->out() == 2 * inner_ && parts.x->in() == inner_ && parts.x->out() == rank_ + 2 * states_ &&
            parts.dt->out() == inner_ && parts.a_log.size(0) == inner_ && parts.conv.size(0) == inner_ &&
            parts.conv.size(1) == 1 && parts.skip.size(0) == inner_,
        "the parts of a state-space layer do not go together: {} channels, {} states, rank {}", inner_, states_, rank_);
  register_module("in_proj", parts.in);
  register_module("x_proj", parts.x);
  register_module("dt_proj", parts.dt);
  register_module("out_proj", parts.out);
  for (const auto& [name, t] : {std::pair{"conv1d_weight", parts.conv},
                                {"conv1d_bias", parts.conv_bias},
                                {"A_log", parts.a_log},
                                {"D", parts.skip}})
    if (t.defined()) register_parameter(name, t, t.requires_grad());
}

std::vector<NamedMatrix> Mamba::matrices() const {
  return {{"in_proj", 0, parts.in}, {"x_proj", 1, parts.x}, {"dt_proj", 2, parts.dt}, {"out_proj", 3, parts.out}};
}

Tensor Mamba::forward(const Tensor& x, const AttentionContext&, Pass& pass) {
  const int64_t batch = x.size(0), tokens = x.size(1), past = kernel_ - 1;
  const auto type = x.scalar_type() == torch::kFloat64 ? torch::kFloat64 : torch::kFloat32;
  const auto held = pass.cache ? pass.cache->state(pass.slot, batch) : std::vector<Tensor>();
  const Tokens t = tokens_of(pass, batch, tokens, kernel_);

  const auto both = project(parts.in, x, pass);
  const auto options = both.options().dtype(type);
  const auto gate = both.narrow(-1, inner_, inner_).to(type);
  const auto inputs = torch::cat({held.empty() ? torch::zeros({batch, past, inner_}, options) : held[0].to(type),
                                  both.narrow(-1, 0, inner_).to(type)},
                                 1);
  Tensor rows;  // with one of zeros behind them
  if (t.inputs.defined() || t.window.defined())
    rows = torch::cat({inputs.reshape({-1, inner_}), torch::zeros({1, inner_}, options)});
  const auto weights = parts.conv.to(type);
  Tensor h = parts.conv_bias.defined() ? parts.conv_bias.to(type) : torch::zeros({inner_}, options);
  for (int64_t k = 0; k < kernel_; ++k) {
    auto seen = t.inputs.defined() ? rows.index_select(0, t.inputs[k]).view({batch, tokens, inner_})
                                   : inputs.narrow(1, k, tokens);
    if (t.reaches.defined()) seen = seen * t.reaches[k];
    h = torch::addcmul(h, seen, weights.select(2, k).view({inner_}));
  }
  h = torch::silu(h);

  const auto chosen = project(parts.x, h.to(x.scalar_type()), pass).split({rank_, states_, states_}, -1);
  const auto dt = torch::softplus(project(parts.dt, chosen[0].contiguous(), pass).to(type));
  const auto a = -parts.a_log.to(type).exp().t();
  const auto [y, state] = selective_scan(h, dt, a, chosen[1].to(type), chosen[2].to(type),
                                         held.empty() ? Tensor() : held[1].to(type), t.what);
  if (pass.cache) {
    const auto window = t.window.defined() ? rows.index_select(0, t.window).view({batch, past, inner_})
                                           : inputs.narrow(1, tokens, past).contiguous();
    pass.cache->set_state(pass.slot, {window, state}, tokens);
  }
  return project(parts.out, ((y + h * parts.skip.to(type)) * torch::silu(gate)).to(x.scalar_type()), pass);
}

namespace {

struct MambaConfig {
  int64_t state = 16, expand = 2, kernel = 4, rank = 0;
  bool conv_bias = true, bias = false;
  double dt_min = 1e-3, dt_max = 0.1, dt_floor = 1e-4, dt_scale = 1.0;
  std::string dt_init = "random";
  void fields(Fields& f) {
    f("state", state, "numbers of state a channel").min(1).max(256);
    f("expand", expand, "channels, in hidden sizes of the model").min(1).max(64);
    f("kernel", kernel, "tokens that the convolution sees").min(1).max(64);
    f("rank", rank, "rank of the time step (0: the hidden size over 16, rounded up)").min(0);
    f("conv_bias", conv_bias, "the convolution has a bias");
    f("bias", bias, "in_proj and out_proj have biases");
    f("dt_min", dt_min, "smallest time step at the start").min(1e-9);
    f("dt_max", dt_max, "largest time step at the start").min(1e-9);
    f("dt_floor", dt_floor, "what time steps at the start are raised to").min(1e-9);
    f("dt_init", dt_init, "what dt_proj starts from, its size being dt_scale / sqrt(rank)")
        .choices({"random", "constant"});
    f("dt_scale", dt_scale, "see dt_init").min(1e-9);
  }
  std::string problem() const {
    return dt_min <= dt_max ? "" : fmt::format("`dt_min` {} is above `dt_max` {}", dt_min, dt_max);
  }
};

// The bias whose softplus is a time step between dt_min and dt_max, even in its logarithm.
Init step_init(const MambaConfig& c) {
  return [c](Tensor t) {
    const auto dt = torch::empty_like(t).uniform_(std::log(c.dt_min), std::log(c.dt_max)).exp().clamp_min(c.dt_floor);
    t.copy_(dt + torch::log(-torch::expm1(-dt)));
  };
}

const RegisterMethod registered(
    {.slug = "mamba",
     .kind = "part",
     .title = "Mamba",
     .summary = "a selective state space in place of attention",
     .paper = {"Mamba: Linear-Time Sequence Modeling with Selective State Spaces", "Gu and Dao", 2023, "2312.00752"},
     .sites = {"attention"},
     .config = describe<MambaConfig>,
     .make = MakeAttention([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<AttentionBase> {
       const auto c = parse<MambaConfig>(settings, "mamba");
       const int64_t d = site.hidden, inner = c.expand * d, rank = c.rank > 0 ? c.rank : (d + 15) / 16;
       const double size = c.dt_scale / std::sqrt(static_cast<double>(rank));
       Mamba::Parts parts;
       parts.in = site.own.linear("in_proj", d, 2 * inner, c.bias, uniform_init());
       parts.conv = site.own.get("conv1d.weight", {inner, 1, c.kernel}, uniform_init());
       if (c.conv_bias)
         parts.conv_bias = site.own.get("conv1d.bias", {inner}, [&](Tensor t) {
           const double bound = 1.0 / std::sqrt(static_cast<double>(c.kernel));
           t.uniform_(-bound, bound);
         });
       parts.x = site.own.linear("x_proj", inner, rank + 2 * c.state, false, uniform_init());
       parts.dt = site.own.linear(
           "dt_proj", rank, inner, [&](Tensor t) { c.dt_init == "random" ? t.uniform_(-size, size) : t.fill_(size); },
           step_init(c));
       parts.a_log = site.own.get("A_log", {inner, c.state}, [](Tensor t) {
         t.copy_(torch::arange(1, t.size(1) + 1, t.options()).log().expand_as(t));
       });
       parts.skip = site.own.get("D", {inner}, constant_init(1.0));
       parts.out = site.own.linear("out_proj", inner, d, c.bias, uniform_init());
       return std::make_shared<Mamba>(std::move(parts));
     })});

}  // namespace
}  // namespace moiety
