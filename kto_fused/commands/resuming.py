"""Which checkpoint ``kto-fused train`` resumes from, and which output folders it refuses to write into."""

from pathlib import Path

from transformers import TrainerState

from ..trainers import checkpoints, holds_model_alone
from ..trainers.configs import (
    FusedDPOConfig,
    FusedKTOConfig,
    FusedPreferenceConfig,
    FusedRewardConfig,
    FusedSFTConfig,
)
from .errors import CommandError
from .failures import user_errors

# files that a finished run leaves behind or that a model's folder holds
RESULTS = ("metrics.json", "adapter_config.json", "config.json")
RECIPES = {"kto": FusedKTOConfig, "dpo": FusedDPOConfig, "sft": FusedSFTConfig, "reward": FusedRewardConfig}


def starting_checkpoint(config: FusedPreferenceConfig) -> str | None:
    """Return the checkpoint to resume from; None for a new run.

    Raises:
        CommandError: the checkpoint is incomplete or belongs to another run, or the output folder holds the results or
            checkpoints of another run. Nobody could tell the two runs apart there.
    """
    folder, wanted = config.output_dir, config.resume_from_checkpoint
    if wanted is not None and wanted.lower() == "false":
        wanted = None
    latest = next((str(found.folder) for found in checkpoints.found_in(folder)), None)
    if wanted is not None and wanted.lower() == "true":
        with user_errors(checkpoints.CheckpointError, prefix="--resume_from_checkpoint true: "):
            wanted = checkpoints.choose(True, folder, config.resume_anyway)
    elif wanted is not None and (Path(wanted) / checkpoints.STATE).is_file():
        with user_errors(checkpoints.CheckpointError, prefix="--resume_from_checkpoint: "):
            checkpoints.choose(wanted, folder, config.resume_anyway)
    if wanted is None or Path(wanted).resolve().parent != Path(folder).resolve():
        if latest is not None:
            raise CommandError(
                f"--output_dir {folder} already holds {Path(latest).name} of another run: add --resume_from_checkpoint "
                "true to continue that run, or choose another folder"
            )
        held = next((name for name in RESULTS if (Path(folder) / name).exists()), None)
        if held is not None:
            raise CommandError(
                f"--output_dir {folder} already holds {held} of another model or run: choose another folder"
            )
    if wanted is not None:
        check_continues(wanted, config)
    return wanted


def _recipe_of(entry: dict[str, float]) -> str:
    """Return the recipe that logged an entry, by the names in it."""
    if not any(name.startswith("rewards/") for name in entry):
        return "sft"
    is_scored = not any(name.startswith("logps/") for name in entry)
    return "reward" if is_scored else "dpo" if "mean_token_accuracy" in entry else "kto"


def check_continues(checkpoint: str, config: FusedPreferenceConfig) -> None:
    """Check that ``Trainer`` would continue the run that the checkpoint belongs to.

    Raises:
        CommandError: it would train another loss, more steps than asked for, or without an optimizer's state.
    """
    flag, path = f"--resume_from_checkpoint {checkpoint}", Path(checkpoint) / checkpoints.STATE
    if not path.is_file():
        raise CommandError(f"{flag} is not a checkpoint: it has no {checkpoints.STATE}")
    with user_errors(OSError, ValueError, TypeError, prefix=f"{path} cannot be read: "):
        state = TrainerState.load_from_json(str(path))
    recipe = next((_recipe_of(entry) for entry in state.log_history if "loss" in entry), None)
    if recipe is not None and not isinstance(config, RECIPES[recipe]):
        raise CommandError(f"{flag} was trained with --loss {recipe}: resume it with the same loss")
    steps = state.global_step
    if 0 < config.max_steps < steps:
        raise CommandError(f"{flag} has {steps} steps already, but --max_steps is {config.max_steps}")
    has_more = steps < config.max_steps if config.max_steps > 0 else (state.epoch or 0) < config.num_train_epochs
    if has_more and holds_model_alone(checkpoint):
        raise CommandError(
            f"{flag} holds only the model (--save_only_model), and training cannot resume without the optimizer and "
            f"the schedule: start a new run from that model (--model {checkpoint}, another --output_dir)"
        )
