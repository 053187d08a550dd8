// native/pack.cu on the CPU.
#include "emulated.h"
//
#include "pack.cu"
