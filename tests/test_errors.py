"""Bad input gets one clear error at the call: which argument, what came, what was expected."""

import math
import re

import numpy as np
import pytest
import torch
from cases import make_case

import kto_fused
from kto_fused import fused_dpo_loss, fused_kto_loss, reference

B, T, V = 4, 5, 7


def arguments(**changes):
    """Valid arguments of ``fused_kto_loss`` but for ``changes``; ``...`` leaves one out."""
    case = make_case(batch=B, seq_len=T, vocab=V)
    case.labels[:] = 1
    values = {
        "policy_logits": case.logits,
        "labels": case.labels,
        "desirable": case.desirable,
        "ref_logps": torch.zeros(B),
    }
    values.update(changes)
    return {name: value for name, value in values.items() if value is not ...}


LOGITS = torch.zeros(B, T, V)
FLOATS = "float16, bfloat16, float32 or float64"
OFFSETS = torch.tensor([0, 3, 6], dtype=torch.int32)
PACKED = {"policy_logits": torch.zeros(6, V), "labels": torch.ones(6, dtype=torch.long), "cu_seqlens": OFFSETS}
PACKED.update(desirable=torch.ones(2, dtype=torch.bool), ref_logps=torch.zeros(2))

KTO_ERRORS = {
    # shapes that do not agree: both values
    "logits of two dimensions": (
        {"policy_logits": torch.zeros(B, V)},
        ValueError,
        "policy_logits must be [B, T, V], got shape [4, 7]; packed logits [N, V] need cu_seqlens",
    ),
    "labels one longer": (
        {"labels": torch.ones(B, T + 1, dtype=torch.long)},
        ValueError,
        "labels has shape [4, 6], expected [4, 5] to match policy_logits [4, 5, 7]",
    ),
    "desirable of another batch": (
        {"desirable": torch.ones(3, dtype=torch.bool)},
        ValueError,
        "desirable has shape [3], expected [4], one per sequence",
    ),
    "ref_logps of another batch": (
        {"ref_logps": torch.zeros(3)},
        ValueError,
        "ref_logps has shape [3], expected [4], one per sequence",
    ),
    "ref_logits of another shape": (
        {"ref_logps": ..., "ref_logits": torch.zeros(B, T, V + 1)},
        ValueError,
        "ref_logits has shape [4, 5, 8], expected policy_logits' shape [4, 5, 7]",
    ),
    "an empty batch": (
        {"policy_logits": LOGITS[:0], "labels": torch.ones(0, T, dtype=torch.long)},
        ValueError,
        "policy_logits must hold at least one sequence, got shape [0, 5, 7]",
    ),
    "an empty vocabulary": ({"policy_logits": LOGITS[..., :0]}, ValueError, "empty vocabulary: shape [4, 5, 0]"),
    "a strided last dimension": (
        {"policy_logits": torch.zeros(B, V, T).transpose(1, 2)},
        ValueError,
        "policy_logits must be contiguous in its last dimension, got strides [35, 1, 5]",
    ),
    "labels on another device": (
        {"labels": torch.ones(B, T, dtype=torch.long, device="meta")},
        ValueError,
        "labels is on meta, but policy_logits is on cpu: expected the same device",
    ),
    "desirable on another device": (
        {"desirable": torch.ones(B, dtype=torch.bool, device="meta")},
        ValueError,
        "desirable is on meta, but the policy is on cpu",
    ),
    "reference_point on another device": (
        {"reference_point": torch.zeros((), device="meta")},
        ValueError,
        "reference_point is on meta, expected the policy's device cpu",
    ),
    # packed
    "offsets of no sequence": (
        {**PACKED, "cu_seqlens": OFFSETS[:1]},
        ValueError,
        "cu_seqlens must be [B+1] offsets of B >= 1 sequences, got shape [1]",
    ),
    "offsets that stop early": (
        {**PACKED, "cu_seqlens": OFFSETS - torch.tensor([0, 0, 1], dtype=torch.int32)},
        ValueError,
        "cu_seqlens must rise from 0 to the 6 packed labels, got [0, 3, 5]",
    ),
    "offsets that fall": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)},
        ValueError,
        "cu_seqlens must rise from 0 to the 6 packed labels, got [0, 7, 6]",
    ),
    "packed logits in a batch": (
        {**PACKED, "policy_logits": torch.zeros(2, 3, V)},
        ValueError,
        "policy_logits must be [N, V] or [1, N, V] with cu_seqlens, got shape [2, 3, 7]",
    ),
    "float offsets": ({**PACKED, "cu_seqlens": OFFSETS.float()}, TypeError, "cu_seqlens must be int32 offsets"),
    # dtypes
    "integer logits": ({"policy_logits": LOGITS.long()}, TypeError, f"policy_logits must be {FLOATS}, got torch.int64"),
    "fp8 logits": (
        {"policy_logits": LOGITS.to(torch.float8_e4m3fn)},
        TypeError,
        f"policy_logits must be {FLOATS}, got torch.float8_e4m3fn",
    ),
    "float labels": (
        {"labels": torch.ones(B, T)},
        TypeError,
        "labels must be integer token ids, got torch.float32",
    ),
    "a list of labels": ({"labels": [[1] * T] * B}, TypeError, "labels must be a tensor, got list"),
    "float desirable": (
        {"desirable": torch.ones(B)},
        TypeError,
        "desirable must be bool (or 0/1 integers), got torch.float32",
    ),
    "desirable of 2": ({"desirable": torch.full((B,), 2)}, ValueError, "desirable must hold 0 or 1, got 2"),
    "integer ref_logps": ({"ref_logps": torch.zeros(B).long()}, TypeError, f"ref_logps must be {FLOATS}"),
    "a flag that is none": ({"shift": 1}, TypeError, "shift must be True or False, got 1"),
    "a float ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
    # the reference
    "two references": (
        {"ref_logits": LOGITS},
        ValueError,
        "expected exactly one of ref_logits and ref_logps, got both",
    ),
    "no reference": ({"ref_logps": ...}, ValueError, "expected exactly one of ref_logits and ref_logps, got neither"),
    # numbers
    "beta of 0": ({"beta": 0.0}, ValueError, "beta must be a finite number > 0, got 0.0"),
    "negative beta": ({"beta": -1}, ValueError, "beta must be a finite number > 0, got -1"),
    "beta NaN": ({"beta": math.nan}, ValueError, "beta must be a finite number > 0, got nan"),
    "infinite beta": ({"beta": math.inf}, ValueError, "beta must be a finite number > 0, got inf"),
    "negative weight": (
        {"desirable_weight": -0.1},
        ValueError,
        "desirable_weight must be a finite number >= 0, got -0.1",
    ),
    "weight NaN": (
        {"undesirable_weight": math.nan},
        ValueError,
        "undesirable_weight must be a finite number >= 0, got nan",
    ),
    "temperature of 0": ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0"),
    "negative scale": ({"logit_scale": -2.0}, ValueError, "logit_scale must be a finite number > 0, got -2.0"),
    "softcap of 0": ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be a finite number > 0, got 0.0"),
    "reference_point NaN": (
        {"reference_point": math.nan},
        ValueError,
        "reference_point must be a finite number",
    ),
    "an array as reference_point": (
        {"reference_point": np.array([0.1, 0.2])},
        ValueError,
        "reference_point must be a number, a scalar tensor or 'batch_mean', got array([0.1, 0.2])",
    ),
    "a vector reference_point": (
        {"reference_point": torch.zeros(4)},
        ValueError,
        "reference_point must be a scalar, got shape [4]",
    ),
    "apo with a reference_point": (
        {"loss_type": "apo_zero_unpaired", "reference_point": 0.5},
        ValueError,
        "loss_type='apo_zero_unpaired' fixes reference_point at 0, got 0.5",
    ),
    "ref_logits of integers": (
        {"ref_logps": ..., "ref_logits": LOGITS.long()},
        TypeError,
        f"ref_logits must be {FLOATS}, got torch.int64",
    ),
    "strided ref_logits": (
        {"ref_logps": ..., "ref_logits": torch.zeros(B, V, T).transpose(1, 2)},
        ValueError,
        "ref_logits must be contiguous in its last dimension",
    ),
    "ref_logits on another device": (
        {"ref_logps": ..., "ref_logits": LOGITS.to("meta")},
        ValueError,
        "ref_logits is on meta, but policy_logits is on cpu",
    ),
    # names: the valid ones are listed
    "unknown loss_type": (
        {"loss_type": "dpo"},
        ValueError,
        "loss_type must be one of ['kto', 'kto_squared', 'apo_zero_unpaired'], got 'dpo'",
    ),
    "unknown reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of ['mean', 'sum', 'none'], got 'avg'",
    ),
    "unknown backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of ['triton', 'torch'] or None, got 'cuda'",
    ),
    "unknown reference_point": (
        {"reference_point": "mean"},
        ValueError,
        "reference_point must be a number, a scalar tensor or 'batch_mean', got 'mean'",
    ),
    # labels
    "label V": (
        {"labels": torch.full((B, T), V)},
        IndexError,
        "labels[0, 1] is 7: expected a token id in [0, 7) or ignore_index=-100",
    ),
    "label -7": ({"labels": torch.full((B, T), -7)}, IndexError, "labels[0, 1] is -7: expected a token id in [0, 7)"),
    # in place
    "in place on a leaf": (
        {"policy_logits": LOGITS.clone().requires_grad_(), "inplace_backward": True},
        ValueError,
        "inplace_backward=True overwrites policy_logits, which is a leaf tensor",
    ),
    "in place on shared memory": (
        {"policy_logits": torch.zeros(1, T, V).expand(B, T, V), "inplace_backward": True},
        ValueError,
        "inplace_backward=True overwrites policy_logits, whose elements share memory",
    ),
}


