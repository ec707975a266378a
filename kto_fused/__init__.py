"""Fused losses of log-probabilities, KTO and DPO first: the plain formulas' results in a fraction of the memory.

Call the functions from a training loop, on logits, on hidden states or on log-probabilities. ``kto_fused.trainers``
holds trainers for Hugging Face models, and ``kto_fused.reference`` the plain PyTorch definition of every function.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import heads, reference
    from .advantages import gae
    from .functional import (
        dpo_loss_from_logps,
        fused_dpo_loss,
        fused_kto_loss,
        fused_linear_dpo_loss,
        fused_linear_kto_loss,
        fused_linear_loss,
        fused_loss,
        kto_class_weights,
        kto_loss_from_logps,
        kto_reference_point,
        linear_sequence_logps,
        linear_token_logps,
        loss_from_logps,
        sequence_logps,
        token_logps,
    )
    from .heads.reward import bradley_terry_loss, linear_bradley_terry_loss, value_loss
    from .metrics import LossMetrics, TokenMetrics
    from .modules import (
        FusedDPOLoss,
        FusedKTOLoss,
        FusedLinearDPOLoss,
        FusedLinearKTOLoss,
        FusedLinearLoss,
        FusedLoss,
    )
    from .token_weights import ld_token_weights

__all__ = [
    "FusedDPOLoss",
    "FusedKTOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearLoss",
    "FusedLoss",
    "LossMetrics",
    "TokenMetrics",
    "bradley_terry_loss",
    "dpo_loss_from_logps",
    "fused_dpo_loss",
    "fused_kto_loss",
    "fused_linear_dpo_loss",
    "fused_linear_kto_loss",
    "fused_linear_loss",
    "fused_loss",
    "gae",
    "heads",
    "kto_class_weights",
    "kto_loss_from_logps",
    "kto_reference_point",
    "ld_token_weights",
    "linear_bradley_terry_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "loss_from_logps",
    "reference",
    "sequence_logps",
    "token_logps",
    "value_loss",
]
__version__ = "0.2.0"
# the modules that define the public functions and classes
_HOMES = ("functional", "modules", "metrics", "advantages", "token_weights", "heads.reward")


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, at its first use.

    ``import kto_fused`` alone imports no PyTorch: the command ``kto-fused`` answers a wrong flag before it does, and
    sets how PyTorch's threads wait before PyTorch reads that.
    """
    if name in __all__ and name not in ("heads", "reference"):
        modules = [importlib.import_module(f".{home}", __name__) for home in _HOMES]
        globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
        return globals()[name]
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise missing from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
