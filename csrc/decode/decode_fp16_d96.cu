#include "decode/launch.cuh"

template void longgen::decode::launch_decode<__half, 96>(const longgen::DecodeParams&);
