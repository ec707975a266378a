"""A wrong argument gets one clear error at the call: it names the argument, what came and what was expected."""

import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import TWINS, fused_of, make_case, make_hidden_case
from torch.testing._internal.two_tensor import TwoTensor

import kto_fused
from kto_fused import (
    fused_dpo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    fused_linear_kto_loss,
    linear_sequence_logps,
    linear_token_logps,
    reference,
)

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
        "policy_logits must be [B, T, V], got shape [4, 7]; packed, [N, V], it needs cu_seqlens",
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
        "cu_seqlens must rise from 0 to the 6 packed positions, got [0, 3, 5]",
    ),
    "offsets that fall": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)},
        ValueError,
        "cu_seqlens must rise from 0 to the 6 packed positions, got [0, 7, 6]",
    ),
    "packed logits in a batch": (
        {**PACKED, "policy_logits": torch.zeros(2, 3, V)},
        ValueError,
        "policy_logits must be [N, V] or [1, N, V] with cu_seqlens, got shape [2, 3, 7]",
    ),
    "float offsets": (
        {**PACKED, "cu_seqlens": OFFSETS.float()},
        TypeError,
        "cu_seqlens must be int32 or int64 offsets",
    ),
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
    "an array as reduction": (
        {"reduction": np.array(["mean", "sum"])},
        ValueError,
        "reduction must be one of ['mean', 'sum', 'none'], got array(",
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
def test_kto_names_the_wrong_argument(function, name):
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
def test_dpo_names_the_wrong_argument(function, name):
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
    "a negative length": (
        {"loss_type": "ipo", "token_counts": torch.tensor([-5, 0, 1, 1])},
        ValueError,
        "token_counts must be >= 0, got -5",
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
def test_dpo_from_logps_names_the_wrong_argument(function, name):
    changes, error, message = LOGPS_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**{"policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), **changes})


@pytest.mark.parametrize("function", [kto_fused.kto_loss_from_logps, reference.kto_loss_from_logps])
def test_kto_from_logps_needs_a_reference(function):
    with pytest.raises(TypeError, match="ref_logps must be a tensor, got NoneType"):
        function(torch.zeros(4), None, torch.tensor([True, False, True, False]))


def test_tensors_without_values_are_refused():
    values, labels = torch.zeros(1, 2, 3, device="meta"), torch.zeros(1, 2, dtype=torch.long, device="meta")
    for call in (
        lambda: kto_fused.token_logps(values, labels),
        lambda: kto_fused.linear_token_logps(values, torch.zeros(4, 3, device="meta"), labels),
    ):
        with pytest.raises(ValueError, match="tensors are on meta, which holds no values"):
            call()


def test_a_tensor_that_wraps_others_is_refused():
    wrapped = TwoTensor(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match="logits is a TwoTensor, which wraps other tensors; pass a plain tensor"):
        kto_fused.token_logps(wrapped, torch.zeros(1, 2, dtype=torch.long))


UNREADABLE = {
    "nested": (lambda x: torch.nested.nested_tensor([*x]), "a nested tensor.*to_padded_tensor.*cu_seqlens"),
    "nested, jagged": (
        lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
        "a nested tensor.*to_padded_tensor.*cu_seqlens",
    ),
    "COO": (lambda x: x.to_sparse(), "a sparse COO tensor.*to_dense"),
    "CSR": (lambda x: x.to_sparse_csr(), "a sparse CSR tensor.*to_dense"),
    "CSC": (lambda x: x.to_sparse_csc(), "a sparse CSC tensor.*to_dense"),
    "MKL-DNN": (lambda x: x.float().to_mkldnn(), "an MKL-DNN tensor.*to_dense"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "a quantised tensor.*dequantize",
    ),
    "complex": (lambda x: x.to(torch.complex64), r"a complex tensor.*\.real"),
    "negated": (lambda x: torch._neg_view(x), "a lazily negated view.*resolve_neg"),
    "masked": (lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), "a MaskedTensor, which"),
}


def refuses_unreadable(function, name: str, values: dict, kind: str) -> None:
    """Pass a tensor of this ``kind`` as the argument ``name``. Kinds that cannot hold such a tensor are left out."""
    make, message = UNREADABLE[kind]
    needs_matrix = kind in ("CSR", "CSC")
    if (needs_matrix and values[name].ndim < 2) or (kind.startswith("nested") and values[name].ndim == 0):
        return
    if kind.startswith("nested") and values[name].ndim == 1:
        make = lambda x: torch.nested.nested_tensor([x, x])  # noqa: E731
    if values[name].dtype == torch.bool and kind == "negated":
        return
    values[name] = make(values[name])
    with pytest.raises(TypeError, match=rf"^{name} is {message}"):
        function(**values)


by_kind = pytest.mark.parametrize("kind", UNREADABLE)


@by_kind
@pytest.mark.parametrize("function", [fused_kto_loss, reference.kto_loss], ids=["fused", "reference"])
def test_tensors_that_no_engine_reads_are_refused(function, kind):
    for name in ("policy_logits", "labels", "desirable", "ref_logits", "ref_logps", "reference_point", "cu_seqlens"):
        changes = {"reference_point": torch.zeros(1)}
        if name == "ref_logits":
            changes |= {"ref_logps": ..., "ref_logits": LOGITS}
        if name == "cu_seqlens":
            changes |= PACKED
        refuses_unreadable(function, name, arguments(**changes), kind)


@by_kind
@pytest.mark.parametrize("function", [kto_fused.kto_loss_from_logps, kto_fused.kto_reference_point])
def test_log_probabilities_that_no_engine_reads_are_refused(function, kind):
    values = {"policy_logps": torch.zeros(2), "ref_logps": torch.zeros(2), "desirable": torch.ones(2).bool()}
    if function is kto_fused.kto_reference_point:
        values = {"policy_kl_logps": torch.zeros(2), "ref_kl_logps": torch.zeros(2)}
    for name in values:
        refuses_unreadable(function, name, dict(values), kind)


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs a GPU, got tensors on cpu"):
        fused_kto_loss(**arguments(backend="triton"))


def refuses(function, argument: str) -> None:
    message = rf"{function.__name__}\(\) got an unexpected keyword argument '{argument}'"
    with pytest.raises(TypeError, match=message):
        function(**{argument: None})


# these take a loss's tensors by any name; the loss refuses those that it does not know
OF_ANY_LOSS = ("linear_loss", "loss", "loss_from_logps")


@pytest.mark.parametrize("name", [name for name in reference.__all__ if name not in OF_ANY_LOSS])
def test_an_unknown_keyword_names_the_function_that_was_called(name):
    refuses(fused_of(name), "bta")
    refuses(getattr(reference, name), "bta")


@pytest.mark.parametrize("name", [x for x in reference.__all__ if x.startswith("linear_") and x not in OF_ANY_LOSS])
@pytest.mark.parametrize("argument", ["inplace_backward", "ref_logits"])
def test_arguments_for_logits_are_refused_with_hidden_states(name, argument):
    refuses(getattr(reference, name), argument)


@pytest.mark.parametrize("function", [fused_kto_loss, reference.kto_loss], ids=["fused", "reference"])
def test_in_place_concerns_the_policys_logits_alone(function):
    ref_logits = torch.zeros(1, T, V).expand(B, T, V)  # its elements share memory, but it is only read
    loss, _ = function(**arguments(ref_logps=..., ref_logits=ref_logits, inplace_backward=True))
    assert loss.isfinite()


def floats(options):
    return {name: float(number) for name, number in options.items()}


def test_numbers_of_any_type_compute_like_floats():
    loss, _ = fused_kto_loss(**arguments(beta=np.float32(0.5), reference_point=np.float64(0.1), temperature=1))
    assert loss.isfinite()
    case = make_case(batch=B, seq_len=T, vocab=V, dtype=torch.float64)
    hidden_case = make_hidden_case(batch=B, seq_len=T, vocab=V, hidden_size=3, dtype=torch.float64)
    integers = {"ignore_index": np.int64(-100), "chunk_bytes": np.int32(2**20)}
    hidden = (hidden_case.hidden, hidden_case.weight, hidden_case.labels)
    for module in (kto_fused, reference):
        expected = module.linear_sequence_logps(*hidden, **{name: int(number) for name, number in integers.items()})
        assert torch.equal(module.linear_sequence_logps(*hidden, **integers), expected)
    for number in (np.float32(0.3), np.int64(2), Fraction(1, 3)):
        transform = dict.fromkeys(("temperature", "logit_scale", "logit_softcap"), number)
        for module in (kto_fused, reference):
            for name, *tensors in [
                ("sequence_logps", case.logits, case.labels),
                ("linear_sequence_logps", hidden_case.hidden, hidden_case.weight, hidden_case.labels),
            ]:
                function = getattr(module, name)
                assert torch.equal(function(*tensors, **transform), function(*tensors, **floats(transform)))
        logps, desirable = torch.randn(B, dtype=torch.float64), case.desirable
        kto_numbers = dict.fromkeys(("beta", "desirable_weight", "undesirable_weight", "reference_point"), number)
        dpo_numbers = {"beta": number, "gamma": number, "label_smoothing": number / 5}
        for module in (kto_fused, reference):
            loss, _ = module.kto_loss_from_logps(logps, logps - 1, desirable, **kto_numbers)
            expected, _ = module.kto_loss_from_logps(logps, logps - 1, desirable, **floats(kto_numbers))
            assert torch.equal(loss, expected)
            simpo = {"loss_type": "simpo", "average_log_prob": True}
            loss, _ = module.dpo_loss_from_logps(logps, **simpo, **dpo_numbers)
            assert torch.equal(loss, module.dpo_loss_from_logps(logps, **simpo, **floats(dpo_numbers))[0])


def test_apples_gpu_is_refused():
    with pytest.raises(ValueError, match="mps, which has no float64"):
        kto_fused.engines.backends.resolve(None, torch.device("mps"))


def test_a_gpu_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=False))
    with pytest.raises(ValueError, match="xpu:0, a GPU without float64"):
        kto_fused.engines.backends.resolve(None, torch.device("xpu", 0))


