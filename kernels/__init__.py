"""Triton kernels and the thin functions that launch them.

Installed as ``kto_fused.kernels``. Nothing is imported here on purpose: a Python started in the repository root sees
this folder as ``kernels`` as well, and must be able to import it without Triton.
"""

# Products are added without being rounded first, as what was measured was compiled: Triton 3.9 warns a caller who does
# not say which it is to be, and 3.10 changes its default.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
