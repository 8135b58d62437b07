// What a kernel sees instead of CUDA when a C++ compiler makes it (HPCNN_EMULATION): the language in language.h, what
// threads do together in fibers.h and warp.h, and tensor_copy.h's asynchronous copies and matrix products.
//
// The threads of a block are fibers of one thread of the host. A fiber runs until it waits for others; nothing else
// interrupts it. Blocks run one after the other, those of a cluster together.
#pragma once
#include "language.h"
#include "fibers.h"
#include "warp.h"
#include "tensor.h"
