"""Triton kernels and the thin functions that launch them.

Installed as ``kto_fused.kernels``. Nothing is imported here on purpose: a Python started in the repository root sees
this folder as ``kernels`` as well, and must be able to import it without Triton.
"""

# Multiplications and additions are fused, as in all that was measured: where a launch does not say so, Triton 3.9
# warns, and 3.10 is to round in between.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

# targets[row] is the token id that a row predicts, or one of:
MASKED = -1  # prompt, padding, or nothing left to predict: log-probability 0, gradient 0, logits never read
INVALID = -2  # a label outside the vocabulary: log-probability NaN
