#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__half, 64>(const longgen::DecodeParams&);
