#include "moiety/nn/linear.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/dot.h"
#include "moiety/kernels/matmul.h"
#include "moiety/nn/arithmetic.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/dense.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/packed.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/products.h"
#include "moiety/nn/shortcut.h"
#include "moiety/nn/tasks.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

// Elements of W decoded at a time: the f32 copy of a piece stays near the core until the matmul has read it.
constexpr int64_t kPieceElements = int64_t{1} << 20;

torch::Tensor cast(const torch::Tensor& t, torch::Dtype dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

template <class Use>
void for_pieces(const TensorView& blocks, torch::Device device, Use use) {
  const int64_t out = blocks.shape[0], piece = std::max<int64_t>(1, kPieceElements / blocks.shape[1]);
  for (int64_t begin = 0; begin < out; begin += piece) {
    const int64_t end = std::min(out, begin + piece);
    use(begin, end, dequantize(slice_rows(blocks, begin, end)).to(device));
  }
}

// Whether products of x with decoded pieces run on our own kernels.
bool by_tasks(const torch::Tensor& x) {
  const auto type = x.scalar_type();
  return x.is_cpu() && x.stride(-1) == 1 && (type == torch::kFloat32 || type == torch::kBFloat16) && matmul_is_fast();
}

// Rows of W that a task decodes: few enough for all threads to have some, enough for the products.
int64_t rows_of_a_task(const TensorView& blocks) {
  const int64_t most = std::max<int64_t>(32, kPieceElements / 4 / std::max<int64_t>(blocks.shape[1], 1));
  return std::clamp<int64_t>(blocks.shape[0] / many_tasks(), 32, std::min<int64_t>(most, 256));
}

// x [n, in] -> x W^T [n, out], in x's dtype.
torch::Tensor times_transposed(const torch::Tensor& x, const TensorView& blocks) {
  auto y = torch::empty({x.size(0), blocks.shape[0]}, x.options());
  if (by_tasks(x)) {
    const int64_t out = blocks.shape[0], piece = rows_of_a_task(blocks);
    run_tasks((out + piece - 1) / piece, [&](int64_t i) {
      const int64_t begin = i * piece, end = std::min(out, begin + piece);
      multiply(y.slice(1, begin, end), {x}, {dequantize(slice_rows(blocks, begin, end)), true});
    });
    return y;
  }
  for_pieces(blocks, x.device(), [&](int64_t begin, int64_t end, const torch::Tensor& w) {
    y.slice(1, begin, end).copy_(at::matmul(x, w.to(x.scalar_type()).t()));
  });
  return y;
}

// Rows of x that one read of the weights serves. Up to so many go through the integer kernels; more rows pay for
// decoding the weights and then run at the speed of a dense matmul.
constexpr int64_t kKernelRows = 8;

// x [n, in] f32 on the CPU -> [n, out]. Activations are rounded to 8 bits as the format's products define it; a row's
// result does not depend on the rows beside it.
torch::Tensor times_kernel(const torch::Tensor& input, const TensorView& blocks) {
  const auto x = input.contiguous();
  const int64_t n = x.size(0), out = blocks.shape[0], in = blocks.shape[1], bytes = row_bytes(blocks.format, in);
  std::vector<QuantizedRow> rows(static_cast<size_t>(n));
  parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      quantize_activations(blocks.format, x.const_data_ptr<float>() + t * in, in, rows[static_cast<size_t>(t)]);
  });
  auto y = torch::empty({n, out}, x.options());
  float* data = y.data_ptr<float>();
  parallel_for(0, out, std::max<int64_t>(8, 32768 / in), [&](int64_t first, int64_t last) {
    // A piece of the weights stays near the core until all rows of x have used it.
    const int64_t piece = n <= kKernelRows ? last - first : std::max<int64_t>(8, 65536 / bytes);
    for (int64_t begin = first; begin < last; begin += piece) {
      const int64_t end = std::min(last, begin + piece);
      for (int64_t t = 0; t < n; t += kKernelRows) {
        const std::span<const QuantizedRow> use(rows.data() + t, static_cast<size_t>(std::min(kKernelRows, n - t)));
        dot_rows(blocks.format, blocks.data.data() + begin * bytes, end - begin, in, use, data + t * out + begin, out);
      }
    }
  });
  return y;
}

// Elements from which on a matrix is read from memory rather than from the caches.
constexpr int64_t kReadElements = int64_t{1} << 18;

