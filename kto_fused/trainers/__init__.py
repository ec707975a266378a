"""Trainers for KTO and DPO on ``transformers.Trainer`` that never hold a batch's logits."""

from .base import FusedTrainer
from .configs import FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig
from .recipes import FusedDPOTrainer, FusedKTOTrainer
from .resuming import holds_model_alone

__all__ = [
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedKTOConfig",
    "FusedKTOTrainer",
    "FusedPreferenceConfig",
    "FusedTrainer",
    "holds_model_alone",
]
