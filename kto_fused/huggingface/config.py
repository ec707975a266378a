"""Two facts from a model's configuration: how its logits follow from its LM head, and how long its sequences may be."""

from transformers import PretrainedConfig

# Models multiply the LM head's output by a number, divide it by one, or cap it softly. Each architecture has its own
# name for that number in its configuration; these are all of them.
MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPPED_BY = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# model types that multiply by the number that ``DIVIDED_BY`` names
MULTIPLYING = ("hyperclovax",)


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """Return the ``logit_scale`` and ``logit_softcap`` that turn the LM head's output into the model's logits.

    The keys are keyword arguments of the fused losses. The scale is 1.0 and the soft cap None where the model has none.
    """
    text = config.get_text_config()
    is_multiplying = text.model_type in MULTIPLYING
    scale = 1.0
    for name in MULTIPLIED_BY + DIVIDED_BY:
        factor = getattr(text, name, None)
        if factor and not isinstance(factor, str):  # MPT may name a rule in a string; its model does not follow it
            scale = scale * factor if name in MULTIPLIED_BY or is_multiplying else scale / factor
    softcaps = (getattr(text, name, None) for name in SOFT_CAPPED_BY)
    return {"logit_scale": scale, "logit_softcap": next(filter(None, softcaps), None)}


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model was made for, in tokens, or None if the configuration states none.

    Rotary embeddings that are stretched by a factor count with their stretched length.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None or stated < 1:  # XLNet states -1
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(original * (rope.get("factor") or 1)))  # some configurations state the length unstretched