// x [..., in] of few rows -> x W^T + b [..., out] in x's type, every number a dot product in f32 of its own.
torch::Tensor times_rows(const torch::Tensor& x, const torch::Tensor& w, const torch::Tensor& bias) {
  const auto flat = cast(x, torch::kFloat32).contiguous();
  const int64_t in = x.size(-1), out = w.size(0), n = flat.numel() / in;
  const PlainRows rows = plain_rows_of(w);
  auto shape = x.sizes().vec();
  shape.back() = out;
  auto y = torch::empty(shape, flat.options());
  const auto* from = flat.const_data_ptr<float>();
  auto* to = y.data_ptr<float>();
  parallel_for(0, out, std::max<int64_t>(8, kReadElements / 4 / in),
               [&](int64_t first, int64_t last) { plain_products(rows, in, first, last, from, n, to, out); });
  if (bias.defined()) y.add_(cast(bias, torch::kFloat32));
  return cast(y, x.scalar_type());
}

// x [..., in] bf16 -> x W^T [..., out] where products of bf16 are slow: in f32, by pieces of the weights.
torch::Tensor times_widened(const torch::Tensor& x, const torch::Tensor& w) {
  const auto flat = x.reshape({-1, x.size(-1)}).to(torch::kFloat32);
  auto y = torch::empty({flat.size(0), w.size(0)}, x.options());
  const int64_t piece = std::max<int64_t>(1, kPieceElements / w.size(1));
  for (int64_t begin = 0; begin < w.size(0); begin += piece) {
    const int64_t end = std::min(w.size(0), begin + piece);
    y.slice(1, begin, end).copy_(at::matmul(flat, w.slice(0, begin, end).to(torch::kFloat32).t()));
  }
  auto shape = x.sizes().vec();
  shape.back() = w.size(0);
  return y.view(shape);
}

// Rows of a float matrix up to which dot products keep up with a matrix product.
constexpr int64_t kFewOutputs = 512;

// Keeps the blocks alive inside a graph; the matrix is decoded again in the backward pass instead of being kept.
struct Blocks : torch::CustomClassHolder {
  explicit Blocks(std::shared_ptr<const TensorView> view) : view(std::move(view)) {}
  std::shared_ptr<const TensorView> view;
};

class FrozenMatmul : public torch::autograd::Function<FrozenMatmul> {
 public:
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               c10::intrusive_ptr<Blocks> blocks) {
    context->saved_data["blocks"] = c10::IValue::make_capsule(blocks);
    return times_transposed(x, *blocks->view);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list grads) {
    const auto blocks = c10::static_intrusive_pointer_cast<Blocks>(context->saved_data["blocks"].toCapsule());
    // Sums over pieces are taken in f32.
    auto grad = torch::zeros({grads[0].size(0), blocks->view->shape[1]}, grads[0].options().dtype(torch::kFloat32));
    const auto dtype = grads[0].scalar_type();
    const auto own = by_tasks(grads[0]);
    const auto ranges = tile_ranges(grad.size(0), many_tasks());
    for_pieces(*blocks->view, grad.device(), [&](int64_t begin, int64_t end, const torch::Tensor& w) {
      if (own)
        run_tasks(static_cast<int64_t>(ranges.size()), [&](int64_t i) {
          const auto [first, last] = ranges[static_cast<size_t>(i)];
          multiply(grad.slice(0, first, last), {grads[0].slice(0, first, last).slice(1, begin, end)}, {w}, true);
        });
      else if (dtype == torch::kFloat32)
        grad.addmm_(grads[0].slice(1, begin, end), w);
      else
        grad.add_(at::matmul(grads[0].slice(1, begin, end), w.to(dtype)));
    });
    return {cast(grad, dtype), torch::Tensor()};
  }
};

BlockArithmetic current = BlockArithmetic::automatic;

torch::Tensor initial(torch::IntArrayRef shape, int64_t in) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(in));
  return torch::empty(shape).uniform_(-bound, bound);
}

}  // namespace

WithBlockArithmetic::WithBlockArithmetic(BlockArithmetic arithmetic) : before_(current) {
  current = arithmetic;
}

WithBlockArithmetic::~WithBlockArithmetic() {
  current = before_;
}

BlockArithmetic block_arithmetic() {
  return current;
}

std::atomic<uint64_t> LinearImpl::changes_{1};

uint64_t matrices_changed() {
  return LinearImpl::changes_;
}

LinearImpl::LinearImpl(int64_t in, int64_t out, bool with_bias) : in_(in), out_(out) {
  weight = register_parameter("weight", initial({out, in}, in));
  if (with_bias) bias = register_parameter("bias", initial({out}, in));
}

