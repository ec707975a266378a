"""Triton kernels, and for each a thin function that launches it on tensors.

Installed as ``kto_fused.kernels``. This file imports nothing on purpose: a Python started in the repository root also
sees this folder as ``kernels``, and must be able to import it without Triton.
"""

# Every launch passes these options. They fuse a multiplication with the addition that follows, without a rounding in
# between, as in all published measurements. A launch that does not say so gets a warning from Triton 3.9, and is
# announced to round in between from Triton 3.10 on.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
