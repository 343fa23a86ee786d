#pragma once
// How products with block-quantized weights are computed, for the whole process.

namespace moiety {

enum class BlockArithmetic {
  automatic,  ///< activations rounded to 8 bits where that is faster: always with packed products, else up to 8 rows
  rounded,    ///< activations rounded to 8 bits for any number of rows, as llama.cpp computes
};

/// What matrices use that are not `exact`, are on the CPU and outside of a graph. For its lifetime; not to be changed
/// while another thread computes.
class WithBlockArithmetic {
 public:
  explicit WithBlockArithmetic(BlockArithmetic arithmetic);
  ~WithBlockArithmetic();
  WithBlockArithmetic(const WithBlockArithmetic&) = delete;
  WithBlockArithmetic& operator=(const WithBlockArithmetic&) = delete;

 private:
  BlockArithmetic before_;
};

BlockArithmetic block_arithmetic();

}  // namespace moiety
