#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__nv_bfloat16, 256>(const longgen::DecodeParams&);
