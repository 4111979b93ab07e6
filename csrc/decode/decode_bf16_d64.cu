#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__nv_bfloat16, 64>(const longgen::DecodeParams&);