def test_the_reference_points_arguments_are_checked():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=re.escape("ref_kl_logps has shape [2], expected [3]")):
        kto_fused.kto_reference_point(zeros, zeros[:2])
    with pytest.raises(ValueError, match=re.escape("policy_kl_logps must be [m], got shape [1, 3]")):
        kto_fused.kto_reference_point(zeros[None], zeros)
    with pytest.raises(TypeError, match="policy_kl_logps must be float16"):
        kto_fused.kto_reference_point(zeros.long(), zeros)


@pytest.mark.parametrize("counts", [(0, 5), (5, -1)])
def test_an_empty_class_has_no_weight(counts):
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        kto_fused.kto_class_weights(*counts)


# ---- from hidden states -------------------------------------------------------------------------------------------

H = 3
HIDDEN, WEIGHT, BIAS = torch.zeros(B, T, H), torch.zeros(V, H), torch.zeros(V)


def hidden_arguments(function=fused_linear_kto_loss, **changes):
    """Valid arguments from hidden states but for ``changes``; ``...`` leaves one out."""
    case = make_hidden_case(batch=B, seq_len=T, vocab=V, hidden_size=H)
    case.labels[:] = 1
    values = {"hidden": HIDDEN, "lm_head_weight": WEIGHT, "labels": case.labels}
    if function in (fused_linear_kto_loss, reference.linear_kto_loss):
        values["desirable"] = case.desirable
    if "logps" not in function.__name__:
        values["ref_logps"] = torch.zeros(B)
    values.update(changes)
    return {name: value for name, value in values.items() if value is not ...}


