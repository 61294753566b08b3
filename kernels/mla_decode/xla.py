from kernels.mla_decode.reference import mla_decode
