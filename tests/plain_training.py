"""Training loops in plain PyTorch and float64: the truth that the trainers are compared with."""

import copy
import itertools

import torch
import torch.nn.functional as F

from kto_fused import reference
from kto_fused.metrics import with_margins
from kto_fused.preference_data import IGNORE_INDEX


def plain_reference_point(policy, ref, batch, args):
    if args.reference_point != "mismatched":
        return args.reference_point

    def logps(model):
        logits = model(input_ids=batch["kl_input_ids"], attention_mask=batch["kl_attention_mask"]).logits
        return reference.sequence_logps(logits, batch["kl_labels"], average_log_prob=args.average_log_prob)

    has_partner = (batch["kl_labels"] != IGNORE_INDEX).any(1)
    with torch.no_grad():
        return (logps(policy) - logps(ref))[has_partner].mean().clamp(min=0)


def plain_kto(policy, ref, batch, args):
    model_inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ref_logits = ref(**model_inputs).logits
    return reference.kto_loss(
        policy(**model_inputs).logits,
        batch["labels"],
        batch["desirable"],
        ref_logits=ref_logits,
        reference_point="batch_mean"
        if args.loss_type == "apo_zero_unpaired"
        else plain_reference_point(policy, ref, batch, args),
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
        loss_type=args.loss_type,
        average_log_prob=args.average_log_prob,
    )


def plain_dpo(policy, ref, batch, args):
    chosen_then_rejected = {name: torch.cat([values[:, 0], values[:, 1]]) for name, values in batch.items()}
    labels = chosen_then_rejected.pop("labels")
    ref_logits = None
    if ref is not None:
        with torch.no_grad():
            ref_logits = ref(**chosen_then_rejected).logits
    return reference.dpo_loss(
        policy(**chosen_then_rejected).logits,
        labels,
        ref_logits=ref_logits,
        beta=args.beta,
        loss_type=args.loss_type,
        **{name: value for name in ("label_smoothing", "gamma") if (value := getattr(args, name)) is not None},
    )


class PlainMetrics:
    """Means of a batch by name, with their weights."""

    def __init__(self, **means):
        self.means = means

    def totals(self):
        return {name: (mean.double() * weight, weight.double()) for name, (mean, weight) in self.means.items()}

    def summary(self):
        return with_margins({name: mean for name, (mean, _) in self.means.items()})


def plain_sft(policy, ref, batch, args):
    """The truth of packed sequences is that of each one alone."""
    rows = list(zip(batch["input_ids"], batch["labels"], strict=True))
    if "cu_seqlens" in batch:
        ((ids, labels),) = rows
        rows = [(ids[start:end], labels[start:end]) for start, end in itertools.pairwise(batch["cu_seqlens"].tolist())]
    losses, entropy, is_top1 = [], [], []
    for ids, labels in rows:
        logps = policy(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        is_trained = labels[1:] != IGNORE_INDEX
        logps, targets = logps[is_trained], labels[1:][is_trained]
        own = logps.gather(1, targets[:, None])[:, 0]
        losses.append(-own * (own.detach().exp() if args.loss_type == "dft" else 1))
        entropy.append(-(logps.exp() * logps).sum(1).detach())
        is_top1.append(logps.argmax(1) == targets)
    losses, entropy, is_top1 = torch.cat(losses), torch.cat(entropy), torch.cat(is_top1).double()
    count = torch.tensor(len(losses))
    return losses.mean(), PlainMetrics(entropy=(entropy.mean(), count), mean_token_accuracy=(is_top1.mean(), count))


def plain_reward(policy, ref, batch, args):
    """Scores are those that transformers returns for single sequences without padding."""
    scores = [
        torch.stack([policy(input_ids=ids[mask == 1][None]).logits[0, 0] for ids, mask in zip(*rows, strict=True)])
        for rows in zip(batch["input_ids"].transpose(0, 1), batch["attention_mask"].transpose(0, 1), strict=True)
    ]
    chosen, rejected = scores
    losses = -F.logsigmoid(chosen - rejected - batch.get("margin", 0)) + args.centering * (chosen + rejected) ** 2
    means = {
        "rewards/chosen": chosen.detach().mean(),
        "rewards/rejected": rejected.detach().mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
    }
    count = torch.tensor(len(chosen))
    loss = (losses * batch.get("weights", 1)).mean()
    return loss, PlainMetrics(**{name: (mean, count) for name, mean in means.items()})


def of_labels(batches):
    """Return label accuracy and AUC of all batches' labelled rewards, comparing each with each; {} without labels."""
    if getattr(batches[0], "desirable", None) is None:
        return {}
    rewards = torch.cat([metrics.rewards for metrics in batches])
    labels = torch.cat([metrics.desirable for metrics in batches])
    liked, disliked = rewards[labels, None], rewards[None, ~labels]
    right = torch.cat([rewards[labels] > 0, rewards[~labels] < 0]).double().mean()
    wins = (liked > disliked).double() + (liked == disliked) / 2
    return {"rewards/accuracies": right.item()} | ({"rewards/auc": wins.mean().item()} if wins.numel() else {})


PLAIN = {"kto": plain_kto, "dpo": plain_dpo, "sft": plain_sft, "reward": plain_reward}


def in_order(trainer, rows, batch_size):
    """Yield the batches of a sequential sampler."""
    for start in range(0, len(rows), batch_size):
        yield trainer.data_collator([rows[row] for row in range(start, min(start + batch_size, len(rows)))])


def plain_training(kind, policy, ref, trainer):
    """Train a copy of ``policy`` in float64, and return the log entries and that copy."""
    policy, args = copy.deepcopy(policy).double(), trainer.args
    ref = None if ref is None else copy.deepcopy(ref).double()
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.learning_rate)
    entries, num_tokens = [], 0
    for batch in in_order(trainer, trainer.train_dataset, args.per_device_train_batch_size):
        optimizer.zero_grad()
        loss, metrics = PLAIN[kind](policy, ref, batch, args)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        num_tokens += int(batch["attention_mask"].sum())
        entry = {"loss": loss.detach(), "grad_norm": grad_norm, "num_tokens": num_tokens, **metrics.summary()}
        entries.append(entry | of_labels([metrics]))
    return [{name: float(value) for name, value in entry.items()} for entry in entries], policy


def assert_same_steps(actual, expected, start, tolerance=1e-4):
    """Compare the changes from ``start``: relative to the change's norm, plus the rounding of the weights."""
    for name, target in expected.items():
        change, rounding = target.double() - start[name], 2e-7 * target.norm()
        assert change.norm() > 100 * rounding, f"{name} has not moved"
        error = (actual[name].double() - target).norm()
        assert error <= tolerance * change.norm() + rounding, f"{name}: {error:.1e} of {change.norm():.1e}"
