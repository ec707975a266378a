"""Mismatched pairs: for each prompt the completion of another one, from which KTO's z0 is estimated."""

import numpy as np

NEIGHBOURS = 64  # completions of like length among which mismatched partners are drawn


def mismatched_partners(prompts: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each example another one, whose prompt is not its own and whose completion is about as long as its own.

    No example is chosen twice. As many as can be have a partner: all, unless more than half share one prompt.

    Args:
        prompts: [N] integers, equal where prompts are.
        lengths: [N] integers, of the completions.
        seed: of the order among examples of one length, and among the prompts of neighbours.

    Returns:
        [N] int64 indices, -1 where there is no partner.
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.permutation(len(prompts)), lengths))
    distinct, prompts = np.unique(prompts, return_inverse=True)
    prompts = random.permutation(len(distinct))[prompts]  # the order in which they are stepped through below
    partners = np.full(len(prompts), -1, dtype=np.int64)
    waiting = []  # for a partner; all of one prompt, because examples of two prompts are each other's partners
    for start in range(0, len(order), NEIGHBOURS):
        members = np.concatenate([waiting[-NEIGHBOURS:], order[start : start + NEIGHBOURS]]).astype(np.int64)
        del waiting[-NEIGHBOURS:]
        members = members[np.argsort(prompts[members], kind="stable")]
        _, first, counts = np.unique(prompts[members], return_index=True, return_counts=True)
        largest = counts.argmax()
        surplus = max(0, 2 * counts[largest] - len(members))
        alone = slice(first[largest], first[largest] + surplus)
        waiting.extend(members[alone].tolist())
        members = np.delete(members, alone)
        # they stand prompt by prompt, and no prompt is longer than this step or than the step back round the end
        partners[members] = np.roll(members, surplus - counts[largest])
    if waiting:
        # each goes between an example and its partner, where neither has its prompt: such pairs are never too few,
        # unless the prompt has more than half of all examples
        own = prompts[waiting[0]]
        hosts = order[partners[order] >= 0]
        hosts = hosts[(prompts[hosts] != own) & (prompts[partners[hosts]] != own)][: len(waiting)]
        waiting = waiting[: len(hosts)]
        partners[waiting], partners[hosts] = partners[hosts], waiting
    return partners
