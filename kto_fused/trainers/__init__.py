"""Trainers for KTO and DPO on ``transformers.Trainer`` that hold no batch's logits unless ``loss_from="logits"``."""

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
