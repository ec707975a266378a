"""Trainers on ``transformers.Trainer`` that hold no batch's logits unless ``loss_from="logits"``.

One each for KTO, DPO, supervised fine-tuning and reward models.
"""

from .base import FusedTrainer
from .configs import FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig, FusedRewardConfig, FusedSFTConfig
from .recipes import FusedDPOTrainer, FusedKTOTrainer
from .resuming import holds_model_alone
from .reward import FusedRewardTrainer
from .supervised import FusedSFTTrainer

__all__ = [
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedKTOConfig",
    "FusedKTOTrainer",
    "FusedPreferenceConfig",
    "FusedRewardConfig",
    "FusedRewardTrainer",
    "FusedSFTConfig",
    "FusedSFTTrainer",
    "FusedTrainer",
    "holds_model_alone",
]
