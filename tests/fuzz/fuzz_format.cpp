// Block formats: any bytes decode, the same on every instruction set; any floats encode or are refused.
#include <cmath>
#include <cstring>
#include <vector>

#include "fuzz.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/format.h"

using namespace moiety;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  const FormatInfo& format = formats()[input.byte() % formats().size()];
  bool encode = (input.byte() & 1) != 0;
  auto rest = input.rest();
  if (encode) {
    std::vector<float> x(rest.size() / sizeof(float));
    x.resize(x.size() - x.size() % static_cast<size_t>(format.block));
    if (!x.empty()) std::memcpy(x.data(), rest.data(), x.size() * sizeof(float));
    auto cols = static_cast<int64_t>(x.size());
    std::vector<std::byte> blocks(static_cast<size_t>(row_bytes(format.format, cols)));
    std::vector<float> back(x.size());
    if (fuzz::accepted([&] { quantize_row(format.format, x.data(), blocks.data(), cols); }))
      dequantize_row(format.format, blocks.data(), back.data(), cols);
    return 0;
  }
  auto cols = static_cast<int64_t>(rest.size()) / format.bytes * format.block;
  std::vector<std::byte> blocks(rest.begin(), rest.begin() + row_bytes(format.format, cols));
  std::vector<float> first(static_cast<size_t>(cols)), second(first.size());
  auto decode = [&](Isa isa, std::vector<float>& out) {
    set_isa(isa);
    return fuzz::accepted([&] { dequantize_row(format.format, blocks.data(), out.data(), cols); });
  };
  bool one = decode(Isa::Portable, first), other = decode(best_isa(), second);
  fuzz::require(one == other, "instruction sets of which one refuses");
  if (!one) return 0;
  for (size_t i = 0; i < first.size(); ++i) {
    bool same =
        std::memcmp(&first[i], &second[i], sizeof(float)) == 0 || (std::isnan(first[i]) && std::isnan(second[i]));
    fuzz::require(same, "instruction sets that decode differently");
  }
  return 0;
}
