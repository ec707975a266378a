"""Saving and resuming: ``transformers.Trainer`` whose checkpoints are either complete or ignored.

A run that is resumed goes on as if it had not been stopped: same weights, same log. ``checkpoints`` holds the work on
files; this module puts it into the places where ``Trainer`` saves and loads.
"""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..huggingface.running import keeping_trainable
from ..metrics import Totals
from . import adapters, cards, checkpoints, fingerprints, folder_lock, models, ranks, runs
from .reference import Reference


class ResumableTrainer(Trainer):
    """``Trainer`` whose runs can be stopped at any step. Its subclass sets the attributes below."""

    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    _tokenizer: PreTrainedTokenizerBase
    _reference: Reference
    _train_totals: Totals  # the metrics since the last log
    _num_tokens: torch.Tensor  # trained on so far
    _saves_together = False  # whether all processes write a checkpoint now, and share an error
    facts: dict[str, Any]  # of the run, under the names of metrics.json; a command adds them to the model card

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """Return the model inside the wrappers of accelerate and torch.compile."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> TrainOutput:
        """Train, from the start or from a checkpoint, and return what ``Trainer.train`` returns.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True: the newest complete one in ``args.output_dir``.
            arguments, options: as in ``Trainer.train``.

        Raises:
            checkpoints.CheckpointError: the checkpoint is incomplete, damaged or belongs to another run, or no
                checkpoint is complete, or a new one cannot be saved.
            checkpoints.FolderInUseError: another run writes into ``args.output_dir``.
        """
        args, checkpoint = self.args, None
        with folder_lock.only_run_in(args):
            if resume_from_checkpoint:
                wanted = resume_from_checkpoint if resume_from_checkpoint is True else str(resume_from_checkpoint)
                checkpoint = checkpoints.agreed(
                    args, lambda: checkpoints.choose(wanted, args.output_dir, args.resume_anyway)
                )
                checkpoints.check_all_see(args, checkpoint)
            self._run = runs.describe_run(
                args,
                model=self.unwrapped(self.model),
                reference=self._reference_fingerprint(),
                tokenizer=self._tokenizer,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                columns=[*self.columns, *self.optional_columns],
            )
            runs.check_same_everywhere(self._run, args)
            if checkpoint is not None:
                checkpoints.agreed(args, lambda: runs.check_same_run(checkpoint, self._run, args))
            return super().train(checkpoint, *arguments, **options)

    def _reference_fingerprint(self) -> str | None:
        if self._reference.model is not None:
            return fingerprints.hash_weights(self.unwrapped(self._reference.model))
        return self._reference.fingerprint

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *rest: Any) -> tuple[int, int]:
        """Train nothing after the last step, where ``Trainer`` would take a step in the middle of an epoch."""
        checkpoint = rest[0]
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, checkpoints.STATE))
            runs.warn_of_another_end(state.max_steps, max_steps, self.args)
        start = super()._init_training_state(max_steps, steps_per_epoch, epochs, *rest)
        if self.state.global_step < max_steps:
            if checkpoint is not None and holds_model_alone(checkpoint):
                begun = ", with the reference that this run began with as ref_model"
                raise ValueError(
                    f"{checkpoint} holds a model alone (save_only_model), and training would go on with an optimizer "
                    f"and a schedule that start anew: start a new run from that model"
                    f"{begun * self._reference.is_policy_at_start}"
                )
            return start
        self.accelerator.print(f"The checkpoint has all {max_steps} steps: nothing is trained, its results are written")
        return epochs, 0  # all epochs are done

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint with a manifest as its last file, then upload it and remove older ones.

        Where a process fails, all raise its error. FSDP and DeepSpeed wait for one another while they write: there the
        process that fails in a write raises its error alone, and the launcher ends the others.
        """
        args, save = self.args, functools.partial(super()._save_checkpoint, model, trial)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        afterwards = {name: getattr(args, name) for name in ("save_total_limit", "push_to_hub")}
        try:
            checkpoints.agreed(args, lambda: checkpoints.begin(folder))
            args.save_total_limit, args.push_to_hub = None, False
            is_split = getattr(self, "is_distributed_loading_by_transformers", False)  # transformers 5.17 has no such
            self._saves_together = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or is_split)
            try:
                self._together(save)
            finally:
                self._saves_together = False
                for name, value in afterwards.items():
                    setattr(args, name, value)
            self.accelerator.wait_for_everyone()  # the manifest lists the files of all processes
            # agreed, because ``Trainer`` looks for the best checkpoint on each process's own disk
            self.state.best_model_checkpoint = checkpoints.agreed(args, lambda: self._completed(folder))
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if args.should_save:
                checkpoints.abandon(folder)
            way_out = "start again, because there is no earlier checkpoint"
            found = checkpoints.found_in(folder.parent)  # another process may be removing the part that was written
            if any(one.folder != folder or checkpoints.is_complete(folder) for one in found):
                way_out = "resume from the newest checkpoint (resume_from_checkpoint); earlier ones are unchanged"
            raise checkpoints.CheckpointError(
                f"{folder} could not be saved ({checkpoints.reason_of(error)}): free space or repair the disk, then "
                f"{way_out}"
            ) from error
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        best = self.state.best_model_checkpoint
        checkpoints.agreed(args, lambda: checkpoints.rotate(folder.parent, args.save_total_limit, folder, best))

    def _completed(self, folder: Path) -> str | None:
        """Make the checkpoint complete, and return the best one."""
        if (folder / TRAINING_ARGS_NAME).exists():
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the two options that were changed meanwhile
        checkpoints.end(folder, self._run)
        return self.state.best_model_checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as ``Trainer`` does.

        In a checkpoint an error of one process is raised on all, because ``Trainer`` waits for all of them afterwards.
        """
        self._together(functools.partial(super().save_model, output_dir, _internal_call))

    def _together(self, save: Callable[[], None]) -> None:
        """Call ``save``; in a checkpoint that each process writes at its own pace, raise its error on all of them."""
        if not self._saves_together:
            return save()

        def shared() -> list:
            try:
                save()
            except (OSError, RuntimeError, SafetensorError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                # the reason may stand in the error's causes, which do not reach other processes
                raise RuntimeError(checkpoints.reason_of(error)) from error
            return []

        ranks.shared(self.args, shared)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model without the copies of adapters that are the reference, and adapters with a model card."""
        reference = self._reference.adapters
        copies = () if reference is None else reference.copies
        policy = self.accelerator.unwrap_model(self.model)
        with adapters.saving_all_but(policy, copies) if copies else nullcontext():
            super()._save(output_dir, state_dict)
        if self.args.should_save and models.has_adapters(policy):  # every rank comes here, and one writes
            cards.write(self, Path(output_dir or self.args.output_dir))  # in place of PEFT's, which says nothing

    def init_hf_repo(self, *arguments: Any, **options: Any) -> None:
        """Make the repository of ``push_to_hub``, as ``Trainer`` does. An error says how to do without it."""
        try:
            super().init_hf_repo(*arguments, **options)
        except Exception as error:  # of the network, the token or the Hub, of many kinds
            raise RuntimeError(
                f"push_to_hub: the repository cannot be made ({' '.join(str(error).split())}): check the network, "
                "hub_model_id and the token (hf auth login, HF_TOKEN or hub_token), or leave push_to_hub out and "
                f"upload the model after the run: {cards.upload_by_hand(self)}"
            ) from error

    def create_model_card(self, *arguments: Any, model_name: str | None = None, **options: Any) -> None:
        """Write ``README.md`` into ``args.output_dir`` with the run's settings and figures, in place of ``Trainer``'s.

        Args:
            model_name: the title; the folder's name if not given.
            options: ``language``, ``license`` and ``tags``, for the card's head.

        Raises:
            TypeError: another option of ``Trainer.create_model_card``, which the card has no place for.
        """
        unknown = [*arguments, *sorted(options.keys() - {"language", "license", "tags"})]
        if unknown:
            raise TypeError(f"create_model_card takes model_name, language, license and tags by name, got {unknown}")
        if self.is_world_process_zero():
            cards.write(self, Path(self.args.output_dir), title=model_name, **options)

    def _metrics_file(self, folder: str) -> str:
        return os.path.join(folder, f"metrics_{self.args.process_index}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, beside the random state, the sums of the metrics since the last log and the recipe's own state."""
        super()._save_rng_state(output_dir)
        state = {"totals": self._train_totals.values, "num_tokens": self._num_tokens, "recipe": self._recipe_state()}
        state["labelled"] = self._train_totals.labelled
        torch.save(state, self._metrics_file(output_dir))

    def _recipe_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of this rank that a recipe carries from step to step."""
        return {}

    def _restore_recipe_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what ``_recipe_state`` returned."""

    # ---- loading ----

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.exists(self._metrics_file(checkpoint)):
            state = torch.load(self._metrics_file(checkpoint), map_location="cpu", weights_only=True)
            device = self.args.device  # moved here: torch.load takes no map_location like "cpu:0"
            self._train_totals.values = {name: values.to(device) for name, values in state["totals"].items()}
            self._train_totals.labelled = [values.to(device) for values in state.get("labelled", [])]
            self._num_tokens = state["num_tokens"].to(device)
            self._restore_recipe_state({name: value.to(device) for name, value in state.get("recipe", {}).items()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights, and keep which adapters are active and which weights are frozen.

        Of several active adapters ``Trainer`` would leave the first one active, and unfreeze its frozen weights.
        """
        if not models.has_adapters(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.accelerator.unwrap_model(self.model)
        active = policy.base_model.active_adapter
        with keeping_trainable(policy):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if len(policy.peft_config) > 1 and Path(resume_from_checkpoint, "adapter_config.json").is_file():
                # PEFT saves the adapter "default" in the folder itself, where transformers 5.17 finds it only if alone
                is_active = "default" in ([active] if isinstance(active, str) else active)
                policy.load_adapter(resume_from_checkpoint, "default", is_trainable=is_active)
            if policy.base_model.active_adapter != active:
                policy.base_model.set_adapter(active)

    def _load_best_model(self) -> None:
        """Load the best checkpoint once it is verified.

        ``Trainer`` would load a single adapter only, and only one whose name is "default".
        """
        best = self.state.best_model_checkpoint
        if not self.args.resume_anyway or (Path(best) / checkpoints.MANIFEST).exists():
            checkpoints.agreed(self.args, lambda: checkpoints.verify(Path(best)))
        is_whole = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        is_peft = models.has_adapters(self.model)
        if is_peft and is_whole and list(self.accelerator.unwrap_model(self.model).peft_config) != ["default"]:
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()


def holds_model_alone(checkpoint: str) -> bool:
    """Whether a checkpoint lacks what a run needs, beside the model, to go on as if it had not been stopped."""
    # the only file beside the model that has the same name under DeepSpeed and FSDP
    return not any(Path(checkpoint).glob("rng_state*.pth"))
