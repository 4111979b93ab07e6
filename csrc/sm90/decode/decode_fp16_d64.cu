#include "sm90/decode/launch.cuh"

template void longgen::sm90::launch_decode<__half, __half, 64>(const longgen::DecodeParams&);
