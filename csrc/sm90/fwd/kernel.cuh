// The Hopper forward kernel: one producer warpgroup, two math warpgroups, persistent.
#pragma once

#include "arch/sm90/registers.cuh"
#include "sm90/fwd/mainloop.cuh"
#include "sm90/fwd/producer.cuh"
#include "sm90/fwd/traits.cuh"

namespace longgen::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_fwd_kernel(const __grid_constant__ AttentionFwdParams params,
                    const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);

  if (threadIdx.x == 0) {
    prefetch_descriptor(q_map);
    prefetch_descriptor(k_map);
    prefetch_descriptor(v_map);
    constexpr int kMathWarps = Traits::kMathWarpgroups * 4;
    for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
      // Every thread arrives that writes or reads what the producer says of an item or a tile.
      shared.q_full[stage].init(1);
      shared.q_empty[stage].init(kMathWarps * 32);
      for (int warpgroup = 0; warpgroup < Traits::kMathWarpgroups && stage < 2; ++warpgroup)
        shared.redo[warpgroup][stage] = 0;
    }
    for (int stage = 0; stage < Traits::kKeyStages; ++stage) {
      shared.k_full[stage].init(32);
      shared.k_empty[stage].init(kMathWarps * 32);
    }
    for (int stage = 0; stage < Traits::kValueStages; ++stage) {
      shared.v_full[stage].init(1);
      shared.v_empty[stage].init(kMathWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  // The same in every thread of a warp, and known to be so.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (warp == 0) produce<Traits>(params, q_map, k_map, v_map, shared);
    if (warp == 1) write_rows_that_see_nothing<Traits>(params);
  } else {
    take_registers<Traits::kMathRegisters>();
    MathWarpgroup<Traits>(params, shared, warp / 4 - 1).run();
  }
}

}  // namespace longgen::sm90
