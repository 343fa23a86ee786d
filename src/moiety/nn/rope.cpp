#include "moiety/nn/rope.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/kernels/token.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

double number(const nlohmann::json& p, const char* key, double fallback) {
  const auto it = p.find(key);
  if (it == p.end() || it->is_null()) return fallback;
  check(it->is_number(), "rope parameters: '{}' is {}, not a number", key, it->dump());
  return it->get<double>();
}

bool flag(const nlohmann::json& p, const char* key, bool fallback) {
  const auto it = p.find(key);
  if (it == p.end() || it->is_null()) return fallback;
  check(it->is_boolean(), "rope parameters: '{}' is {}, not true or false", key, it->dump());
  return it->get<bool>();
}

double need(const nlohmann::json& p, const char* key, const std::string& type) {
  const auto it = p.find(key);
  check(it != p.end() && it->is_number(), "rope scaling of type '{}' needs the number '{}'", type, key);
  return it->get<double>();
}

double yarn_mscale(double scale, double mscale) {
  return scale <= 1.0 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

// x [B, H, T, D], f32 or bf16 -> the same, in memory as [B, T, H, D]; angles [1 or B, 1, T, half] f32.
template <class T>
torch::Tensor rotate_heads(const torch::Tensor& x, const torch::Tensor& cosine, const torch::Tensor& sine, int64_t half,
                           bool interleaved) {
  const int64_t heads = x.size(1), time = x.size(2), size = x.size(3);
  auto out = torch::empty({x.size(0), time, heads, size}, x.options());
  const auto* from = bits<T>(x);
  const float *c = cosine.const_data_ptr<float>(), *s = sine.const_data_ptr<float>();
  const int64_t row = cosine.size(0) == 1 ? 0 : time;  // angles of another row of the batch
  auto* to = bits<T>(out);
  parallel_for(0, x.size(0) * time, std::max<int64_t>(1, 32768 / (heads * size)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / time, t = i % time, angle = (b * row + t) * half;
      for (int64_t h = 0; h < heads; ++h)
        rotate_head(from + b * x.stride(0) + h * x.stride(1) + t * x.stride(2), c + angle, s + angle, half, interleaved,
                    to + (i * heads + h) * size, size);
    }
  });
  return out.transpose(1, 2);
}

torch::Tensor rotated(const torch::Tensor& x, const torch::Tensor& cosine, const torch::Tensor& sine, int64_t half,
                      bool interleaved) {
  const auto rows = x.stride(3) == 1 ? x : x.contiguous();
  return x.scalar_type() == torch::kFloat32 ? rotate_heads<float>(rows, cosine, sine, half, interleaved)
                                            : rotate_heads<at::BFloat16>(rows, cosine, sine, half, interleaved);
}

// Back is the rotation by the opposite angles.
class Rotate : public torch::autograd::Function<Rotate> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& cosine, const torch::Tensor& sine, int64_t half, bool interleaved) {
    context->save_for_backward({cosine, sine});
    context->saved_data["half"] = half;
    context->saved_data["interleaved"] = interleaved;
    return rotated(x, cosine, sine, half, interleaved);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto saved = context->get_saved_variables();
    return {rotated(grads[0], saved[0], -saved[1], context->saved_data["half"].toInt(),
                    context->saved_data["interleaved"].toBool()),
            torch::Tensor(), torch::Tensor(), torch::Tensor(), torch::Tensor()};
  }
};

}  // namespace

