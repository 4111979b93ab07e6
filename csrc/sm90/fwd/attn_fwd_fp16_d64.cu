#include "sm90/fwd/launch.cuh"

template void longgen::sm90::launch_attn_fwd<__half, 64>(longgen::AttentionFwdParams);