LM_HEAD_ERRORS = {
    "hidden states of two dimensions": (
        {"hidden": torch.zeros(B, H)},
        ValueError,
        "hidden must be [B, T, H], got shape [4, 3]; packed, [N, H], it needs cu_seqlens",
    ),
    "labels one longer": (
        {"labels": torch.ones(B, T + 1, dtype=torch.long)},
        ValueError,
        "labels has shape [4, 6], expected [4, 5] to match hidden [4, 5, 3]",
    ),
    "integer hidden states": ({"hidden": HIDDEN.long()}, TypeError, f"hidden must be {FLOATS}, got torch.int64"),
    "a weight of another size": (
        {"lm_head_weight": torch.zeros(V, H + 1)},
        ValueError,
        "lm_head_weight must be [V, H] with V >= 1 and hidden's H = 3, got shape [7, 4]",
    ),
    "a transposed weight": ({"lm_head_weight": WEIGHT.T}, ValueError, "lm_head_weight must be [V, H]"),
    "a weight of one dimension": ({"lm_head_weight": WEIGHT[0]}, ValueError, "lm_head_weight must be [V, H]"),
    "an empty vocabulary": ({"lm_head_weight": WEIGHT[:0]}, ValueError, "lm_head_weight must be [V, H] with V >= 1"),
    "a weight of another dtype": (
        {"lm_head_weight": WEIGHT.bfloat16()},
        TypeError,
        "lm_head_weight is torch.bfloat16, expected hidden's dtype torch.float32",
    ),
    "a module as weight": (
        {"lm_head_weight": torch.nn.Linear(H, V)},
        TypeError,
        "lm_head_weight must be a tensor, got Linear",
    ),
    "a weight on another device": (
        {"lm_head_weight": WEIGHT.to("meta")},
        ValueError,
        "lm_head_weight is on meta, but hidden is on cpu: expected the same device",
    ),
    "a bias of another size": (
        {"lm_head_bias": torch.zeros(V + 1)},
        ValueError,
        "lm_head_bias has shape [8], expected [7] to match lm_head_weight",
    ),
    "a bias of another dtype": (
        {"lm_head_bias": BIAS.double()},
        TypeError,
        "lm_head_bias is torch.float64, expected hidden's dtype torch.float32",
    ),
    "a chunk of no bytes": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
    "a chunk of negative bytes": ({"chunk_bytes": -1}, ValueError, "chunk_bytes must be at least 1, got -1"),
    "a float as chunk_bytes": ({"chunk_bytes": 1e9}, TypeError, "chunk_bytes must be an int, got float"),
    "a flag as chunk_bytes": ({"chunk_bytes": True}, TypeError, "chunk_bytes must be an int, got bool"),
    "label V": ({"labels": torch.full((B, T), V)}, IndexError, "labels[0, 1] is 7: expected a token id in [0, 7)"),
    "no ignore_index": ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    "an ignore_index that no label can be": (
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index must fit in a signed 64-bit integer, as labels do, got 9223372036854775808",
    ),
    "ignore_index as text": ({"ignore_index": "x"}, TypeError, "ignore_index must be an int, got str"),
    "a number as shift": ({"shift": 1}, TypeError, "shift must be True or False, got 1"),
}
HIDDEN_FUNCTIONS = [fused_linear_kto_loss, fused_linear_dpo_loss, linear_sequence_logps, linear_token_logps]
with_twins = pytest.mark.parametrize(
    "function", [f for fused in HIDDEN_FUNCTIONS for f in (fused, TWINS[fused])], ids=lambda f: f.__name__
)


