#pragma once
// How a part takes a site of a model: what it is told, where its parameters come from, what it gives back. The model's
// config names parts under `moiety.parts`; the registry finds them by slug.
#include <torch/types.h>

#include <any>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/nn/attention.h"
#include "moiety/nn/feed_forward.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/norm.h"

namespace moiety {

/// Fills a new tensor. Fan-in is the last dimension's size.
using Init = std::function<void(torch::Tensor)>;
Init normal_init(double std);
Init uniform_init();  ///< U(-1/sqrt(fan_in), 1/sqrt(fan_in))
Init constant_init(double value);

/// Parameters by name: the checkpoint's tensor when it has one, else a new one that `init` fills. Every tensor that is
/// handed out is saved again under its name. Names are relative to the site, or to the model.
class PartWeights {
 public:
  virtual ~PartWeights() = default;
  virtual bool has(const std::string& name) const = 0;
  /// f32 or the model's dtype. Error when the stored tensor has another shape.
  virtual torch::Tensor get(const std::string& name, std::vector<int64_t> shape, const Init& init) = 0;
  /// The same for a tensor that checkpoints of the part may lack: `init` fills it there, too.
  virtual torch::Tensor optional(const std::string& name, std::vector<int64_t> shape, const Init& init) = 0;
  /// A matrix NAME.weight and, unless its init is null, NAME.bias. Parts may stand beside it, and are merged into what
  /// is saved of it.
  virtual Linear linear(const std::string& name, int64_t in, int64_t out, const Init& init, const Init& bias);
  /// The same; a bias starts at 0.
  Linear linear(const std::string& name, int64_t in, int64_t out, bool bias, const Init& init);
  LinearStack stack(const std::string& name, int64_t count, int64_t in, int64_t out, bool bias, const Init& init);
};

class Beside;
class Experts;
class Router;

/// What a family's own mixture holds at a site, in the checkpoint or new: a part may route these experts its own way.
struct FamilyMixture {
  Linear router{nullptr};           ///< the matrix
  std::shared_ptr<Router> chooser;  ///< the family's own rule over that matrix
  std::shared_ptr<Experts> experts;
  std::shared_ptr<FeedForward> shared;
  Linear shared_gate{nullptr};
  double jitter = 0.0;  ///< see Mixture::jitter
};

/// The matrices of a dense gated layer, [f, d], [f, d], [d, f]; undefined when the checkpoint has none here.
struct DenseLayer {
  torch::Tensor gate, up, down;
};

struct PartSite {
  int64_t layer = 0;   ///< of the block
  int64_t layers = 0;  ///< blocks of the model
  int64_t hidden = 0;
  int64_t width = 0;  ///< hidden units of the family's dense layer
  int64_t heads = 0;
  std::string act;
  double init_std = 0.02, norm_eps = 1e-6;
  bool choice_bias = false;  ///< the run balances routers by a bias on their choice: parts without a rule may have one
  PartWeights& own;          ///< names relative to the site ("gate.weight")
  PartWeights& model;        ///< names relative to the model ("rnn_router.weight_ir")
  std::map<std::string, std::any>&
      shared;                         ///< objects that all sites of the model share, by a name that a part chooses
  std::shared_ptr<Norm> norm;         ///< in front of the site; a part that takes the whole half may keep it
  std::function<DenseLayer()> dense;  ///< what the checkpoint has here; then these tensors count as used
  /// The family's mixture; null when its layer is dense here.
  std::function<std::shared_ptr<FamilyMixture>()> mixture;
};

using MakeFeedForward = std::function<std::shared_ptr<FeedForwardBase>(PartSite&, const nlohmann::json& settings)>;
using MakeAttention = std::function<std::shared_ptr<AttentionBase>(PartSite&, const nlohmann::json& settings)>;

/// The site `linear`: matrices of one layer that read one input, or one matrix.
struct LinearTarget {
  std::string name;  ///< q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, ...
  std::string path;  ///< as transformers calls it: "model.layers.3.self_attn.q_proj"
  int64_t in = 0, out = 0;
  LinearImpl* matrix = nullptr;  ///< lives as long as what stands beside it
};
struct LinearSite {
  int64_t layer = 0, layers = 0;
  std::vector<LinearTarget> targets;
  PartWeights& own;    ///< names relative to the targets ("lora_A")
  PartWeights& all;    ///< names relative to all targets of the layer ("q_proj.lora_A")
  PartWeights& model;  ///< names relative to the model
  std::map<std::string, std::any>& shared;
};
/// A setting that may be a list with one whole number for every layer. Error: a wrong length, a number below `least`.
int64_t at_layer(const nlohmann::json& value, const char* name, int64_t least, const LinearSite& site);

/// Matrices of all experts of a mixture that read one input: gate and up, which some checkpoints store as one, or down.
struct StackSite {
  int64_t layer = 0, layers = 0;
  std::string name;  ///< experts.gate_up_proj or experts.down_proj
  std::string path;  ///< "model.layers.3.mlp.experts.gate_up_proj"
  int64_t experts = 0, in = 0;
  std::vector<LinearStackImpl*> stacks;
  PartWeights& own;                         ///< names relative to the target
  std::map<std::string, std::any>& shared;  ///< as in PartSite
};
class BesideStack;
/// What parts at that site register: the module that goes beside the targets.
struct MakeBeside {
  bool per_input = false;  ///< one module for all targets that read one input; else one a matrix
  std::function<std::shared_ptr<Beside>(LinearSite&, const nlohmann::json& settings)> make;
  /// What goes beside the matrices of experts, one a stack; null: the part cannot stand there.
  std::function<std::vector<std::shared_ptr<BesideStack>>(StackSite&, const nlohmann::json& settings)> make_stack =
      nullptr;
};

/// One entry of `moiety.parts`: {slug, site, layers, target, name, settings...}.
struct PartEntry {
  std::string slug;
  std::string name;                  ///< tells parts beside one matrix apart; empty: there is one only
  std::string site;                  ///< ffn, attention or linear
  std::vector<int64_t> layers;       ///< ascending
  std::vector<std::string> targets;  ///< of the site linear; "all": every matrix of attention and feed-forward layer;
                                     ///< what is no plain name is a regular expression over whole paths
  nlohmann::json settings;           ///< the other keys
  bool placed = false;               ///< site linear: it stands beside some matrix; whoever builds the model says so
};
/// The parts of a model's config, checked: slugs are registered for the site, layers exist, no site is taken twice.
/// Layers: "all", a number, or ranges as "0-3,5". `target` (a name or a list) and `name` belong to the site linear.
/// Error naming the entry.
bool is_adapter_name(const std::string& name);
std::vector<PartEntry> parse_parts(const nlohmann::json& config, int64_t layers);

}  // namespace moiety
