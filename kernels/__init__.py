"""Triton kernels and the thin functions that launch them.

Installed as ``kto_fused.kernels``. Nothing is imported here on purpose: a Python started in the repository root sees
this folder as ``kernels`` as well, and must be able to import it without Triton.
"""
