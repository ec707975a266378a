"""Trainable parameters that text never reaches: vision and audio towers, and their projectors.

Such parameters get no gradient from preference data of texts. The trainers freeze or report them.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .running import evaluating, made_to_run, tokens_to_check


class Unreached(NamedTuple):
    """Names of trainable parameters that the logits of a few tokens do not depend on."""

    outside: list[str]  # outside of the language model: no text reaches them
    inside: list[str]  # inside of it: other tokens may reach them (experts of a mixture)


def unreached_by_text(model: PreTrainedModel) -> Unreached:
    """Return which trainable parameters get no gradient from a few tokens of text.

    The graph of the tokens' logits says which parameters they depend on; no gradient is computed. A parameter that is
    missing there and lies outside of the language model (``get_decoder()``), its embeddings and its head is never
    reached: no token can bring a vision tower in. Inside of the language model it may depend on the tokens.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    input_ids = tokens_to_check(model)
    with evaluating(model), torch.enable_grad(), made_to_run(model, input_ids.device):  # dropout would draw numbers
        logits = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    reached = _leaves(logits)
    inside = {
        id(parameter)
        for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
        for parameter in part.parameters()
    }
    missed = {name: id(parameter) for name, parameter in trainable.items() if id(parameter) not in reached}
    return Unreached(
        [name for name, key in missed.items() if key not in inside],
        [name for name, key in missed.items() if key in inside],
    )


def _leaves(tensor: torch.Tensor) -> set[int]:
    """Return the ids of the parameters in which the tensor's graph ends."""
    waiting, seen, found = [tensor.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def parts_of(model: PreTrainedModel, parameters: list[str]) -> list[str]:
    """Return the names of the largest modules that hold these parameters and nothing of the language model."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    around = {tuple(path.split(".")[:depth]) for depth in range(path.count(".") + 2)}
    found = set()
    for parameter in parameters:
        steps = tuple(parameter.split("."))
        found.add(next(".".join(steps[:depth]) for depth in range(1, len(steps) + 1) if steps[:depth] not in around))
    return sorted(found)