@pytest.mark.parametrize("function", [fused_kto_loss, reference.kto_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("name", KTO_ERRORS)
def test_kto(function, name):
    changes, error, message = KTO_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments(**changes))


DPO_ERRORS = {
    "an odd batch": (
        {"policy_logits": LOGITS[:3], "labels": torch.ones(3, T, dtype=torch.long), "ref_logps": torch.zeros(3)},
        ValueError,
        "pairs need an even batch, chosen then rejected; got 3 sequences: expected a multiple of 2",
    ),
    "label_smoothing of a half": (
        {"label_smoothing": 0.5},
        ValueError,
        "label_smoothing must lie in [0, 0.5), got 0.5",
    ),
    "negative label_smoothing": (
        {"label_smoothing": -0.1},
        ValueError,
        "label_smoothing must lie in [0, 0.5), got -0.1",
    ),
    "label_smoothing NaN": ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be a finite number"),
    "label_smoothing without meaning": (
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        ValueError,
        "label_smoothing=0.1 has no meaning for loss_type='hinge'; it belongs to ['sigmoid', 'robust', 'simpo']",
    ),
    "gamma without meaning": (
        {"gamma": 1.0},
        ValueError,
        "gamma=1.0 has no meaning for loss_type='sigmoid'; it belongs to 'simpo'",
    ),
    "simpo with a reference": (
        {"loss_type": "simpo"},
        ValueError,
        "loss_type='simpo' has no reference model, but ref_logps came",
    ),
    "dpo without a reference": ({"ref_logps": ...}, ValueError, "expected exactly one of ref_logits and ref_logps"),
    "unknown loss_type": (
        {"loss_type": "kto"},
        ValueError,
        "loss_type must be one of ['sigmoid', 'robust', 'hinge', 'ipo', 'simpo', 'apo_zero', 'apo_down'], got 'kto'",
    ),
}


@pytest.mark.parametrize("function", [fused_dpo_loss, reference.dpo_loss], ids=["fused", "reference"])
@pytest.mark.parametrize("name", DPO_ERRORS)
def test_dpo(function, name):
    changes, error, message = DPO_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**arguments(desirable=..., **changes))


