"""The plain path: one pass over all slots."""

from kernels.mla_decode.reference import mla_decode

__all__ = ["mla_decode"]
