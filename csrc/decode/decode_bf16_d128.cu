#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__nv_bfloat16, 128>(const longgen::DecodeParams&);
