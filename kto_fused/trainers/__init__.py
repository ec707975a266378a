"""KTO and DPO on ``transformers.Trainer``, without logits."""

from .base import FusedTrainer, holds_model_alone
from .configs import FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig
from .recipes import FusedDPOTrainer, FusedKTOTrainer

__all__ = [
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedKTOConfig",
    "FusedKTOTrainer",
    "FusedPreferenceConfig",
    "FusedTrainer",
    "holds_model_alone",
]
