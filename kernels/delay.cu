// Keeps a stream busy while the host queues what is to be measured; no operator uses it.
#include "common.cuh"

extern "C" __global__ void delay(int64 cycles) {
#ifndef HPCNN_EMULATION
    int64 start = clock64();
    while (clock64() - start < cycles) {
    }
#endif
}
