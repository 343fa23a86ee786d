#pragma once
// The only way in and out of a running forward pass: positions, masks, cache, what routers did (Trace), what a policy
// changes in flight (Edits), auxiliary losses, and state that lives for one pass across depth.
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moiety/nn/kv_cache.h"
#include "moiety/nn/routing.h"

namespace moiety {

struct Pass;

/// What every router did. Nothing is kept unless asked for; tensors are detached.
class Trace {
 public:
  struct Record {
    Site site;
    Routing routing;
    torch::Tensor input;   ///< [N, d] hidden states before the router, when keep_inputs
    torch::Tensor output;  ///< [N, d] output of the mixture, when keep_outputs
    torch::Tensor real;    ///< [N] bool, undefined when every token is real
    int64_t experts = 0;   ///< experts to choose from; scores may have more columns (null experts). 0: their columns
  };
  bool keep_inputs = false;
  bool keep_outputs = false;
  /// Called for every record; when set, records are not stored.
  std::function<void(const Record&)> on_record;
  std::vector<Record> records;

  void add(Record record);
};

/// One change of a running model. Rows of one batch may be treated differently: tensors are [N, E] with N = B*T.
class Edit {
 public:
  virtual ~Edit() = default;
  virtual void logits(const Site&, const Pass&, torch::Tensor& logits) {}  ///< add to or replace; may carry gradient
  virtual void distribution(const Site&, const Pass&, torch::Tensor& scores) {
  }                                                           ///< replace the scores before the choice
  virtual void choice(const Site&, const Pass&, Routing&) {}  ///< replace experts, scale gates
  /// How often block `block` runs: 1 by default, 0 skips it.
  virtual int64_t repeats(int64_t block, const Pass&) { return 1; }
};

/// Edits run in order.
using Edits = std::vector<std::shared_ptr<Edit>>;

struct Pass {
  // In.
  torch::Tensor mask;       ///< [B, T] bool, true for real tokens; undefined: all real
  torch::Tensor positions;  ///< [B, T] int64; undefined: counted from the mask and the cache
  torch::Tensor segments;   ///< [B, T] int64, sequence number of packed tokens: attention stays inside a sequence;
                            ///< undefined: one a row
  torch::Tensor labels;  ///< [B] int64: what kind of sample a row is, by the source it comes from; undefined: unknown
  KvCache* cache = nullptr;
  Trace* trace = nullptr;
  Edits edits;
  bool training = false;
  bool recompute_blocks = false;  ///< keep only the input of every block and run it again in the backward pass
  bool recomputing = false;       ///< this is such a second run: change nothing outside of the gradient
  bool last_logits_only = false;  ///< logits [B, 1, V] of the last position only (decoding)

  // While it runs.
  int64_t batch =
      0;  ///< rows B of the batch: token n of a flat [N, ...] tensor is token n % (N / B) of row n / (N / B)
  int64_t block = 0;  ///< index of the block that is running
  int64_t round = 0;
  int64_t slot = 0;                            ///< cache slot of the attention that is running
  std::map<std::string, torch::Tensor> state;  ///< named state of this pass, across depth

  // Out.
  std::vector<std::pair<std::string, torch::Tensor>> losses;  ///< auxiliary losses, already weighted

  Site at(const std::string& site) const { return {block, round, site}; }
  void add_loss(const std::string& name, torch::Tensor value) { losses.emplace_back(name, std::move(value)); }
  /// Runs `body` when the last block is through: losses over all layers together. The first body of a name counts.
  void at_end(const std::string& name, std::function<void(Pass&)> body);
  /// Called once by the model.
  void finish();

 private:
  std::vector<std::pair<std::string, std::function<void(Pass&)>>> ends_;
};

}  // namespace moiety
