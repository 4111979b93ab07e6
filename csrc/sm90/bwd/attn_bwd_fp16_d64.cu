#include "sm90/bwd/launch.cuh"

template void longgen::sm90::launch_attn_bwd<__half, 64>(longgen::AttentionBwdParams);
