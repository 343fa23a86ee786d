#include "moiety/adapt/corda.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kLeast = 1e-12, kLargestLambda = 1e3, kInverseError = 0.05;

bool finite(const Tensor& t) {
  return torch::isfinite(t).all().item<bool>();
}

}  // namespace

void CordaCovariance::add(const Tensor& x) {
  const torch::NoGradGuard frozen;
  check(x.dim() == 2 && x.size(0) > 0, "a sample for {} has no rows", site_);
  const auto f = x.to(torch::kCPU, torch::kFloat32);
  check(finite(f), "non-finite activation at {}, sample {}", site_, samples_);
  const double most = std::abs(f.max().item<double>());
  check(most >= kLeast, "the largest activation at {}, sample {}, is {}: it cannot be scaled by it", site_, samples_,
        most);
  const auto scaled = f / most;
  if (!sum_.defined()) sum_ = torch::zeros({f.size(1), f.size(1)});
  check(sum_.size(0) == f.size(1), "a sample for {} has {} features, those before {}", site_, f.size(1), sum_.size(0));
  sum_.addmm_(scaled.t(), scaled);
  sizes_ = sizes_.defined() ? sizes_ + f.abs().mean(0) : f.abs().mean(0);
  ++samples_;
}

Tensor CordaCovariance::value() const {
  check(samples_ > 0, "{} has seen no calibration data", site_);
  check(finite(sum_), "the second moment at {} is not finite", site_);
  return sum_ / static_cast<double>(samples_);
}

void CordaCovariance::restore(Tensor sum, int64_t samples, Tensor sizes) {
  sum_ = std::move(sum);
  sizes_ = std::move(sizes);
  samples_ = samples;
}

void CordaWatch::apply(const Tensor& x, std::vector<Tensor>&, Pass& pass) {
  // Every row of the batch is a sample.
  const auto rows = x.dim() == 3 ? x : x.unsqueeze(0);
  for (int64_t b = 0; b < rows.size(0); ++b) {
    auto sample = rows[b];
    if (pass.mask.defined() && pass.mask.size(0) == rows.size(0) && pass.mask.size(1) == sample.size(0))
      sample = sample.index_select(0, pass.mask[b].nonzero().squeeze(1));
    covariance.add(sample);
  }
}

Damped damped(const Tensor& covariance, const std::string& site) {
  const torch::NoGradGuard frozen;
  check(covariance.dim() == 2 && covariance.size(0) == covariance.size(1), "the second moment at {} is no square",
        site);
  check(finite(covariance), "the second moment at {} is not finite", site);
  const auto c = covariance.to(torch::kFloat32);
  const auto one = torch::eye(c.size(0), c.options());
  const double level = c.diagonal().mean().item<double>();
  Damped out;
  // As the authors test it: in single precision.
  for (;; out.lambda *= 2.0) {
    check(out.lambda <= kLargestLambda, "the second moment at {} cannot be inverted, even damped by {}", site,
          out.lambda);
    const auto lifted = c + (out.lambda * level) * one;
    const auto [inverse, info] = torch::linalg_inv_ex(lifted, /*check_errors=*/false);
    if (info.item<int>() == 0 && finite(inverse) &&
        (torch::matmul(lifted, inverse) - one).norm().item<double>() < kInverseError)
      break;
  }
  out.matrix = c.to(torch::kFloat64) + (out.lambda * level) * one.to(torch::kFloat64);
  out.inverse = torch::linalg_inv(out.matrix);
  return out;
}

CordaAdapter corda_decompose(const Tensor& weight, const Tensor& covariance, const std::string& method, int64_t rank,
                             double alpha, const std::string& site) {
  check(weight.size(1) == covariance.size(0), "the second moment at {} is of {} features, the matrix has {}", site,
        covariance.size(0), weight.size(1));
  const int64_t q = std::min(weight.size(0), weight.size(1));
  check(rank >= 1 && rank <= q, "rank {} at {}: 1 to {} are possible", rank, site, q);
  return corda_decompose(weight, damped(covariance, site), method, rank, alpha, site);
}

CordaAdapter corda_decompose(const Tensor& weight, const Damped& d, const std::string& method, int64_t rank,
                             double alpha, const std::string& site) {
  const torch::NoGradGuard frozen;
  check(method == "ipm" || method == "kpm", "unknown mode `{}`; known are ipm and kpm", method);
  check(weight.size(1) == d.matrix.size(0), "the second moment at {} is of {} features, the matrix has {}", site,
        d.matrix.size(0), weight.size(1));
  const int64_t q = std::min(weight.size(0), weight.size(1));
  check(rank >= 1 && rank <= q, "rank {} at {}: 1 to {} are possible", rank, site, q);
  const auto w = weight.to(torch::kFloat64);
  const auto [u, s, v] = torch::linalg_svd(torch::matmul(w, d.matrix), /*full_matrices=*/false);
  const auto back = torch::matmul(v, d.inverse);
  CordaAdapter out;
  out.s = s.to(weight.scalar_type());
  int64_t begin = 0;
  if (method == "kpm") {
    const int64_t there = (s > 1e-6 * s[0]).sum().item<int64_t>();
    check(there >= rank, "{} has {} components that are not zero, fewer than the rank of {}", site, there, rank);
    out.skipped = q - there;
    begin = there - rank;
  }
  const double scale = alpha / static_cast<double>(rank);
  check(scale > 0.0, "alpha has to be above 0");
  const auto root = (s.narrow(0, begin, rank) / scale).clamp_min(0.0).sqrt();
  const auto a = root.unsqueeze(1) * back.narrow(0, begin, rank), b = u.narrow(1, begin, rank) * root;
  out.residual = (w - scale * torch::matmul(b, a)).to(weight.scalar_type());
  out.a = a.to(weight.scalar_type()).contiguous();
  out.b = b.to(weight.scalar_type()).contiguous();
  return out;
}

Tensor corda_compress(const Tensor& weight, const std::string& kind, const Tensor& by, int64_t drop, double alpha) {
  const torch::NoGradGuard frozen;
  const int64_t q = std::min(weight.size(0), weight.size(1));
  check(drop >= 0 && drop <= q, "{} components cannot go: there are {}", drop, q);
  const auto w = weight.to(torch::kFloat64);
  Tensor forth, back;
  if (kind == "corda") {
    const Damped d = damped(by);
    forth = d.matrix;
    back = d.inverse;
  } else if (kind == "asvd") {
    check(by.dim() == 1 && by.size(0) == weight.size(1), "asvd needs a size for each of {} features", weight.size(1));
    const auto scale = by.to(torch::kFloat64).pow(alpha) + 1e-6;
    forth = torch::diag(scale);
    back = torch::diag(scale.reciprocal());
  } else {
    check(kind == "svd", "unknown kind `{}`; known are corda, asvd and svd", kind);
    forth = back = torch::eye(weight.size(1), w.options());
  }
  const auto [u, s, v] = torch::linalg_svd(torch::matmul(w, forth), /*full_matrices=*/false);
  const int64_t kept = q - drop;
  const auto left = u.narrow(1, 0, kept) * s.narrow(0, 0, kept);
  return torch::matmul(left, torch::matmul(v.narrow(0, 0, kept), back)).to(weight.scalar_type());
}

LoraPair corda_to_lora(const LoraPair& before, const LoraPair& after) {
  check(before.a.sizes() == after.a.sizes() && before.b.sizes() == after.b.sizes(),
        "the adapter before and after training has different shapes");
  return {torch::cat({after.a, -before.a}), torch::cat({after.b, before.b}, 1)};
}

}  // namespace moiety
