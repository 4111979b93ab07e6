#include "sm90/decode/launch.cuh"

template void longgen::sm90::launch_decode<__half, __nv_fp8_e4m3, 128>(
    const longgen::DecodeParams&);
