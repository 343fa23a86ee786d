#pragma once
// Experts of a part at a feed-forward site: from the checkpoint, cut from the dense layer that was there, or new.
#include <memory>

#include "moiety/moe/experts.h"
#include "moiety/nn/part.h"

namespace moiety {

/// `count` gated experts of `width` hidden units under "experts.*". Where the checkpoint has none but a dense layer
/// whose width `width` divides, expert e starts as hidden units e*width ... of that layer (modulo its width; a copy
/// when the widths are equal), its output times `scale`. Else new: N(0, init_std).
std::shared_ptr<GatedExperts> experts_at(PartSite& site, int64_t count, int64_t width, double scale = 1.0);
/// A shared expert of `width` hidden units under "shared_experts.*"; null for width 0.
std::shared_ptr<FeedForward> shared_at(PartSite& site, int64_t width);
/// The bias [E] on the choice of a router without a rule of its own, "NAME.e_score_correction_bias": from the
/// checkpoint or zero. Undefined when the model's routers have none.
torch::Tensor choice_bias_at(PartSite& site, const std::string& name, int64_t experts, bool has_rule);
/// The hidden units of one of `active` experts that do together what the dense layer does; `given` when it is not 0.
int64_t width_at(const PartSite& site, int64_t given, int64_t active);

}  // namespace moiety