LOGPS_ERRORS = {
    "logps of two dimensions": (
        {"policy_logps": torch.zeros(2, 2)},
        ValueError,
        "policy_logps must be [B] with B >=",
    ),
    "integer logps": ({"policy_logps": torch.zeros(4).long()}, TypeError, f"policy_logps must be {FLOATS}"),
    "another batch": ({"ref_logps": torch.zeros(2)}, ValueError, "ref_logps has shape [2], expected [4]"),
    "an odd batch": (
        {"policy_logps": torch.zeros(3), "ref_logps": torch.zeros(3)},
        ValueError,
        "pairs need an even batch",
    ),
    "ipo on sums without lengths": (
        {"loss_type": "ipo"},
        ValueError,
        "loss_type='ipo' works on length-averaged log-probabilities: pass token_counts [B]",
    ),
    "lengths without meaning": (
        {"token_counts": torch.ones(4).long()},
        ValueError,
        "token_counts has no meaning for loss_type='sigmoid' with average_log_prob=False",
    ),
    "float lengths": (
        {"loss_type": "ipo", "token_counts": torch.ones(4)},
        TypeError,
        "token_counts must be integers, got torch.float32",
    ),
    "lengths of another batch": (
        {"loss_type": "ipo", "token_counts": torch.ones(2).long()},
        ValueError,
        "token_counts has shape [2], expected [4]",
    ),
    "unknown loss_type": ({"loss_type": "kto"}, ValueError, "loss_type must be one of ['sigmoid'"),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of ['mean', 'sum', 'none']"),
    "beta NaN": ({"beta": math.nan}, ValueError, "beta must be a finite number > 0, got nan"),
    "no reference": (
        {"ref_logps": None},
        ValueError,
        "ref_logps must be log-probabilities [B] for loss_type='sigmoid', got NoneType",
    ),
}


