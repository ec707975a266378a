"""Triton kernels and the thin functions that launch them.

Installed as ``kto_fused.kernels``. Nothing is imported here on purpose: a Python started in the repository root sees
this folder as ``kernels`` as well, and must be able to import it without Triton.
"""

# Multiplications and additions are fused, as in all that was measured: where a launch does not say so, Triton 3.9
# warns, and 3.10 is to round in between.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
