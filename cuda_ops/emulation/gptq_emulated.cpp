// native/gptq.cu on the CPU.
#include "emulated.h"
//
#include "gptq.cu"
