"""Mismatched pairs: each prompt with the completion of another prompt. KTO estimates its z0 from them."""

import numpy as np

NEIGHBOURS = 64  # a partner is drawn among this many completions of similar length


def mismatched_partners(prompts: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a partner for each example: another prompt's example whose completion is about as long.

    No example is the partner of two. As many examples as possible get a partner: all of them, unless more than half
    share one prompt.

    Args:
        prompts: [N] integers, equal for equal prompts.
        lengths: [N] integers, the lengths of the completions.
        seed: decides the order among examples of one length and among the prompts of neighbours.

    Returns:
        [N] int64 indices, -1 where there is no partner.

    >>> import numpy as np
    >>> from kto_fused.preference_data import mismatched_partners
    >>> mismatched_partners(np.array([7, 8]), np.array([3, 5])).tolist()
    [1, 0]
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.permutation(len(prompts)), lengths))
    distinct, prompts = np.unique(prompts, return_inverse=True)
    prompts = random.permutation(len(distinct))[prompts]  # a random order of the prompts, for the sort below
    partners = np.full(len(prompts), -1, dtype=np.int64)
    # examples without a partner so far; all have one prompt, because examples of two prompts partner each other
    waiting = []
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
        # The members are sorted by prompt, and no prompt has more of them than this rotation steps over, in either
        # direction around the end. So each one gets a partner of another prompt.
        partners[members] = np.roll(members, surplus - counts[largest])
    if waiting:
        # Put each one between an example and its partner of which neither has its prompt. There are enough such pairs
        # unless the prompt has more than half of all examples.
        own = prompts[waiting[0]]
        hosts = order[partners[order] >= 0]
        hosts = hosts[(prompts[hosts] != own) & (prompts[partners[hosts]] != own)][: len(waiting)]
        waiting = waiting[: len(hosts)]
        partners[waiting], partners[hosts] = partners[hosts], waiting
    return partners
