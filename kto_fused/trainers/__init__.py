"""Trainers on ``transformers.Trainer`` that hold no batch's logits unless ``loss_from="logits"``.

One each for KTO, DPO, supervised fine-tuning and reward models, and loops that train on the model's own samples.
"""

from .base import FusedTrainer
from .configs import FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig, FusedRewardConfig, FusedSFTConfig
from .online import OnlineLoop, SPINLoop
from .ppo import FusedPPOTrainer, PPOLoop
from .ppo_config import FusedPPOConfig
from .recipes import FusedDPOTrainer, FusedKTOTrainer
from .resuming import holds_model_alone
from .reward import FusedRewardTrainer
from .round_settings import LoopSettings
from .supervised import FusedSFTTrainer

__all__ = [
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedKTOConfig",
    "FusedKTOTrainer",
    "FusedPPOConfig",
    "FusedPPOTrainer",
    "FusedPreferenceConfig",
    "FusedRewardConfig",
    "FusedRewardTrainer",
    "FusedSFTConfig",
    "FusedSFTTrainer",
    "FusedTrainer",
    "LoopSettings",
    "OnlineLoop",
    "PPOLoop",
    "SPINLoop",
    "holds_model_alone",
]
