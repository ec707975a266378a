"""Losses: from sequences' log-probabilities to a loss. Make one by its name, mix several, or register your own.

>>> from kto_fused import heads
>>> heads.make("ipo", beta=0.2)
IPO(beta=0.2, ld_alpha=1.0, use_weighting=False, f_divergence_type='reverse_kl', f_alpha_divergence_coef=0.5)
"""

from . import completions, pairs, tokens
from .protocol import Head, Mix, make, names, register
from .tokens import TokenHead

__all__ = ["Head", "Mix", "TokenHead", "completions", "make", "names", "pairs", "register", "tokens"]
