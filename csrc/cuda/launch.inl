// The launchers, the same for a device and for the host. Included by kernels.cu and kernels_host.cpp.
#pragma once
#include "cuda/ops.inl"
#include "cuda/portable.h"
#include "cuda/random.inl"
#include "cuda/replay_distinct.inl"
#include "cuda/replay_insert.inl"
#include "cuda/replay_sample.inl"
#include "cuda/replay_share.inl"
#include "cuda/replay_update.inl"

namespace angle::device {

inline uint64_t blocks_for(uint64_t work, uint64_t a_block) { return (work + a_block - 1) / a_block; }

extern "C" {

int angle_replay_insert(const InsertParams* p, void* stream) {
  if (const int code = launch<PrepareInsert>(*p, 1, stream); code != 0) return code;
  if (p->view.shares_successors != 0) {
    const uint64_t blocks = blocks_for(p->n, LookAtRows::kWarps);
    if (const int code = launch<LookAtRows>(*p, blocks, stream); code != 0) return code;
    if (const int code = launch<PlaceRows>(*p, 1, stream); code != 0) return code;
    return launch<WriteRecords>(*p, 2 * blocks, stream);  // mostly a row's own fields and its successor
  }
  const uint64_t rows = uint64_t{p->rows_per_warp} * (InsertRowsKernel::kThreads / kLanes);
  return launch<InsertRowsKernel>(*p, blocks_for(p->n, rows), stream);
}

int angle_replay_sample(const SampleParams* p, void* stream) {
  if (p->chosen != nullptr) {
    if (const int code = launch<ChooseDistinct>(*p, 1, stream); code != 0) return code;
  }
  const uint64_t blocks = blocks_for(p->n, uint64_t{p->draws_per_warp} * SampleRows<false>::kWarps);
  const int code =
      p->view.stack > 1 ? launch<SampleRows<true>>(*p, blocks, stream) : launch<SampleRows<false>>(*p, blocks, stream);
  if (code != 0 || p->n <= kWeighedAtOnce) return code;
  return launch<WeighSample>(*p, blocks_for(p->n, WeighSample::kThreads), stream);
}

int angle_replay_update(const UpdateParams* p, void* stream) {
  if (p->n <= kFewHandles) return launch<UpdateFew>(*p, 1, stream);
  if (const int code = launch<ClaimMany>(*p, blocks_for(p->n, ClaimMany::kThreads), stream); code != 0) return code;
  return launch<UpdateMany>(*p, blocks_for(p->n, UpdateMany::kRows), stream);
}

int angle_replay_remove(const RemoveParams* p, void* stream) { return launch<RemoveRows>(*p, 1, stream); }

int angle_replay_reweigh(const ReweighParams* p, void* stream) {
  return launch<ReweighRows>(*p, blocks_for(p->view.capacity, ReweighRows::kRows), stream);
}

int angle_op_twin_q_target(const TwinTargetParams* p, void* stream) {
  const uint64_t blocks = blocks_for(p->batch, TwinTargetRows<float>::kThreads);
  return p->wide != 0 ? launch<TwinTargetRows<double>>(*p, blocks, stream)
                      : launch<TwinTargetRows<float>>(*p, blocks, stream);
}

int angle_op_twin_q_loss(const TwinLossParams* p, void* stream) {
  const uint64_t blocks = blocks_for(p->batch, kLossRows);
  const int code =
      p->wide != 0 ? launch<TwinLossRows<double>>(*p, blocks, stream) : launch<TwinLossRows<float>>(*p, blocks, stream);
  return code != 0 || blocks == 1 ? code : launch<AddLoss>(*p, 1, stream);
}

int angle_op_squashed_gaussian(const SquashedGaussianParams* p, void* stream) {
  const uint64_t rows = SquashedGaussianRows<float>::kThreads / lanes_a_row(p->columns);
  const uint64_t blocks = blocks_for(p->rows, rows);
  return p->wide != 0 ? launch<SquashedGaussianRows<double>>(*p, blocks, stream)
                      : launch<SquashedGaussianRows<float>>(*p, blocks, stream);
}

int angle_op_squashed_gaussian_gradient(const SquashedGaussianGradientParams* p, void* stream) {
  const uint64_t blocks = blocks_for(p->rows * p->columns, SquashedGaussianGradients<float>::kThreads);
  return p->wide != 0 ? launch<SquashedGaussianGradients<double>>(*p, blocks, stream)
                      : launch<SquashedGaussianGradients<float>>(*p, blocks, stream);
}

int angle_op_update_targets(const UpdateTargetsParams* p, void* stream) {
  const uint64_t blocks = p->first_block[p->tensors];
  switch (p->kind) {
    case Number::kFloat:
      return launch<UpdateTargets<AsFloat>>(*p, blocks, stream);
    case Number::kDouble:
      return launch<UpdateTargets<AsDouble>>(*p, blocks, stream);
    default:
      return launch<UpdateTargets<AsBfloat16>>(*p, blocks, stream);
  }
}

int angle_random_normals_f32(const DrawParams* p, void* stream) {
  return launch<Draw<float, kNormal>>(*p, blocks_for(p->n, 2 * Draw<float, kNormal>::kThreads), stream);
}

int angle_random_normals_f64(const DrawParams* p, void* stream) {
  return launch<Draw<double, kNormal>>(*p, blocks_for(p->n, 2 * Draw<double, kNormal>::kThreads), stream);
}

int angle_random_uniforms(const DrawParams* p, void* stream) {
  return launch<Draw<double, kUniform>>(*p, blocks_for(p->n, 2 * Draw<double, kUniform>::kThreads), stream);
}

const char* angle_device_error(int code) { return error_text(code); }

}  // extern "C"

}  // namespace angle::device
