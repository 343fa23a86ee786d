// moiety compress --method low-rank-sparse: what a run with that part has learned, without the rows that are zero.
#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "compress.h"
#include "moiety/compress/low_rank_sparse.h"
#include "moiety/io/checkpoint_writer.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

int64_t bytes_of(const Checkpoint& checkpoint) {
  int64_t bytes = 0;
  for (const TensorInfo& t : checkpoint.tensors())
    if (t.name.find(".adapters.") == std::string::npos) bytes += t.bytes();
  return bytes;
}

int run(const CompressArguments& a) {
  const auto trained = Checkpoint::open(a.model);
  const int64_t before = bytes_of(*trained);
  const auto small = compact_low_rank_sparse(trained);
  int64_t stored = 0, all = 0, matrices = 0;
  for (const TensorInfo& t : small->tensors()) {
    if (t.name.ends_with(".left")) all += t.shape[0], ++matrices;
    if (t.name.ends_with(".index")) stored += t.shape[0];
  }
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  const WriteReport written = write_hf(*small, a.out, write);
  if (a.json) {
    std::cout << json{{"output", a.out},        {"written", !a.dry_run},
                      {"bytes_before", before}, {"bytes", written.bytes},
                      {"matrices", matrices},   {"rows", all},
                      {"rows_stored", stored},  {"config", small->config()["moiety"]}}
                     .dump(2)
              << "\n";
    return 0;
  }
  fmt::print("{} matrices of experts: low rank, and {} of {} rows ({:.1f} %)\n{} {}: {:.1f} MiB, {:.1f} MiB before\n",
             matrices, stored, all,
             100.0 * static_cast<double>(stored) / static_cast<double>(std::max<int64_t>(1, all)),
             a.dry_run ? "would write" : "wrote", a.out, static_cast<double>(written.bytes) / 1048576.0,
             static_cast<double>(before) / 1048576.0);
  return 0;
}

CompressWay setup(CLI::App&, std::shared_ptr<const CompressArguments> a) {
  return {"--method low-rank-sparse", [a] { return a->method == "low-rank-sparse"; }, [a] { return run(*a); }};
}

const RegisterCompress low_rank_sparse("low-rank-sparse", setup);

}  // namespace
}  // namespace moiety::cli
