#pragma once
// Mapped tensors as torch tensors, without a copy.
#include <torch/types.h>

#include "moiety/io/tensor_view.h"

namespace moiety {

/// The torch dtype of a plain format; Error for block formats.
torch::Dtype torch_dtype(Format format);
/// The format of a torch dtype; Error for dtypes that files do not hold.
Format format_of(torch::Dtype dtype);
/// Zero-copy view of a plain tensor (copied only when the file left it unaligned). Reading only: the file's pages are
/// mapped read-only. The mapping lives as long as the tensor.
torch::Tensor as_tensor(const TensorView& view);
/// The other way: a tensor as a view in a plain format, converted where it has another; the view keeps it alive.
TensorView view_of(const torch::Tensor& t, Format format);
/// Any format, decoded, as a new f32 tensor of the view's shape (rows in parallel).
torch::Tensor dequantize(const TensorView& view);
/// Rows [begin, end) of the first dimension of a view with two or more dimensions; leading slices of a stack [E, ...]
/// too.
TensorView slice_rows(const TensorView& view, int64_t begin, int64_t end);
/// Element `index` of the first dimension: [E, out, in] -> [out, in].
TensorView select_first(const TensorView& view, int64_t index);

}  // namespace moiety
