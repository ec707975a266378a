"""Random shapes, masks, strides and options against the twin in float64."""

import torch
from cases import LOGP_TOLERANCE, Case, check_against_twin, to_device
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_fused import fused_dpo_loss, fused_kto_loss
from kto_fused.heads.base import REDUCTIONS
from kto_fused.heads.preference import DPO_LOSS_TYPES, KTO_LOSS_TYPES, WITH_LABEL_SMOOTHING

STRIDES = ["contiguous", "rows apart by 8", "rows apart by 3", "transposed"]


def strided(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the values in memory laid out as ``kind`` says, between others that must not be touched."""
    if kind == "transposed" and values.ndim == 3:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    gap = {"contiguous": 0, "rows apart by 8": 8, "rows apart by 3": 3, "transposed": 1}[kind]
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + gap), torch.nan)
    wide[..., : values.shape[-1]] = values
    return wide[..., : values.shape[-1]]


@st.composite
def losses(draw):
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    function = draw(st.sampled_from([fused_kto_loss, fused_dpo_loss]))
    batch = draw(st.sampled_from([1, 2, 3, 5]) if function is fused_kto_loss else st.sampled_from([2, 4]))
    vocab = draw(st.sampled_from([1, 2, 3, 31, 128, 129, 300]))
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "average_log_prob": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, 0, vocab + 5])),
        "beta": draw(st.floats(0.01, 1.0)),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "logit_scale": draw(st.sampled_from([1.0, 1.5])),
        "logit_softcap": draw(st.sampled_from([None, 10.0])),
        "inplace_backward": draw(st.booleans()),
    }
    if function is fused_kto_loss:
        options["loss_type"] = draw(st.sampled_from(KTO_LOSS_TYPES))
        options["desirable_weight"], options["undesirable_weight"] = draw(
            st.sampled_from([(1.0, 1.0), (0.0, 1.7), (0.6, 0.0)])
        )
        if options["loss_type"] != "apo_zero_unpaired":
            options["reference_point"] = draw(st.sampled_from(["batch_mean", 0.0, 1.3]))
    else:
        options["loss_type"] = draw(st.sampled_from(DPO_LOSS_TYPES))
        if options["loss_type"] in WITH_LABEL_SMOOTHING:
            options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))

    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch)))
        options["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        shape = (int(lengths.sum()),)
    else:
        shape = (batch, draw(st.integers(1, 4)))
    labels = torch.randint(vocab, shape, generator=random)
    labels[torch.rand(shape, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = options["ignore_index"]

    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    scale = draw(st.sampled_from([0.0, 1.0, 5.0]))
    logits, ref_logits = ((torch.randn(*shape, vocab, generator=random) * scale).to(dtype) for _ in range(2))
    strides = draw(st.sampled_from(STRIDES)), draw(st.sampled_from(STRIDES))
    desirable = torch.rand(batch, generator=random) < 0.5
    return function, Case(logits, labels, ref_logits, desirable, options), strides


def test_random_losses(engine):
    @settings(max_examples=300)
    @given(losses())
    def check(example):
        function, case, strides = example
        tensors = (case.logits, case.labels, case.ref_logits, case.desirable)
        options = {name: to_device(value, engine[1]) for name, value in case.options.items()}
        case = Case(*(to_device(tensor, engine[1]) for tensor in tensors), options)
        # on the device: a copy to it closes the gaps between rows
        case.logits, case.ref_logits = strided(case.logits, strides[0]), strided(case.ref_logits, strides[1])
        # a log-ratio's error enters the gradient times the losses' weights, up to 100, and their curvature: 2 for ipo,
        # about 0.1 for the other losses
        grad_floor = 100 * (2 if case.options["loss_type"] == "ipo" else 0.1) * LOGP_TOLERANCE[case.logits.dtype]
        check_against_twin(function, case, grad_floor=grad_floor, backend=engine[0])

    check()
