#include "sm90/fwd/launch.cuh"

template void longgen::sm90::launch_attn_fwd<__nv_bfloat16, 64>(longgen::AttentionFwdParams);