LinearImpl::LinearImpl(torch::Tensor w, torch::Tensor b) : in_(w.size(1)), out_(w.size(0)) {
  weight = register_parameter("weight", w, w.requires_grad());
  if (b.defined()) bias = register_parameter("bias", b, b.requires_grad());
}

LinearImpl::LinearImpl(const TensorView& blocks, torch::Tensor b)
    : in_(blocks.shape.at(1)),
      out_(blocks.shape.at(0)),
      blocks_(std::make_shared<const TensorView>(blocks)),
      packable_(can_pack(blocks.format)) {
  if (b.defined()) bias = register_parameter("bias", b, b.requires_grad());
}

LinearImpl::LinearImpl(const TensorInfo& info, std::function<TensorView()> make, torch::Tensor b)
    : LinearImpl(TensorView{info, {}, {}}, std::move(b)) {
  make_ = std::move(make);
}

std::shared_ptr<const TensorView> LinearImpl::blocks() const {
  if (!make_) return blocks_;
  std::call_once(made_once_, [&] { made_ = std::make_shared<const TensorView>(make_()); });
  return made_;
}

void LinearImpl::stream() {
  streamed_ = true;
  ++changes_;
}

bool LinearImpl::pack() {
  if (streamed_ || !packs()) return false;
  std::call_once(pack_once_, [&] { packed_ = std::make_shared<const PackedMatrix>(make_ ? make_() : *blocks_); });
  return true;
}

const PackedMatrix* LinearImpl::packed_for(const torch::Tensor& x) {
  if (!blocks_ || exact || !x.device().is_cpu() || !may_shorten({x})) return nullptr;
  // A copy may have another format than the file's matrix.
  if (streamed_) return place_ ? place_->packed.get() : nullptr;
  return pack() ? packed_.get() : nullptr;
}

namespace {

// x [..., in] through packed matrices -> [..., rows of each] in f32.
std::vector<torch::Tensor> times_packed(std::span<const PackedMatrix* const> matrices, const torch::Tensor& x) {
  const auto flat = cast(x, torch::kFloat32).contiguous();
  const int64_t in = x.size(-1), n = in == 0 ? 0 : flat.numel() / in;
  static thread_local TilesByKind tiles;
  tiles.forget();
  std::vector<torch::Tensor> out;
  std::vector<PackedJob> jobs;
  auto shape = x.sizes().vec();
  for (const PackedMatrix* m : matrices) {
    const QuantizedTiles* own = tiles.get(m->format(), n, in, [&](QuantizedTiles& t) {
      const TileJob job{&t, flat.const_data_ptr<float>(), in};
      quantize_all({&job, 1});
    });
    shape.back() = m->rows();
    out.push_back(torch::empty(shape, flat.options()));
    jobs.push_back({m, own, out.back().data_ptr<float>(), m->rows()});
  }
  run_jobs(jobs);
  return out;
}

void check_width(const LinearImpl& m, const torch::Tensor& x) {
  check(x.size(-1) == m.in(), "a matrix [{}, {}] cannot be applied to {} features", m.out(), m.in(), x.size(-1));
}

torch::Tensor finished(const LinearImpl& m, torch::Tensor y, torch::Dtype dtype) {
  if (m.bias.defined()) y.add_(cast(m.bias, torch::kFloat32));
  return cast(y, dtype);
}

}  // namespace

std::vector<torch::Tensor> multiply_all(std::initializer_list<Linear> matrices, const torch::Tensor& x) {
  std::vector<const PackedMatrix*> packed;
  for (Linear m : matrices) {
    check_width(*m, x);
    if (const PackedMatrix* p = m->packed_for(x)) packed.push_back(p);
  }
  std::vector<torch::Tensor> out;
  std::vector<DenseMatrix> dense;
  for (Linear m : many_rows(x) ? matrices : std::initializer_list<Linear>{}) {
    const bool plain = m->mapped() && !m->quantized() && !m->streamed();
    const DenseMatrix matrix{plain ? as_tensor(*m->mapped()) : m->weight, m->bias};
    if (matrix.weight.defined() && runs_dense(x, matrix)) dense.push_back(matrix);
  }
  if (dense.size() == matrices.size() && dense.size() <= kMostDense) return dense_products(x, dense);
  if (packed.size() < matrices.size()) {
    for (Linear m : matrices) out.push_back(m->multiply(x));
    return out;
  }
  out = times_packed(packed, x);
  size_t i = 0;
  for (Linear m : matrices) {
    out[i] = finished(*m, out[i], x.scalar_type());
    ++i;
  }
  return out;
}

