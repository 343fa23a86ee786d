// moiety compress --method eaquant: a mixture whose weights and activations take few bits.
#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/compress/eaquant_model.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/tokenizer.h"
#include "moiety/io/whole_matrices.h"
#include "read_texts.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct Options {
  EaquantConfig config;
  int64_t sequences = 128, tokens = 4096;
  bool no_balance = false, plain = false;
};

// Whole pieces of the text, one after another.
std::vector<std::vector<int64_t>> samples_of(const CompressArguments& a, const Options& o,
                                             const Checkpoint& checkpoint) {
  check(!a.calibration.empty(), "give --calibration FILE: the text to calibrate on");
  std::vector<int64_t> ids;
  for (const auto& text : read_texts(*Tokenizer::load(checkpoint), a.calibration, a.limit_tokens))
    ids.insert(ids.end(), text.begin(), text.end());
  const int64_t there = static_cast<int64_t>(ids.size()) / o.tokens;
  check(there >= 1, "the text has {} tokens, fewer than one sequence of {}: give more, or a smaller --sequence-length",
        ids.size(), o.tokens);
  std::vector<std::vector<int64_t>> out;
  for (int64_t s = 0; s < std::min(there, o.sequences); ++s)
    out.emplace_back(ids.begin() + s * o.tokens, ids.begin() + (s + 1) * o.tokens);
  return out;
}

int run(const CompressArguments& a, Options o) {
  if (o.no_balance) o.config.balance_ratio = 0.0;
  if (const auto problem = o.config.problem(); !problem.empty()) fail("{}", problem);
  const auto base = Checkpoint::open(a.model);
  json report;
  std::shared_ptr<const Checkpoint> small;
  {
    std::optional<Progress> bar;
    const auto progress = [&](int64_t done, int64_t all) {
      if (!bar) bar.emplace("eaquant", all, "block");
      bar->set(done);
    };
    small = eaquant_checkpoint(base, o.config, samples_of(a, o, *base), &report, progress, !o.plain);
  }
  int64_t before = 0;
  for (const TensorInfo& t : stored_tensors(*base)) before += t.bytes();
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  const WriteReport written = write_hf(*small, a.out, write);
  report["output"] = a.out;
  report["written"] = !a.dry_run;
  report["packed"] = !o.plain;
  report["bytes_before"] = before;
  report["bytes"] = written.bytes;
  if (a.json) {
    std::cout << report.dump(2) << "\n";
    return 0;
  }
  fmt::print("{:>5} {:>14} {:>10} {:>15} {:>8}\n", "layer", "router agrees", "KL", "fewest tokens", "without");
  for (const json& l : report["layers"])
    if (l.contains("router_kl"))
      fmt::print("{:>5} {:>12.1f} % {:>10.2g} {:>15} {:>8}\n", l["layer"].get<int64_t>(),
                 100.0 * l["router_overlap"].get<double>(), l["router_kl"].get<double>(),
                 l["fewest_tokens"].get<int64_t>(), l["experts_without_tokens"].get<int64_t>());
  fmt::print("\n{} {}: weights of {} bits{}, read in {} bits, routers of {} bits: {:.2f} MiB, {:.2f} MiB before\n",
             a.dry_run ? "would write" : "wrote", a.out, o.config.weight_bits, o.plain ? " as plain numbers" : "",
             o.config.activation_bits, o.config.router_bits, static_cast<double>(written.bytes) / 1048576.0,
             static_cast<double>(before) / 1048576.0);
  return 0;
}

CompressWay setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<Options>();
  EaquantConfig& c = o->config;
  const auto bits = CLI::Range(int64_t{2}, int64_t{16});
  app.add_option("--sequences", o->sequences, "Sequences of the calibration text (eaquant)")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--sequence-length", o->tokens, "Tokens of a sequence (eaquant)")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  app.add_option("--wbits", c.weight_bits, "Bits of weights (eaquant)")->check(bits)->capture_default_str();
  app.add_option("--abits", c.activation_bits, "Bits of what matrices read (eaquant)")
      ->check(bits)
      ->capture_default_str();
  app.add_option("--router-bits", c.router_bits, "Bits of routers (eaquant)")->check(bits)->capture_default_str();
  app.add_option("--smooth-alpha", c.alpha, "How much difficulty goes from activations to weights (eaquant)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--aggregate", c.aggregate, "How the smoothing vectors of experts become one (eaquant)")
      ->check(CLI::IsMember({"max", "frequency", "router", "weight", "none"}))
      ->capture_default_str();
  app.add_flag("--smooth-router", c.with_router, "The router's own vector joins by maximum (eaquant)");
  app.add_option("--router-loss", c.router_loss, "What the router's clipping minimises (eaquant)")
      ->check(CLI::IsMember({"mse", "kl", "mse+kl"}))
      ->capture_default_str();
  app.add_option("--weight-method", c.weight_method, "How weights are clipped (eaquant)")
      ->check(CLI::IsMember({"mse", "minmax"}))
      ->capture_default_str();
  app.add_option("--rotation-block", c.block_size, "Channels that are rotated together (eaquant)")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--rotation-steps", c.rotation_steps, "Steps of the search of a rotation (eaquant)")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_flag("--plain", o->plain, "Rounded weights are stored as numbers of the type that they had (eaquant)");
  app.add_flag("--no-balance", o->no_balance, "Calibrate every expert on all of its tokens (eaquant)");
  return {"--method eaquant", [a] { return a->method == "eaquant"; }, [a, o] { return run(*a, *o); }};
}

const RegisterCompress eaquant("eaquant", setup);

}  // namespace
}  // namespace moiety::cli
