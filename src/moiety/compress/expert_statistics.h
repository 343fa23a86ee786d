#pragma once
// What ways to prune and merge experts share: how a router uses and resembles its experts, and experts whose neurons
// are brought into one order and averaged.
#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "moiety/compress/expert_weights.h"
#include "moiety/nn/routing.h"

namespace moiety {

// --- the router; `real` [N] is true or not 0 where a token is no padding (undefined: all)

/// How often each of `experts` experts was chosen: [experts] int64. Error: a mask of another length.
torch::Tensor selection_counts(const Routing& routing, int64_t experts, const torch::Tensor& real = {});
/// counts / sum of counts: [E] f64. Error: nothing was counted.
torch::Tensor usage_of(const torch::Tensor& counts);
/// Sum over tokens of the gates that each expert got: [experts] f64; see real_tokens for the mean.
torch::Tensor gate_mass(const Routing& routing, int64_t experts, const torch::Tensor& real = {});
/// Sum over tokens of R^T R, R the raw logits [N, E]: [E, E] f64. Gram matrices of parts of a text add up. Error: NaN.
torch::Tensor logit_gram(const torch::Tensor& logits, const torch::Tensor& real = {});
/// (cos(R[:, i], R[:, j]) + 1) / 2 from that sum, not centred; norms count as 1e-7 at least, the diagonal is 1: [E, E]
/// f64.
torch::Tensor cosine_affinity(const torch::Tensor& gram);
/// How many of N rows count. Error: none.
int64_t real_tokens(int64_t rows, const torch::Tensor& real = {});
/// What a plain router makes of logits [N, E]: the top_k raw logits, ties to the lowest index, gates their softmax over
/// all experts, over its sum on the chosen where `normalize`.
Routing route_logits(const torch::Tensor& logits, int64_t top_k, bool normalize = false);

// --- experts

int64_t width_of(const ExpertWeights& expert);   ///< d
int64_t hidden_of(const ExpertWeights& expert);  ///< h
/// Parts of one tensor each: gate (or undefined) and up [E, d, h], down [E, h, d]. Error: shapes that do not go
/// together.
std::vector<ExpertWeights> unstack_experts(const torch::Tensor& gate, const torch::Tensor& up,
                                           const torch::Tensor& down);
/// The way back. Error: experts of different shapes, none.
ExpertWeights stack_experts(const std::vector<ExpertWeights>& experts);
/// Error unless there are experts, all of them gated or none, of one h, and, with `one_width`, of one d.
void check_experts(const std::vector<ExpertWeights>& experts, bool one_width = true);

/// Neuron a of the result is neuron order[a] of the expert: rows of gate and up and columns of down move together, so
/// its function stays.
ExpertWeights with_neurons(const ExpertWeights& expert, const std::vector<int64_t>& order);
/// The order of `expert`'s neurons that matches those of `reference` best: sum over a of <gate rows> + <up rows> +
/// <down columns> is largest, exactly (assignment.h). Without `by_down` down does not count (and moves all the same).
std::vector<int64_t> alignment(const ExpertWeights& reference, const ExpertWeights& expert, bool by_down = true);

/// sum of weights[i] * experts[i] / divisor, matrix by matrix, in f32 in the order given.
ExpertWeights weighted_sum(const std::vector<const ExpertWeights*>& experts, const std::vector<double>& weights,
                           double divisor);

/// The members of groups 0 ... G-1, ascending. labels [E] int64. Error: a label below 0, a group without members.
std::vector<std::vector<int64_t>> members_of(const torch::Tensor& labels);

/// Runs body(0 ... count-1) on a thread each where there are several; errors come out.
void for_each_expert(int64_t count, const std::function<void(int64_t)>& body);

}  // namespace moiety