bool LinearImpl::by_dots() const {
  return weight.defined() && out_ <= kFewOutputs && plain_f32(weight) && (!bias.defined() || plain_f32(bias));
}

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  check(attached_.empty(), "a part stands beside this matrix, which is applied in a way that knows of none");
  return multiply(x);
}

torch::Tensor LinearImpl::multiply(const torch::Tensor& x) {
  check_width(*this, x);
  const auto plain = [&](const torch::Tensor& w) {
    const DenseMatrix matrix{w, bias};
    if (runs_dense(x, matrix)) return dense_products(x, {&matrix, 1})[0];
    if (runs_by_rows(x, w) && may_shorten({bias})) return times_rows(x, w, bias);
    static const bool slow_bf16 = !has_fast_bf16_products();
    if (slow_bf16 && x.scalar_type() == torch::kBFloat16 && x.device().is_cpu() && x.numel() > x.size(-1) &&
        may_shorten({x, w, bias})) {
      const auto y = times_widened(x, w);
      return bias.defined() ? y + cast(bias, torch::kBFloat16) : y;
    }
    return at::linear(x, cast(w, x.scalar_type()), bias.defined() ? cast(bias, x.scalar_type()) : bias);
  };
  if (!blocks_) return plain(weight);
  if (const PackedMatrix* packed = packed_for(x))
    return finished(*this, times_packed({&packed, 1}, x)[0], x.scalar_type());
  if (streamed_) {
    check(place_ != nullptr, "'{}' stays on disk and is not in memory now", blocks_->name);
    check(!place_->packed, "'{}' is streamed from disk in a form that only computes without a gradient", blocks_->name);
    if (place_->weight.defined()) return plain(place_->weight);
  } else if (!is_block(blocks_->format)) {
    return plain(as_tensor(*this->blocks()));
  }
  const auto blocks = streamed_ ? place_->blocks : this->blocks();
  auto shape = x.sizes().vec();
  shape.back() = out_;
  const bool graph = torch::GradMode::is_enabled() && x.requires_grad();
  // A graph computes in x's type, as plain weights would; without one there is f32 for nothing.
  const auto flat = graph ? x.reshape({-1, in_}) : cast(x.reshape({-1, in_}), torch::kFloat32);
  const bool rounded = !exact && may_shorten({x}) && flat.device().is_cpu() &&
                       (flat.size(0) <= kKernelRows || current == BlockArithmetic::rounded);
  auto y = graph     ? FrozenMatmul::apply(flat, c10::make_intrusive<Blocks>(blocks))
           : rounded ? times_kernel(flat, *blocks)
                     : times_transposed(flat, *blocks);
  if (bias.defined()) y = y + cast(bias, y.scalar_type());
  return cast(y.view(shape), x.scalar_type());
}

torch::Tensor LinearImpl::rows(const torch::Tensor& ids, torch::Dtype dtype) {
  if (!blocks_) return cast(at::embedding(weight, ids), dtype);
  const auto flat = ids.reshape({-1}).to(torch::kCPU).contiguous();
  auto out = torch::empty({flat.numel(), in_}, torch::kFloat32);
  const auto blocks = this->blocks();
  const int64_t bytes = row_bytes(blocks->format, in_);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t row = flat.const_data_ptr<int64_t>()[i];
    check(row >= 0 && row < out_, "row {} of '{}' does not exist: it has {}", row, blocks->name, out_);
    dequantize_row(blocks->format, blocks->data.data() + row * bytes, out.data_ptr<float>() + i * in_, in_);
  }
  auto shape = ids.sizes().vec();
  shape.push_back(in_);
  return out.view(shape).to(ids.device()).to(dtype);
}

torch::Tensor LinearImpl::dense(torch::Dtype dtype) const {
  return cast(make_ ? dequantize(make_()) : blocks_ ? dequantize(*blocks_) : weight, dtype);
}

PlainRows plain_rows_of(const torch::Tensor& w) {
  const auto type = w.scalar_type();
  const bool known = type == torch::kFloat32 || type == torch::kBFloat16 || type == torch::kFloat16;
  if (!known || !w.is_cpu() || !w.is_contiguous()) return {};
  return {static_cast<const std::byte*>(w.const_data_ptr()), format_of(type)};
}

bool runs_by_rows(const torch::Tensor& x, const torch::Tensor& w, int64_t rows) {
  const auto type = x.scalar_type();
  return x.is_cpu() && x.numel() <= rows * x.size(-1) && w.numel() >= kReadElements &&
         (type == torch::kFloat32 || type == torch::kBFloat16) && may_shorten({x, w}) &&
         plain_rows_of(w).data != nullptr;
}

