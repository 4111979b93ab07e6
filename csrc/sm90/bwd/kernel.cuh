// The Hopper backward kernel: one producer warpgroup, two math warpgroups, persistent.
#pragma once

#include "arch/sm90/registers.cuh"
#include "sm90/bwd/mainloop.cuh"
#include "sm90/bwd/producer.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attn_bwd_kernel(const __grid_constant__ AttentionBwdParams params,
                    const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ uint8_t dynamic_shared[];
  // Aligned by an offset: a pointer made from an integer would no longer be known to be shared.
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(
      dynamic_shared + (-shared_address(dynamic_shared) & 1023));

  if (threadIdx.x == 0) {
    shared.params = params;
    prefetch_descriptor(q_map);
    prefetch_descriptor(dout_map);
    prefetch_descriptor(k_map);
    prefetch_descriptor(v_map);
    constexpr int kLoaderWarps = Traits::kLoaderThreads / 32;
    for (int warp = 0; warp < kLoaderWarps; ++warp) shared.loads[warp] = 0;
    // At the barriers that say "empty" every thread arrives that has read what is there.
    for (int slot = 0; slot < 2; ++slot) {
      shared.item_full[slot].init(1);
      shared.item_empty[slot].init(Traits::kMathWarps * 32 + Traits::kLoaderThreads);
    }
    shared.k_full.init(Traits::kLoaderThreads);
    shared.v_full.init(Traits::kLoaderThreads);
    shared.keys_empty.init(Traits::kMathWarps);
    for (int stage = 0; stage < Traits::kQStages; ++stage) {
      shared.q_full[stage].init(1);
      shared.q_empty[stage].init(Traits::kMathWarps * 32);
    }
    for (int stage = 0; stage < Traits::kDoutStages; ++stage) {
      shared.dout_full[stage].init(1);
      shared.dout_empty[stage].init(Traits::kMathWarps * 32);
    }
    shared.ds_full.init(Traits::kMathWarps);
    fence_barrier_init();
  }
  __syncthreads();

  // The same in every thread of a warp, and known to be so.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Traits>(q_map, dout_map, shared);
    if (warp >= kFirstLoader / 32) load_keys<Traits>(k_map, v_map, shared);
  } else {
    take_registers<Traits::kMathRegisters>();
    BwdMathWarpgroup<Traits>(params, shared, warp / 4 - 1).run();
  }
}

}  // namespace longgen::sm90
