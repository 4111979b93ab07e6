#include "sm90/bwd/launch.cuh"

template void longgen::sm90::launch_attn_bwd<__nv_bfloat16, 128>(longgen::AttentionBwdParams);