Rope::Rope(const RopeConfig& config) : config_(config) {
  if (config_.type == "su") config_.type = "longrope";
  check(config_.partial >= 0.0 && config_.partial <= 1.0, "the share of features to rotate must lie in 0 .. 1, not {}",
        config_.partial);
  dim_ = static_cast<int64_t>(static_cast<double>(config_.head_dim) * config_.partial);
  check(dim_ > 0 && dim_ % 2 == 0,
        "rotary dimension must be even and positive, not {} (head size {}, partial factor {})", dim_, config_.head_dim,
        config_.partial);
  const auto& p = config_.parameters;
  if (config_.type == "yarn") {
    const double original = number(p, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    const double factor = number(p, "factor", static_cast<double>(config_.max_positions) / original);
    const double mscale = number(p, "mscale", 0.0), all = number(p, "mscale_all_dim", 0.0);
    const double fallback =
        mscale != 0.0 && all != 0.0 ? yarn_mscale(factor, mscale) / yarn_mscale(factor, all) : yarn_mscale(factor, 1.0);
    attention_factor_ = number(p, "attention_factor", fallback);
  } else if (config_.type == "longrope") {
    const double original = number(p, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    const double factor = number(p, "factor", static_cast<double>(config_.max_positions) / original);
    attention_factor_ =
        number(p, "attention_factor", factor <= 1.0 ? 1.0 : std::sqrt(1.0 + std::log(factor) / std::log(original)));
  }
  check(std::isfinite(attention_factor_), "rope parameters of type '{}' give an attention factor that is not finite",
        config_.type);
  // Reports a bad configuration now, for short and for long sequences.
  for (const int64_t length : {int64_t{1}, int64_t{1} << 40})
    for (const float f : frequencies(length))
      check(std::isfinite(f) && f >= 0.0f, "rope parameters of type '{}' give a frequency of {}", config_.type, f);
  if (config_.type != "dynamic" && config_.type != "longrope" && !config_.scale_by_length) always_ = frequencies(0);
}

std::vector<float> Rope::frequencies(int64_t length) const {
  const auto& p = config_.parameters;
  const int64_t n = dim_ / 2;
  const double d = static_cast<double>(dim_);
  double theta = config_.theta;
  if (config_.type == "dynamic") {
    const double factor = need(p, "factor", config_.type), max = static_cast<double>(config_.max_positions);
    const double length_now = std::max(max, static_cast<double>(length));
    theta *= std::pow(factor * length_now / max - (factor - 1.0), d / (d - 2.0));
  }
  std::vector<float> f(n);
  for (int64_t i = 0; i < n; ++i)
    f[i] = 1.0f / std::pow(static_cast<float>(theta), static_cast<float>(2 * i) / static_cast<float>(dim_));
  if (!config_.frequency_divisors.empty()) {
    check(static_cast<int64_t>(config_.frequency_divisors.size()) == n, "rope divisors: {} given, {} needed",
          config_.frequency_divisors.size(), n);
    for (int64_t i = 0; i < n; ++i) f[i] /= config_.frequency_divisors[i];
    return f;
  }
  if (config_.type == "default" || config_.type == "dynamic") return f;
  if (config_.type == "linear") {
    const auto factor = static_cast<float>(need(p, "factor", config_.type));
    for (float& x : f) x /= factor;
  } else if (config_.type == "llama3") {
    const double factor = need(p, "factor", config_.type), low = need(p, "low_freq_factor", config_.type),
                 high = need(p, "high_freq_factor", config_.type),
                 old = need(p, "original_max_position_embeddings", config_.type);
    for (float& x : f) {
      const double wavelength = 2.0 * std::numbers::pi / x;
      if (wavelength > old / low) {
        x = static_cast<float>(x / factor);
      } else if (wavelength >= old / high) {
        const double smooth = (old / wavelength - low) / (high - low);
        x = static_cast<float>((1.0 - smooth) * x / factor + smooth * x);
      }
    }
  } else if (config_.type == "yarn") {
    const double old = number(p, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    const double factor = number(p, "factor", static_cast<double>(config_.max_positions) / old);
    const double beta_fast = number(p, "beta_fast", 32.0), beta_slow = number(p, "beta_slow", 1.0);
    const auto correction = [&](double rotations) {
      return d * std::log(old / (rotations * 2.0 * std::numbers::pi)) / (2.0 * std::log(config_.theta));
    };
    double low = correction(beta_fast), high = correction(beta_slow);
    if (flag(p, "truncate", true)) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, d - 1.0);
    if (low == high) high += 0.001;
    for (int64_t i = 0; i < n; ++i) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      f[i] = static_cast<float>(f[i] / factor * ramp + f[i] * (1.0 - ramp));
    }
  } else if (config_.type == "longrope") {
    const double old = number(p, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    const char* key = static_cast<double>(length) > old && !config_.scale_by_length ? "long_factor" : "short_factor";
    const auto it = p.find(key);
    check(it != p.end() && it->is_array() && static_cast<int64_t>(it->size()) == n,
          "rope scaling of type 'longrope' needs '{}' with {} numbers", key, n);
    for (int64_t i = 0; i < n; ++i) {
      check(it->at(i).is_number(), "rope parameters: '{}' holds {}, not a number", key, it->at(i).dump());
      f[i] /= it->at(i).get<float>();
    }
  } else {
    fail("unknown rope type '{}'; known are default, linear, dynamic, yarn, longrope, llama3", config_.type);
  }
  return f;
}

std::pair<torch::Tensor, torch::Tensor> Rope::angles(const torch::Tensor& positions) const {
  double factor = attention_factor_;
  int64_t length = 0;
  if (always_.empty()) length = positions.numel() == 0 ? 0 : positions.max().item<int64_t>() + 1;
  if (config_.scale_by_length && config_.type != "default") {
    const double old =
        number(config_.parameters, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    factor = need(config_.parameters, static_cast<double>(length) > old ? "long_mscale" : "short_mscale", config_.type);
  }
  const std::vector<float> now = always_.empty() ? frequencies(length) : std::vector<float>();
  const std::vector<float>& f = always_.empty() ? now : always_;
  torch::Tensor angle;
  if (positions.is_cpu() && positions.scalar_type() == torch::kInt64) {
    // Without torch: a decoded token comes here, and what it has not called lately is not in the caches.
    const auto rows = positions.contiguous();
    const auto n = static_cast<int64_t>(f.size());
    angle = torch::empty({positions.size(0), 1, positions.size(1), n}, torch::kFloat32);
    float* to = angle.data_ptr<float>();
    for (int64_t i = 0; i < rows.numel(); ++i)
      for (int64_t j = 0; j < n; ++j)
        *to++ = static_cast<float>(rows.const_data_ptr<int64_t>()[i]) * f[static_cast<size_t>(j)];
  } else {
    const auto frequency = torch::tensor(f, torch::kFloat32).to(positions.device());
    angle = positions.to(torch::kFloat32).unsqueeze(1).unsqueeze(-1) * frequency;
  }
  auto c = angle.cos(), s = angle.sin();
  if (factor != 1.0) {
    c = c * factor;
    s = s * factor;
  }
  return {c, s};
}

torch::Tensor Rope::rotate(const torch::Tensor& x, const std::pair<torch::Tensor, torch::Tensor>& angles) const {
  const bool has_kernel = x.scalar_type() == torch::kFloat32 || x.scalar_type() == torch::kBFloat16;
  if (x.is_cpu() && has_kernel && x.dim() == 4 && !angles.first.requires_grad()) {
    const auto cosine = angles.first.contiguous(), sine = angles.second.contiguous();
    return may_shorten({x}) ? rotated(x, cosine, sine, dim_ / 2, config_.interleaved)
                            : Rotate::apply(x, cosine, sine, dim_ / 2, config_.interleaved);
  }
  const auto c = angles.first.to(x.scalar_type()), s = angles.second.to(x.scalar_type());
  const auto turned = x.size(-1) == dim_ ? x : x.narrow(-1, 0, dim_);
  torch::Tensor out;
  if (config_.interleaved) {
    const auto pairs = turned.unflatten(-1, {dim_ / 2, 2});
    const auto a = pairs.select(-1, 0), b = pairs.select(-1, 1);
    out = torch::stack({a * c - b * s, b * c + a * s}, -1).flatten(-2);
  } else {
    const auto a = turned.narrow(-1, 0, dim_ / 2), b = turned.narrow(-1, dim_ / 2, dim_ / 2);
    out = torch::cat({a * c - b * s, b * c + a * s}, -1);
  }
  return x.size(-1) == dim_ ? out : torch::cat({out, x.narrow(-1, dim_, x.size(-1) - dim_)}, -1);
}

}  // namespace moiety
