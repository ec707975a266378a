"""Value models of PPO: a linear head on the policy's hidden states, or a model of its own."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForTokenClassification, PretrainedConfig

from .. import huggingface
from ..huggingface import files
from ..huggingface.inspect import check_is_causal
from . import models
from .ppo_config import BACKBONE, GROUP, FusedPPOConfig

CRITIC = "critic.safetensors"  # beside the policy in a checkpoint


class ValueHead(nn.Module):
    """A linear head on the policy's hidden states, which starts at the value 0."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of the state after each position, [B, T] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A model of its own with one output per position."""

    def __init__(self, name: str, args: FusedPPOConfig):
        super().__init__()
        with models.keeping_random_state():
            torch.manual_seed(args.seed)  # for the head, which most checkpoints lack
            options = {"trust_remote_code": args.trust_remote_code}
            config = value_config(args)
            self.model = files.load_pretrained(AutoModelForTokenClassification, name, config=config, **options)
            check_is_causal(self.model)  # a value must not know the tokens after it
        self.model.float()
        models.disable_dropout(self.model)

    def forward(self, hidden: torch.Tensor | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of the state after each position, [B, T] float32."""
        return self.model(**inputs).logits[..., 0].float()


def value_config(args: FusedPPOConfig) -> PretrainedConfig:
    """Return the configuration of a value model of its own.

    Raises:
        ValueError: it cannot be loaded.
    """
    return models.config_of("value_model", args.value_model, args.trust_remote_code, num_labels=1)


def critic_of(policy: nn.Module, args: FusedPPOConfig, checkpoint: str | None) -> nn.Module | None:
    """Return the value model, with a checkpoint's weights if there is one; None where no value is needed."""
    if args.advantage == GROUP:
        return None
    if args.value_model == BACKBONE:
        critic: nn.Module = ValueHead(huggingface.unwrap(policy).config.get_text_config().hidden_size)
    else:
        critic = ValueModel(args.value_model, args)
    if checkpoint is not None:
        critic.load_state_dict(load_file(Path(checkpoint) / CRITIC))
    return critic.to(args.device)
