"""The options of PPO and of the group-relative methods."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .. import checks, heads
from ..heads.protocol import Head
from . import losses
from .configs import FusedPreferenceConfig

GAE, GROUP = ADVANTAGES = ("gae", "group")
LOSSES = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo")
BACKBONE = "backbone"


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
@losses.with_loss_options(LOSSES, left_out=("normalizer", "kl_beta", "on_policy"))
class FusedPPOConfig(FusedPreferenceConfig):
    """Options of ``FusedPPOTrainer`` and ``PPOLoop``.

    >>> FusedPPOConfig(output_dir="out", use_cpu=True, advantage="group").loss_type
    'grpo'
    """

    default_loss: ClassVar[str] = "ppo"

    beta: float = _option(
        0.05,
        "Coefficient of the KL divergence to the reference model, >= 0: in the tokens' rewards with advantage='gae', "
        "in the loss with 'group'.",
    )
    num_train_epochs: float = _option(4.0, "Passes over a round's samples, in minibatches of the batch size.")
    advantage: str = _option(
        GAE,
        "'gae': generalised advantage estimates from a value model; 'group': the score relative to the scores of the "
        "prompt's other samples, as GRPO does.",
        choices=list(ADVANTAGES),
    )
    loss_type: str | None = _option(
        None, "Loss of a token; ppo if not given, grpo with advantage='group'.", choices=list(LOSSES)
    )
    gamma: float = _option(1.0, "Discount of later tokens' rewards, in [0, 1]; for 'gae'.")
    lam: float = _option(0.95, "GAE's lambda, in [0, 1]; for 'gae'.")
    whiten: bool = _option(True, "Shift and scale a round's advantages to mean 0 and variance 1; for 'gae'.")
    scale_by_std: bool = _option(True, "Divide by the standard deviation of a prompt's scores; for 'group'.")
    value_model: str = _option(
        BACKBONE,
        "Value model: 'backbone' for a linear head on the policy's hidden states, or the folder or id of a model of "
        "its own; for 'gae'.",
    )
    value_coef: float = _option(0.1, "Weight of the value model's loss, >= 0; for 'gae'.")
    value_clip: float | None = _option(0.2, "How far values may move before their gradient is cut off; None: no clip.")
    kl_target: float | None = _option(
        None, "Adapt beta towards this KL divergence to the reference, in nats per sample; None: keep beta. For 'gae'."
    )
    kl_horizon: int = _option(
        10_000, "Samples after which an adapted beta may have changed by a fifth, the most that a round changes it."
    )
    sampling_temperature: float = _option(1.0, "Temperature of the samples, at which their probabilities are compared.")

    average_log_prob = False

    def __post_init__(self):
        if self.loss_type is None:
            self.loss_type = "grpo" if self.advantage == GROUP else "ppo"
        super().__post_init__()
        checks.number("beta", self.beta, at_least=0)
        checks.number("value_coef", self.value_coef, at_least=0)
        checks.number("sampling_temperature", self.sampling_temperature, above=0)
        checks.integer("kl_horizon", self.kl_horizon, at_least=1)
        if self.kl_target is not None and not self.beta:
            raise ValueError(f"kl_target={self.kl_target} adapts beta, which stays 0 once it is 0: set beta above 0")
        for name in ("value_clip", "kl_target"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), above=0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.loss_from == "logits" and self.advantage == GAE and self.value_model == BACKBONE:
            raise ValueError(
                "loss_from='logits' with value_model='backbone': the value head reads hidden states; give the value "
                "model a folder or id of its own, or set advantage='group'"
            )
        if self.loss_type == "gspo" and self.advantage != GROUP:
            raise ValueError(
                "loss_type='gspo' reads one advantage per sample, and advantage='gae' gives one per token: set "
                "advantage='group'"
            )
        # an option, the value that does nothing, and the advantage that it belongs to
        for name, default, advantage in (
            ("value_model", BACKBONE, GAE),
            ("kl_target", None, GAE),
            ("gamma", 1.0, GAE),
            ("lam", 0.95, GAE),
            ("whiten", True, GAE),
            ("value_coef", 0.1, GAE),
            ("value_clip", 0.2, GAE),
            ("scale_by_std", True, GROUP),
        ):
            if getattr(self, name) != default and self.advantage != advantage:
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning without advantage={advantage!r}")

    def _fields_of(self, name: str) -> dict[str, Any]:
        of_kl = {} if name == "gspo" else {"kl_beta": self.beta if self.advantage == GROUP else 0.0}
        return super()._fields_of(name) | of_kl

    def make_loss(self) -> Head:
        """Return the loss. The KL divergence of ``gspo``, a loss of sequences, is a loss of tokens beside it."""
        loss = super().make_loss()
        if self.loss_type != "gspo" or not self.beta:
            return loss
        return heads.Mix((1.0, loss), (self.beta, heads.make("kl", normalizer="sequences")))
