#pragma once
// Super experts (Su et al. 2025, arXiv 2507.23279): the few experts whose down projection writes enormous values on a
// few tokens, from which massive activations and attention sinks grow. What every expert writes at most, which of them
// the rule names, and how far sinks decay without them. compress/prune_experts.h takes experts out.
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/models/model.h"
#include "moiety/nn/beside.h"

namespace moiety {

/// The largest values of the experts of one layer over all calls, before gates and residual.
class ExpertMaxima {
 public:
  /// `site` names the layer in errors.
  explicit ExpertMaxima(int64_t experts, std::string site = "the layer");
  /// A call of one expert: z [n, d] that its down projection reads, o [n, h] that it gives. Without tokens nothing
  /// happens. Error: a number that is not finite.
  void add(int64_t expert, const torch::Tensor& z, const torch::Tensor& o);

  torch::Tensor output_max;      ///< [E] f32: max |o|; 0 for an expert without tokens
  torch::Tensor input_max;       ///< [E] f32: max |z|
  torch::Tensor output_channel;  ///< [E] int64: channel of the first largest |o|; -1 without tokens
  torch::Tensor tokens;          ///< [E] int64
  std::vector<int64_t> latest;   ///< [E]: row of the largest |o| in the last call of the expert; -1: not called
 private:
  std::string site_;
};

/// Stands beside the down projections of all experts of a layer, counts their maxima and changes nothing. Experts 0 ...
/// of `maxima` are those of the stack.
class ExpertWatch : public BesideStack {
 public:
  explicit ExpertWatch(std::shared_ptr<ExpertMaxima> maxima) : maxima_(std::move(maxima)) {}
  torch::Tensor apply(const torch::Tensor& x, const std::vector<int64_t>& counts, torch::Tensor y) override;
  torch::Tensor delta(int64_t expert) const override;

 private:
  std::shared_ptr<ExpertMaxima> maxima_;
};

/// The same beside the down projection of a shared expert, which is column `column` of `maxima`.
class SharedExpertWatch : public Beside {
 public:
  SharedExpertWatch(std::shared_ptr<ExpertMaxima> maxima, int64_t column)
      : maxima_(std::move(maxima)), column_(column) {}
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;

 private:
  std::shared_ptr<ExpertMaxima> maxima_;
  int64_t column_;
};

/// a_le > the `quantile`-th percentile (linearly interpolated) and a_le > max a / times, in layers of L only.
struct SuperExpertRule {
  double quantile = 99.5, times = 10.0;
  double include_layers = 0.75;    ///< L: mixtures among the first so many layers, rounded half to even
  std::string scope = "included";  ///< percentile and maximum over L, or over the whole model
  bool floor = false;              ///< max a / times rounded down, as the authors' code: vacuous for small values
  void fields(Fields& f);
};

/// The mixtures among the first round(layers * share) layers. Error: a share outside (0, 1].
std::vector<int64_t> included_layers(int64_t layers, double share, const std::vector<int64_t>& mixtures);
/// The mixtures at which massive activations form: max |H_{l+1}| >= factor * max |H_l|. hidden_max [layers + 1].
std::vector<int64_t> growing_layers(const std::vector<double>& hidden_max, const std::vector<int64_t>& mixtures,
                                    double factor = 5.0);

struct SuperExpert {
  int64_t layer = 0, expert = 0;  ///< expert -1: the shared one
  double value = 0;
};
struct SuperExperts {
  std::vector<SuperExpert> found;  ///< by falling value; ties: lower layer, then lower expert
  double percentile = 0, limit = 0;
};
/// table [layers, E]: a_le, NaN where there is no such expert (dense layers, fewer experts). With `shared_last` the
/// last column is the shared expert. Error: no value in L, a quantile outside (0, 100), times not above 0.
SuperExperts find_super_experts(const torch::Tensor& table, const std::vector<int64_t>& layers,
                                const SuperExpertRule& rule, bool shared_last = false);

/// What heads give to sinks: the mean over query rows t > max(sinks) of the sum over sinks of p[h, t, i]. attention [H,
/// T, T] after softmax -> [H]. Error: a sink outside of the text, no query behind the sinks.
torch::Tensor sink_score(const torch::Tensor& attention, const std::vector<int64_t>& sinks);
struct SinkDecay {
  torch::Tensor decay;  ///< [H] f64: 1 - after / before; NaN for a head that gave sinks nothing before
  double mean = 0;      ///< over the other heads; NaN without any
};
SinkDecay sink_decay(const torch::Tensor& before, const torch::Tensor& after);

/// One mixture of a model on a text.
struct LayerMaxima {
  std::shared_ptr<ExpertMaxima> maxima;
  int64_t experts = 0;
  bool shared = false;         ///< the last column of `maxima` is the shared expert
  std::vector<int64_t> first;  ///< [columns]: windows in which the expert's largest |o| falls on position 0
};
/// What one reading of a text shows. H_l is the residual stream that enters block l, H_layers what leaves the last.
struct ModelMaxima {
  int64_t layers = 0, windows = 0, tokens = 0;
  std::map<int64_t, LayerMaxima> mixtures;  ///< by layer
  std::vector<double> hidden_max;           ///< [layers + 1]: max |H_l|
  std::vector<double> hidden_median;        ///< [layers + 1]: median |H_l|, of an even sample of at most 2^22 values
  std::vector<int64_t> layers_with_experts() const;
  bool shared() const;          ///< some mixture has a shared expert
  torch::Tensor table() const;  ///< [layers, E (+ 1)] f64 for find_super_experts
};
/// Reads windows of token ids, every one a sequence of its own, layer by layer. The experts of `model` are watched from
/// then on. `progress` gets (window, block) pairs done, of all. Error: no mixtures, experts that are not those of an
/// ordinary mixture layer.
ModelMaxima profile_experts(CausalModel& model, const std::vector<std::vector<int64_t>>& windows,
                            const std::function<void(int64_t, int64_t)>& progress = {});
/// Values of H_l that are massive (Sun et al. 2024, arXiv 2402.17762) by maximum and median: max |H| > absolute and >
/// ratio * median. 0 switches a test off.
std::vector<int64_t> massive_layers(const ModelMaxima& maxima, double absolute = 100.0, double ratio = 1000.0);

/// Sink scores of every layer and head, averaged over windows: [layers, H] f64, NaN for layers with another attention.
/// The attention of `model` is watched from then on. Error: see sink_score.
torch::Tensor model_sinks(CausalModel& model, const std::vector<std::vector<int64_t>>& windows,
                          const std::vector<int64_t>& sinks,
                          const std::function<void(int64_t, int64_t)>& progress = {});

/// exp of the mean over windows of a window's mean next-token loss.
double window_perplexity(CausalModel& model, const std::vector<std::vector<int64_t>>& windows,
                         const std::function<void(int64_t, int64_t)>& progress = {});

/// The report of `moiety analyze super-experts`: `super_experts` [{rank, layer_index, expert_index, output_max, ...}],
/// tables `layers` and `experts` by falling maximum, percentile and limit. `settings` and what else the caller adds.
nlohmann::json super_experts_report(const ModelMaxima& maxima, const SuperExperts& found,
                                    const std::vector<int64_t>& layers);

}  // namespace moiety
