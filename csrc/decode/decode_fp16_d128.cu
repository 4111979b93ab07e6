#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__half, 128>(const longgen::DecodeParams&);
