#include "sm90/decode/launch.cuh"

template void longgen::sm90::launch_decode<__nv_bfloat16, __nv_bfloat16, 96>(
    const longgen::DecodeParams&);