@with_twins
@pytest.mark.parametrize("name", LM_HEAD_ERRORS)
def test_hidden_states_and_lm_head_are_checked(function, name):
    changes, error, message = LM_HEAD_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**hidden_arguments(function, **changes))


@pytest.mark.parametrize("function", [linear_token_logps, reference.linear_token_logps], ids=["fused", "reference"])
def test_a_flag_must_be_a_bool(function):
    with pytest.raises(TypeError, match="return_metrics must be True or False, got 1"):
        function(**hidden_arguments(function, return_metrics=1))


FROM_HIDDEN = {"ref_logps": ..., "ref_hidden": HIDDEN}
HIDDEN_REFERENCE_ERRORS = {
    "two references": (
        {"ref_hidden": HIDDEN},
        ValueError,
        "expected exactly one of ref_hidden and ref_logps, got both",
    ),
    "no reference": ({"ref_logps": ...}, ValueError, "expected exactly one of"),
    "a reference's weight without its hidden states": (
        {"ref_lm_head_weight": WEIGHT},
        ValueError,
        "ref_lm_head_weight came without ref_hidden: expected both or neither",
    ),
    "a reference's bias without its weight": (
        {**FROM_HIDDEN, "ref_lm_head_bias": BIAS},
        ValueError,
        "ref_lm_head_bias came without ref_lm_head_weight: expected both or neither",
    ),
    "ref_hidden of another length": (
        {**FROM_HIDDEN, "ref_hidden": torch.zeros(B, T + 1, H)},
        ValueError,
        "ref_hidden has shape [4, 6, 3], expected [4, 5, 'H'] to match hidden",
    ),
    "ref_hidden of another size without a head": (
        {**FROM_HIDDEN, "ref_hidden": torch.zeros(B, T, H + 1)},
        ValueError,
        "lm_head_weight (also the reference's) must be [V, H] with V >= 1 and ref_hidden's H = 4, got shape [7, 3]",
    ),
    "ref_hidden of integers": (
        {**FROM_HIDDEN, "ref_hidden": HIDDEN.long()},
        TypeError,
        f"ref_hidden must be {FLOATS}, got torch.int64",
    ),
    "ref_hidden on another device": (
        {**FROM_HIDDEN, "ref_hidden": HIDDEN.to("meta")},
        ValueError,
        "ref_hidden is on meta, but hidden is on cpu",
    ),
    "a reference's head of another dtype": (
        {**FROM_HIDDEN, "ref_lm_head_weight": WEIGHT.half()},
        TypeError,
        "ref_lm_head_weight is torch.float16, expected ref_hidden's dtype torch.float32",
    ),
    "a reference's bias of another size": (
        {**FROM_HIDDEN, "ref_lm_head_weight": WEIGHT, "ref_lm_head_bias": BIAS[1:]},
        ValueError,
        "ref_lm_head_bias has shape [6], expected [7] to match ref_lm_head_weight",
    ),
    "ref_logps of another batch": (
        {"ref_logps": torch.zeros(3)},
        ValueError,
        "ref_logps has shape [3], expected [4], one per sequence",
    ),
}


