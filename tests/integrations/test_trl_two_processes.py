"""Two processes of a fused TRL trainer train and log as TRL's own, and FSDP2 rounds no log-probability."""

import gc
import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from trl_cases import (
    BATCH,
    VERSION,
    CPOTrainer,
    DPOTrainer,
    KTOTrainer,
    assert_no_log_ratio,
    assert_same_logs,
    assert_same_training,
    batch,
    data,
    equal_trainer,
    long_data,
    make_grpo_trainer,
    make_trainer,
    model,
    steps,
)

from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")


def two_processes(rank: int, folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    gc.freeze()
    for kind, settings in ((KTOTrainer, {}), (DPOTrainer, {"loss_type": ["ipo"]})):
        # one row is left for the last batch, and TRL gathers only one rank's values of it
        rows = data(kind, rows=2 * BATCH + 1)
        logs = assert_same_training(
            kind, folder / f"{rank}", train_dataset=rows, num_train_epochs=1, max_steps=-1, **settings
        )
        assert len(logs) == 3
        assert kind is DPOTrainer or logs[0]["kl"] > 0
    logs = assert_same_training(
        CPOTrainer,
        folder / f"{rank}",
        train_dataset=data(CPOTrainer, rows=2 * BATCH + 1),
        num_train_epochs=1,
        max_steps=-1,
    )
    assert len(logs) == 3
    check_grpo(folder)
    if VERSION >= (1, 15):
        check_fsdp2_rounds_no_log_probability(folder / f"{rank}")
    if VERSION >= (1, 14):
        check_precomputed_references(rank, folder)
    gc.collect()  # trainers hold the process group, and its threads should end before the interpreter does
    torch.distributed.destroy_process_group()


def check_grpo(folder: Path) -> None:
    """Both processes' tokens count in DAPO's normaliser and in the logged means."""
    settings = {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    own, fused = steps(make_grpo_trainer(folder, **settings)), steps(fuse(make_grpo_trainer(folder, **settings)))
    assert_same_logs(fused.logs, own.logs)
    for name, parameter in fused.parameters.items():
        torch.testing.assert_close(parameter, own.parameters[name], rtol=1e-4, atol=2e-6)


def check_precomputed_references(rank: int, folder: Path) -> None:
    """Both processes share TRL's cache file beside the data."""
    for kind in (KTOTrainer, DPOTrainer):
        if rank == 0:
            long_data(kind, rows=2 * BATCH).save_to_disk(folder / kind.__name__)
        torch.distributed.barrier()
        trainer = fuse(
            equal_trainer(
                kind,
                folder / f"{rank}",
                own_reference=False,
                precompute_ref_log_probs=True,
                train_dataset=Dataset.load_from_disk(folder / kind.__name__),
            )
        )
        assert vars(trainer)["_is_fused"]
        evaluated = trainer.evaluate(Dataset.load_from_disk(folder / kind.__name__))
        logs = steps(trainer).logs
        assert_no_log_ratio(evaluated, "eval_")
        assert_no_log_ratio(logs[0])


def check_fsdp2_rounds_no_log_probability(folder: Path) -> None:
    """Log-probabilities that TRL's losses take are unrounded too."""
    fused = fuse(make_trainer(DPOTrainer, folder)).model
    whole, weight = fused(**batch(), fused_lm_head=True), fused.model.layers[0].mlp.up_proj.weight
    (expected_grad,) = torch.autograd.grad(whole.log_probs.sum(), weight)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard([*fused.model.layers], mesh=mesh)
    fully_shard(fused, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    output = fused(**batch(), fused_lm_head=True)
    assert output.loss.dtype == torch.bfloat16  # TRL does not read it
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(output[name], whole[name])
    output.log_probs.sum().backward()
    grad = fused.model.layers[0].mlp.up_proj.weight.grad.full_tensor()
    torch.testing.assert_close(grad, expected_grad)


def test_two_processes_train_and_log_as_in_trl(tmp_path):
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    model().save_pretrained(tmp_path / "model")  # in a process group only the first process would save it
    torch.multiprocessing.spawn(two_processes, (tmp_path, port), nprocs=2)