@pytest.mark.parametrize("function", [kto_fused.dpo_loss_from_logps, reference.dpo_loss_from_logps])
@pytest.mark.parametrize("name", LOGPS_ERRORS)
def test_dpo_from_logps(function, name):
    changes, error, message = LOGPS_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**{"policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), **changes})


def test_the_triton_backend_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs a GPU, got tensors on cpu"):
        fused_kto_loss(**arguments(backend="triton"))


def test_an_unknown_keyword_is_a_type_error():
    for function in (fused_kto_loss, reference.kto_loss):
        with pytest.raises(TypeError, match="bta"):
            function(**arguments(bta=0.1))


def test_numbers_of_any_kind_are_numbers():
    loss, _ = fused_kto_loss(**arguments(beta=np.float32(0.5), reference_point=np.float64(0.1), temperature=1))
    assert loss.isfinite()


def test_apples_gpu_is_refused():
    with pytest.raises(ValueError, match="mps, which has no float64"):
        kto_fused.backends.resolve(None, torch.device("mps"))


def test_reference_point_inputs():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=re.escape("ref_kl_logps has shape [2], expected [3]")):
        kto_fused.kto_reference_point(zeros, zeros[:2])
    with pytest.raises(ValueError, match=re.escape("policy_kl_logps must be [m], got shape [1, 3]")):
        kto_fused.kto_reference_point(zeros[None], zeros)
    with pytest.raises(TypeError, match="policy_kl_logps must be float16"):
        kto_fused.kto_reference_point(zeros.long(), zeros)


@pytest.mark.parametrize("counts", [(0, 5), (5, -1)])
def test_class_weights_of_an_empty_class(counts):
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        kto_fused.kto_class_weights(*counts)
