"""TRL 1.16's own loss code, run on the same log-probabilities, gives the same losses and the same logged values."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from cases import make_case

from kto_fused import fused_dpo_loss, fused_kto_loss, reference

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
if not trl.__version__.startswith(("1.15.", "1.16.")):
    pytest.skip(f"compares with TRL 1.15 and 1.16, found {trl.__version__}", allow_module_level=True)

B, T, V = 6, 9, 50


class Model:
    """Stands for a model with TRL's fused LM head: it returns the values of given logits."""

    training = True

    def __init__(self, logits: dict[int, torch.Tensor]):
        self.logits = logits  # by a batch's first token: 0 for the completions, 1 for the mismatched pairs

    def __call__(self, input_ids, labels, **_):
        logits = self.logits[int(input_ids[0, 0])]
        # from logits alone there are no token metrics, so an identity is the LM head
        logps, metrics = reference.linear_token_logps(logits, torch.eye(V), labels, return_metrics=True)
        return SimpleNamespace(
            log_probs=logps[:, :-1],
            entropy=metrics.entropy[:, :-1],
            mean_logits=metrics.mean_logits[:, :-1],
            is_top1=metrics.is_top1[:, :-1].bool(),
            aux_loss=None,
        )


def trl_trainer(**settings) -> SimpleNamespace:
    from accelerate import Accelerator

    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(cpu=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


@pytest.fixture
def case():
    case = make_case(batch=B, seq_len=T, vocab=V, seed=3)
    case.labels = torch.randint(1, V, (B, T))
    case.labels[:, -1] = case.logits[:, -2].argmax(-1)  # so that some labels are the greedy choice
    case.labels[:, : T // 2] = -100
    case.labels[2, -2:] = -100
    return case


def inputs(labels: torch.Tensor, first: int = 0) -> dict[str, torch.Tensor]:
    input_ids = labels.clamp(min=0)
    input_ids[0, 0] = first
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != -100).long(),
    }


def assert_logged_alike(trainer, metrics, names) -> None:
    summary = metrics.summary()
    for name in names:
        assert summary[name].item() == pytest.approx(trainer._metrics["train"][name][-1], rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
def test_kto_losses_and_metrics_equal_trls(case, loss_type, weights):
    from trl import KTOTrainer

    kl_logits = torch.randn(B, T, V) * 3
    ref_logps = reference.sequence_logps(case.ref_logits, case.labels).float()
    kl_logps = reference.sequence_logps(kl_logits, case.labels)
    ref_kl_logps = (kl_logps - 2.5).float()
    calculate_kl = loss_type == "kto"
    trainer = trl_trainer(
        beta=0.1,
        loss_type=loss_type,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        calculate_KL=calculate_kl,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    batch = inputs(case.labels)
    batch.update({f"KL_{name}": value for name, value in inputs(case.labels, first=1).items()})
    batch.update(label=case.desirable, ref_logps=ref_logps, ref_KL_logps=ref_kl_logps)
    expected = KTOTrainer._compute_loss(trainer, Model({0: case.logits, 1: kl_logits}), batch, return_outputs=False)

    z0 = reference.kto_reference_point(kl_logps, ref_kl_logps) if calculate_kl else "batch_mean"
    loss, metrics = fused_kto_loss(
        case.logits,
        case.labels,
        case.desirable,
        ref_logps=ref_logps,
        reference_point=z0,
        loss_type=loss_type,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    sides = [f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
    assert_logged_alike(trainer, metrics, [*sides, "rewards/margins", "kl", "entropy"])


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down"])
def test_dpo_losses_and_metrics_equal_trls(case, loss_type):
    from trl import DPOTrainer

    smoothing = 0.1 if loss_type == "robust" else 0.0
    ref_logps = reference.sequence_logps(case.ref_logits, case.labels).float()
    trainer = trl_trainer(
        beta=0.2,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    batch = inputs(case.labels)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref_logps.chunk(2)
    expected = DPOTrainer._compute_loss(trainer, Model({0: case.logits}), batch, return_outputs=False)
    loss, metrics = fused_dpo_loss(
        case.logits, case.labels, ref_logps=ref_logps, beta=0.2, loss_type=loss_type, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    sides = [f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
    assert_logged_alike(
        trainer, metrics, [*sides, "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy"]
    )
