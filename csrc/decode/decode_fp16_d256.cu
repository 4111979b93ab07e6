#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__half, 256>(const longgen::DecodeParams&);