@pytest.mark.parametrize("function", [*HIDDEN_FUNCTIONS[:2], reference.linear_kto_loss, reference.linear_dpo_loss])
@pytest.mark.parametrize("name", HIDDEN_REFERENCE_ERRORS)
def test_a_references_hidden_states_are_checked(function, name):
    changes, error, message = HIDDEN_REFERENCE_ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        function(**hidden_arguments(function, **changes))


@pytest.mark.parametrize("function", [*HIDDEN_FUNCTIONS[:2], reference.linear_kto_loss, reference.linear_dpo_loss])
def test_a_reference_of_another_vocabulary_is_refused(function):
    changes = {**FROM_HIDDEN, "ref_lm_head_weight": torch.zeros(V + 1, H)}
    message = "ref_lm_head_weight has a vocabulary of 8, expected lm_head_weight's 7"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**hidden_arguments(function, **changes))


@pytest.fixture
def sharded():
    """A function that shards a tensor over two ranks. This process is rank 0."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        yield lambda x: distributed.tensor.distribute_tensor(x, mesh, [distributed.tensor.Shard(0)])
    finally:
        distributed.destroy_process_group()


def refuses_a_shard(function, name: str, values: dict, sharded) -> None:
    values[name] = sharded(values[name])
    with pytest.raises(TypeError, match=rf"^{name} is a DTensor.*gathered tensor.*local"):
        function(**values)


@pytest.mark.parametrize("function", [fused_kto_loss, reference.kto_loss], ids=["fused", "reference"])
@pytest.mark.parametrize(
    "name", ["policy_logits", "labels", "desirable", "ref_logits", "ref_logps", "reference_point", "cu_seqlens"]
)
def test_logits_spread_over_ranks_are_refused(function, name, sharded):
    changes = {"reference_point": torch.zeros(1)}
    if name == "ref_logits":
        changes |= {"ref_logps": ..., "ref_logits": LOGITS}
    if name == "cu_seqlens":
        changes |= PACKED
    refuses_a_shard(function, name, arguments(**changes), sharded)


@with_twins
def test_tensors_spread_over_ranks_are_refused(function, sharded):
    changes_of = {name: {"lm_head_bias": BIAS} for name in ("hidden", "labels", "lm_head_weight", "lm_head_bias")}
    if "ref_logps" in hidden_arguments(function):
        changes_of["ref_logps"] = {}
        changes_of["ref_hidden"] = changes_of["ref_lm_head_weight"] = {**FROM_HIDDEN, "ref_lm_head_weight": WEIGHT}
    for name, changes in changes_of.items():
        refuses_a_shard(function, name, hidden_arguments(function, **changes), sharded)


@by_kind
@with_twins
def test_hidden_states_and_heads_that_no_engine_reads_are_refused(function, kind):
    changes_of = {name: {"lm_head_bias": BIAS} for name in ("hidden", "labels", "lm_head_weight", "lm_head_bias")}
    if "ref_logps" in hidden_arguments(function):
        changes_of["ref_logps"] = {}
        changes_of["ref_hidden"] = changes_of["ref_lm_head_weight"] = {**FROM_HIDDEN, "ref_lm_head_weight": WEIGHT}
    for name, changes in changes_of.items():
        refuses_unreadable(function, name, hidden_arguments(function, **changes), kind)