PlainRows LinearImpl::plain_rows() const {
  if (!blocks_) return plain_rows_of(weight);
  const Format f = blocks_->format;
  if (streamed_ || (f != Format::F32 && f != Format::F16 && f != Format::BF16)) return {};
  return {blocks_->data.data(), f};
}

void plain_products(const PlainRows& rows, int64_t in, int64_t first, int64_t last, const float* x, int64_t n, float* y,
                    int64_t stride) {
  // A piece of the matrix stays in the first cache for all rows of x.
  const int64_t bytes = row_bytes(rows.format, in), piece = n == 1 ? last - first : std::max<int64_t>(1, 16384 / bytes);
  for (int64_t begin = first; begin < last; begin += piece) {
    const int64_t count = std::min(piece, last - begin);
    for (int64_t t = 0; t < n; ++t)
      dot_rows_float(rows.format, rows.data + begin * bytes, count, in, x + t * in, y + t * stride + begin);
  }
}

LinearStackImpl::LinearStackImpl(int64_t count, int64_t in, int64_t out, bool with_bias)
    : count_(count), in_(in), out_(out) {
  weight = register_parameter("weight", initial({count, out, in}, in));
  if (with_bias) bias = register_parameter("bias", initial({count, out}, in));
}

LinearStackImpl::LinearStackImpl(torch::Tensor w, torch::Tensor b)
    : count_(w.size(0)), in_(w.size(2)), out_(w.size(1)) {
  weight = register_parameter("weight", w, w.requires_grad());
  if (b.defined()) bias = register_parameter("bias", b, b.requires_grad());
}

LinearStackImpl::LinearStackImpl(std::vector<Linear> matrices, torch::Tensor b)
    : count_(static_cast<int64_t>(matrices.size())), matrices_(std::move(matrices)) {
  check(!matrices_.empty(), "a stack of matrices needs at least one");
  in_ = matrices_[0]->in();
  out_ = matrices_[0]->out();
  for (size_t e = 0; e < matrices_.size(); ++e) {
    check(matrices_[e]->in() == in_ && matrices_[e]->out() == out_,
          "expert {} is [{}, {}] but expert 0 is [{}, {}]: all experts of a stack have one shape", e,
          matrices_[e]->out(), matrices_[e]->in(), out_, in_);
    register_module(std::to_string(e), matrices_[e]);
  }
  if (b.defined()) bias = register_parameter("bias", b, b.requires_grad());
}

std::shared_ptr<const std::vector<ActivationKind>> LinearStackImpl::packed_kinds() {
  const uint64_t now = matrices_changed();
  const std::lock_guard<std::mutex> guard(packed_kinds_lock_);
  if (packed_kinds_at_ == now) return packed_kinds_;
  packed_kinds_ = nullptr;
  packed_kinds_at_ = now;
  const bool all = !beside_ && std::all_of(matrices_.begin(), matrices_.end(), [](const Linear& l) {
    return l->packs() && !l->streamed() && l->attached().empty() && !l->bias.defined();
  });
  if (!all || matrices_.empty()) return nullptr;
  std::vector<ActivationKind> kinds;
  for (const Linear& l : matrices_) kinds.push_back(activation_kind(l->mapped()->format));
  packed_kinds_ = std::make_shared<const std::vector<ActivationKind>>(std::move(kinds));
  return packed_kinds_;
}

torch::Tensor LinearStackImpl::forward(int64_t index, const torch::Tensor& x) {
  check(index >= 0 && index < count_, "expert {} does not exist: the stack has {}", index, count_);
  if (matrices_.empty()) {
    const auto dtype = x.scalar_type();
    const auto own = weight.select(0, index), own_bias = bias.defined() ? bias.select(0, index) : bias;
    if (runs_by_rows(x, own) && may_shorten({own_bias})) return times_rows(x, own, own_bias);
    return at::linear(x, cast(own, dtype),
                      bias.defined() ? std::optional<torch::Tensor>(cast(own_bias, dtype)) : std::nullopt);
  }
  auto y = matrices_[index]->forward(x);
  return bias.defined() ? y + cast(bias.select(0, index), x.scalar_type()) : y;
}

torch::Tensor LinearStackImpl::dense(int64_t index, torch::Dtype dtype) const {
  return matrices_.empty() ? cast(weight.select(0, index), dtype) : matrices_[index]->dense(dtype);
}

}  // namespace moiety
