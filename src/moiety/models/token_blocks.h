#pragma once
// The blocks of a decoder for one new token a row, without tensors: all threads go through all layers together in one
// parallel region and share out every product. Between products a token leaves so little to do that calls, allocations
// and the starts of parallel regions would take as long as the products themselves.
#include <torch/types.h>

#include <memory>
#include <vector>

#include "moiety/nn/attention.h"
#include "moiety/nn/pass.h"

namespace moiety {

class Block;

/// x [B, 1, d] f32 or bf16 -> what the blocks make of it, keys and values appended to the cache of the pass; undefined
/// where the blocks or the pass have something that only the modules can do (a graph, a trace, edits, padding, more than
/// 16 rows, adapters, layers other than root-mean-square norms, plain attention, gated feed-forward layers and mixtures
/// of them with a linear router). Over packed matrices the modules compute the same, bit for bit where no window leaves
/// out positions at the start. Matrices of plain numbers are for dense models and up to 8 rows; nothing is rounded to
/// bf16 between them.
torch::Tensor run_token_blocks(const std::vector<std::shared_ptr<Block>>& blocks, const torch::Tensor& x,
                               const AttentionContext& context, Pass& pass);

}  // namespace moiety
