#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__half, 64>(longgen::DecodeParams);
