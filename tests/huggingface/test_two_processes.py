"""DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-3 over two processes train as one process does."""

import os
import traceback
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from huggingface_cases import assert_same_gradients, loss_of, whole, with_lora
from models import from_own_logits, make_batch, make_model
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kto_fused import (
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
)

ACROSS_RANKS = {}


def across_ranks(check):
    """Mark a test of two processes. One pair of processes runs all of them; ``outcomes`` holds each test's result."""
    ACROSS_RANKS[check.__name__] = check

    def test(outcomes):
        for outcome in outcomes:
            if (reason := outcome[check.__name__]).startswith("skipped: "):
                pytest.skip(reason.removeprefix("skipped: "))
            assert reason == "passed", reason

    return test


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_all, (folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def run_all(rank: int, folder) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    outcome = {}
    for name, check in ACROSS_RANKS.items():
        try:
            check()
            outcome[name] = "passed"
        except pytest.skip.Exception as reason:
            outcome[name] = f"skipped: {reason}"
        except Exception:
            outcome[name] = f"rank {rank}: {traceback.format_exc()}"
    torch.save(outcome, folder / str(rank))
    dist.destroy_process_group()


def half(rank: int, seed: int) -> tuple[dict, dict]:
    model_inputs, arguments = make_batch(fused_linear_kto_loss, seed=seed)
    rows = slice(2 * rank, 2 * rank + 2)
    model_inputs = {name: value[rows] for name, value in model_inputs.items()}
    arguments = {name: value if name == "reference_point" else value[rows] for name, value in arguments.items()}
    return model_inputs, arguments


def both_losses(wrapped: nn.Module, plain: nn.Module, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return this rank's loss, and the losses of both ranks' halves from the plain model's logits."""
    expected = []
    for rank in range(2):
        model_inputs, arguments = half(rank, seed)
        expected.append(from_own_logits(fused_linear_kto_loss, plain, model_inputs, **arguments))
    model_inputs, arguments = half(dist.get_rank(), seed)
    actual = loss_of(fused_linear_kto_loss, wrapped, model_inputs, **arguments)
    torch.testing.assert_close(actual, expected[dist.get_rank()], rtol=1e-5, atol=1e-5)
    return actual, expected


def check_training(wrapped: nn.Module, plain: nn.Module) -> None:
    """Two steps on the ranks' halves equal two steps of one process on the whole batch; scores agree too."""
    models = [huggingface.unwrap(model) for model in (wrapped, plain)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for seed in range(2):
        actual, losses = both_losses(wrapped, plain, seed)
        actual.backward()
        (sum(losses) / 2).backward()
        grads, expected = (
            {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None} for model in models
        )
        assert_same_gradients(grads, expected)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model_inputs, arguments = half(dist.get_rank(), seed)
        with torch.no_grad():
            logps = loss_of(linear_sequence_logps, wrapped, model_inputs, labels=arguments["labels"])
            expected = from_own_logits(linear_sequence_logps, plain, model_inputs, labels=arguments["labels"])
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)


@across_ranks
def test_ddp_trains_as_one_process():
    check_training(DistributedDataParallel(make_model("llama")), make_model("llama"))


@across_ranks
def test_ddp_with_a_search_for_unused_parameters_trains_as_one_process():
    model = DistributedDataParallel(make_model("mixtral"), find_unused_parameters=True)
    check_training(model, make_model("mixtral"))


@across_ranks
def test_ddp_with_a_static_graph_trains_as_one_process():
    check_training(DistributedDataParallel(make_model("mixtral"), static_graph=True), make_model("mixtral"))


def sharded(model: nn.Module, tail: bool = False, **options) -> nn.Module:
    """Make every layer and the root a group of FSDP2. With ``tail`` the last norm and the head are one more group, as
    accelerate makes it.
    """
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if tail:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@across_ranks
def test_fsdp2_of_layers_and_root_trains_as_one_process():
    check_training(sharded(make_model("llama")), make_model("llama"))


@across_ranks
def test_fsdp2_with_the_head_in_its_own_group_trains_as_one_process():
    check_training(sharded(make_model("llama"), tail=True), make_model("llama"))


@across_ranks
def test_fsdp2_with_a_tied_head_trains_as_one_process():
    check_training(sharded(make_model("gemma2")), make_model("gemma2"))


@across_ranks
def test_fsdp2_of_an_attached_model_trains_as_one_process():
    model = make_model("llama")
    huggingface.attach(model)
    check_training(sharded(model, tail=True), make_model("llama"))


@across_ranks
def test_fsdp2_of_a_mixture_of_experts_trains_as_one_process():
    check_training(sharded(make_model("mixtral")), make_model("mixtral"))


@across_ranks
def test_fsdp2_with_lora_whose_adapters_are_off_for_the_reference():
    plain = with_lora(make_model("llama"), modules_to_save=["lm_head"])
    model = with_lora(make_model("llama"), modules_to_save=["lm_head"])
    sharded(model.get_base_model())
    check_training(model, plain)
    model_inputs, arguments = half(0, 0)
    with torch.no_grad(), model.disable_adapter():
        logps = loss_of(linear_sequence_logps, model, model_inputs, labels=arguments["labels"])
    expected = loss_of(linear_sequence_logps, make_model("llama"), model_inputs, labels=arguments["labels"])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)


def sharded_by_accelerate(model: nn.Module, mp_policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """Call accelerate's own function for FSDP2 directly, because its ``Accelerator`` does not shard on a CPU."""
    utils = pytest.importorskip("accelerate.utils", reason="accelerate is not installed")
    plugin = utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        mixed_precision_policy=mp_policy,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("ranks",): dist.device_mesh.init_device_mesh("cpu", (2,))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["ranks"]),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    huggingface.attach(model)
    model = utils.fsdp_utils.fsdp2_prepare_model(accelerator, model)
    assert type(model.lm_head) is not nn.Linear  # accelerate shards the head as a group of its own
    return model


@across_ranks
def test_fsdp2_as_accelerate_prepares_it_trains_as_one_process():
    check_training(sharded_by_accelerate(make_model("llama")), make_model("llama"))


@across_ranks
def test_fsdp2_as_accelerate_prepares_a_tied_head_trains_as_one_process():
    check_training(sharded_by_accelerate(make_model("gemma2")), make_model("gemma2"))


def check_nothing_is_rounded(shard) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    model = shard(make_model("llama"), mp_policy=policy)
    seen = {}

    def watched(hidden, lm_head_weight, **arguments):
        loss, metrics = fused_linear_kto_loss(hidden, lm_head_weight, **arguments)
        loss.register_hook(lambda grad: seen.update(grad=grad))
        seen.update(loss=loss.detach(), metrics=metrics, dtype=lm_head_weight.dtype, **arguments)
        return loss, metrics

    model_inputs, arguments = half(dist.get_rank(), 0)
    loss, metrics = huggingface.apply(watched, model, model_inputs, **arguments, reduction="none")
    assert seen["dtype"] == torch.bfloat16
    assert torch.equal(seen["ref_logps"], arguments["ref_logps"])
    assert not torch.equal(arguments["ref_logps"], arguments["ref_logps"].bfloat16().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, seen["loss"])
    assert not torch.equal(loss, loss.bfloat16().float())
    assert metrics is seen["metrics"]
    assert metrics.logps.dtype != torch.bfloat16
    weights = torch.tensor([1 / 3, 1 / 7])
    (loss * weights).sum().backward()
    assert torch.equal(seen["grad"], weights)
    plain = make_model("llama")
    for rank in range(2):
        model_inputs, arguments = half(rank, 0)
        loss = loss_of(fused_linear_kto_loss, plain, model_inputs, **arguments, reduction="none")
        (loss * weights).sum().div(2).backward()
    for name, parameter in plain.named_parameters():
        grad = whole(model.get_parameter(name).grad)
        assert grad.dtype == torch.float32
        assert (grad - parameter.grad).norm() <= 0.03 * parameter.grad.norm(), name


@across_ranks
def test_fsdp2_in_mixed_precision_rounds_no_loss():
    check_nothing_is_rounded(sharded)


@across_ranks
def test_fsdp2_in_mixed_precision_rounds_no_loss_of_a_head_in_its_own_group():
    check_nothing_is_rounded(partial(sharded, tail=True))


@across_ranks
def test_fsdp2_in_mixed_precision_as_accelerate_prepares_it_rounds_no_loss():
    check_nothing_is_rounded(sharded_by_accelerate)


@across_ranks
def test_deepspeed_zero3_trains_as_one_process():
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    model, plain = make_model("llama"), make_model("llama")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (model, plain)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizers[0],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # the default is 1
            "zero_allow_untested_optimizer": True,
        },
    )
    assert model.lm_head.weight.numel() == 0
    for seed in range(2):
        actual, losses = both_losses(engine, plain, seed)
        engine.backward(actual)
        engine.step()
        optimizers[1].zero_grad()
        (sum(losses) / 2).backward()
        optimizers[1].step()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            torch.testing.assert_close(parameter.data, plain.get_parameter(name).data, rtol=0, atol=1e-6)
