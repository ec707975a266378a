"""Checks of tensors (type, layout, dtype, shape, device) and of plain numbers. Nothing here knows a loss.

Each check takes the argument's name, and raises a ``TypeError`` or ``ValueError`` that says what came and what was
expected. Only ``zero_or_one`` and ``not_negative`` read a tensor's values, and only where that waits for no device
(``backends.may_read``). A loss's own options are checked by its head, in ``heads``; ``arguments`` says which checks a
call of a public function goes through.
"""

import math
import numbers
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .engines.backends import may_read, resolve

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
A_FLOAT = "float16, bfloat16, float32 or float64"
NUMBER_DTYPES = (torch.bool, *INTEGER_DTYPES, *FLOAT_DTYPES)
A_NUMBER = "bool, integer or floating-point"


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number of Python, NumPy or ``fractions``; a bool is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Layouts without plain strided memory, which no engine reads: what to call them, and how to convert the tensor.
LAYOUTS = {
    torch.sparse_coo: ("a sparse COO tensor", "pass its dense form (to_dense())"),
    torch.sparse_csr: ("a sparse CSR tensor", "pass its dense form (to_dense())"),
    torch.sparse_csc: ("a sparse CSC tensor", "pass its dense form (to_dense())"),
    torch.sparse_bsr: ("a block-sparse BSR tensor", "pass its dense form (to_dense())"),
    torch.sparse_bsc: ("a block-sparse BSC tensor", "pass its dense form (to_dense())"),
    torch._mkldnn: ("an MKL-DNN tensor", "pass its plain form (to_dense())"),
}


def plain(name: str, value: torch.Tensor) -> None:
    """Refuse a tensor whose values do not lie in plain strided memory of real numbers."""
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, expected a plain one: pad it (to_padded_tensor(0.0), labels with "
            "ignore_index), or pass its values() packed, with cu_seqlens"
        )
    if value.layout != torch.strided:
        came, cure = LAYOUTS.get(value.layout, (f"a tensor of layout {value.layout}", "pass its dense form"))
        raise TypeError(f"{name} is {came}, expected a plain strided one: {cure}")
    if value.is_quantized:
        raise TypeError(f"{name} is a quantised tensor ({value.dtype}), expected a plain one: pass dequantize()")
    if value.is_complex():
        raise TypeError(f"{name} is a complex tensor ({value.dtype}), expected a real one: pass its real part (.real)")
    # a kernel would read the stored numbers without the sign; torch.compile cannot trace the question
    if not torch.compiler.is_compiling() and value.is_neg():
        raise TypeError(f"{name} is a lazily negated view, expected plain numbers: pass resolve_neg()")


def _wraps_others(value: torch.Tensor) -> bool:
    """Whether the tensor is a subclass that computes with the tensors inside it."""
    has_dispatch = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return is_traceable_wrapper_subclass(value) or (has_dispatch and not isinstance(value, FakeTensor))


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], kind: str) -> torch.Tensor:
    """Return ``value`` if it is a plain tensor of one of the ``dtypes``, which error messages call ``kind``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":  # the loss of one shard would be another objective
        raise TypeError(
            f"{name} is a DTensor, spread over ranks; pass the gathered tensor (full_tensor()), or the local one "
            "(to_local()) where it is replicated"
        )
    if not value.is_nested and not torch.compiler.is_compiling() and _wraps_others(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which wraps other tensors; pass a plain tensor: wait for an "
            "asynchronous one, dequantise a quantised one"
        )
    plain(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    return value


def same_device(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {like_name} is on {like.device}: expected the same device")


def shaped_like(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {_shape(value)}, expected the shape of {like_name}, {_shape(like)}")
    same_device(name, value, like_name, like)


def without_packed_batch(value: object, shape: torch.Size) -> object:
    """Return a tensor [1, N] as [N] where ``shape`` is that of packed tokens, [N]; any other value as it is."""
    is_packed = len(shape) == 1 and isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == 1
    return value[0] if is_packed else value


def pairs(num_sequences: int) -> None:
    """Check that a batch can be pairs: its first half is chosen, its second half rejected."""
    if num_sequences % 2:
        raise ValueError(
            f"pairs need an even batch, chosen then rejected; got {num_sequences} sequences: expected a multiple of 2"
        )


def token_mask(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Check a mask of the tokens that take part: bool or integers, shaped as ``like``."""
    tensor(name, value, (torch.bool, *INTEGER_DTYPES), "bool (or 0/1 integers)")
    shaped_like(name, value, like_name, like)


def zero_or_one(name: str, value: torch.Tensor) -> None:
    """Check that a tensor of bools or integers holds 0 and 1 alone, where its values may be read."""
    if value.dtype != torch.bool and may_read_values(value):
        wrong = value[(value != 0) & (value != 1)]
        if len(wrong):
            raise ValueError(f"{name} must hold 0 or 1, got {wrong[0].item()}")


def not_negative(name: str, value: torch.Tensor) -> None:
    """Check that a tensor holds neither a negative number nor NaN, where its values may be read."""
    if may_read_values(value):
        wrong = value[~(value >= 0)]
        if len(wrong):
            raise ValueError(f"{name} must be >= 0, got {wrong[0].item()}")


def may_read_values(value: torch.Tensor) -> bool:
    """Whether a check may read a tensor's values here: not while ``torch.compile`` traces."""
    return not torch.compiler.is_compiling() and may_read(value)


def choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    # an array would be compared element by element
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def number(name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # comparisons, because torch.compile cannot trace math.isfinite; a NaN fails all of them
    if not (above < value < math.inf and value >= at_least):
        bound = f" > {above:g}" if above > -math.inf else f" >= {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")


def integer(name: str, value: object, *, at_least: int | None = None) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


class Rows(NamedTuple):
    """Checked logits or hidden states and their labels. A packed batch has lost its leading dimension of 1."""

    values: torch.Tensor  # [B, T, V] or [B, T, H]; packed [N, V] or [N, H]
    labels: torch.Tensor  # [B, T], or [N] packed
    cu_seqlens: torch.Tensor | None  # [B+1], contiguous; None unless packed
    num_sequences: int  # B


def offsets(cu_seqlens: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Check the type, device and shape of the offsets [B+1] of packed sequences."""
    tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32 or int64 offsets")
    same_device("cu_seqlens", cu_seqlens, like_name, like)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [B+1] offsets of B >= 1 sequences, got shape {_shape(cu_seqlens)}")


def logits_and_labels(name: str, logits: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Rows:
    """Check logits, labels and offsets against each other."""
    checked = rows_and_labels(name, logits, labels, cu_seqlens, last="V")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has an empty vocabulary: shape {_shape(logits)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {list(logits.stride())}")
    return checked


def rows_and_labels(
    name: str, values: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, *, last: str
) -> Rows:
    """Check logits [B, T, V] or hidden states [B, T, H] against labels and offsets. ``last`` is "V" or "H"."""
    resolve(None, tensor(name, values, FLOAT_DTYPES, A_FLOAT).device)  # raises if the device cannot compute
    tensor("labels", labels, INTEGER_DTYPES, "integer token ids")
    same_device("labels", labels, name, values)
    if cu_seqlens is None:
        if values.ndim != 3:
            raise ValueError(
                f"{name} must be [B, T, {last}], got shape {_shape(values)}; packed, [N, {last}], it needs cu_seqlens"
            )
    else:
        offsets(cu_seqlens, name, values)
        if values.ndim == 3 and values.shape[0] == 1:
            values = values.squeeze(0)  # squeeze: its backward is a view too
        if values.ndim != 2:
            raise ValueError(
                f"{name} must be [N, {last}] or [1, N, {last}] with cu_seqlens, got shape {_shape(values)}"
            )
        if labels.ndim == 2 and labels.shape[0] == 1:
            labels = labels.squeeze(0)
    if labels.shape != values.shape[:-1]:
        raise ValueError(
            f"labels has shape {_shape(labels)}, expected {list(values.shape[:-1])} to match {name} {_shape(values)}"
        )
    num_sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if num_sequences == 0:
        raise ValueError(f"{name} must hold at least one sequence, got shape {_shape(values)}")
    cu_seqlens = None if cu_seqlens is None else _savable(cu_seqlens.contiguous())
    return Rows(values, _savable(labels), cu_seqlens, num_sequences)


def _savable(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor that a backward may save: a copy if ``value`` was made in inference mode."""
    is_saved = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return value.clone() if is_saved and value.is_inference() else value


def lm_head(
    name: str,
    weight: torch.Tensor,
    bias_name: str,
    bias: torch.Tensor | None,
    hidden_name: str,
    hidden: torch.Tensor,
) -> None:
    """Check an LM head [V, H] and its bias [V] for hidden states [..., H]. All have one dtype unless autocast casts
    them.
    """
    matrices = {name: weight} if bias is None else {name: weight, bias_name: bias}
    for matrix_name, matrix in matrices.items():
        tensor(matrix_name, matrix, FLOAT_DTYPES, A_FLOAT)
        same_device(matrix_name, matrix, hidden_name, hidden)
        is_cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (matrix.dtype, hidden.dtype)
        if matrix.dtype != hidden.dtype and not is_cast:
            raise TypeError(f"{matrix_name} is {matrix.dtype}, expected {hidden_name}'s dtype {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.numel() == 0:
        raise ValueError(
            f"{name} must be [V, H] with V >= 1 and {hidden_name}'s H = {hidden.shape[-1]}, got shape {_shape(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} has shape {_shape(bias)}, expected [{weight.shape[0]}] to match {name}")


def inplace(name: str, logits: torch.Tensor) -> None:
    """Refuse to write the gradient over logits that are a leaf or a view of one, or whose elements share memory."""
    owners = [logits] if logits._base is None else [logits, logits._base]
    if any(owner.is_leaf and owner.requires_grad for owner in owners):
        raise ValueError(
            f"inplace_backward=True overwrites {name}, which is a leaf tensor or a view of one: "
            "expected the output of an operation"
        )
    reach = 1
    for stride, size in _spans_by_stride(logits):
        if stride < reach:
            raise ValueError(
                f"inplace_backward=True overwrites {name}, whose elements share memory: "
                f"shape {_shape(logits)}, strides {list(logits.stride())}"
            )
        reach = stride * (size - 1) + reach


def _spans_by_stride(values: torch.Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of each dimension longer than 1, sorted by insertion: torch.compile cannot sort symbolic
    lengths.
    """
    spans: list[tuple[int, int]] = []
    for stride, size in zip(values.stride(), values.shape, strict=True):
        if size > 1:
            spans.insert(sum(other <= stride for other, _ in spans), (stride, size))
    return spans


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def per_sequence(
    name: str,
    value: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    kind: str,
    num_sequences: int,
    like: torch.Tensor,
    *,
    like_name: str = "the policy",
) -> None:
    """Check a tensor [B] on the device of ``like``, which by default holds the policy's values."""
    tensor(name, value, dtypes, kind)
    if value.shape != (num_sequences,):
        raise ValueError(f"{name} has shape {_shape(value)}, expected [{num_sequences}], one per sequence")
    same_device(name, value, like_name, like)


def policy_logps(value: torch.Tensor) -> None:
    """Check log-probabilities [B] that came as the argument ``policy_logps``."""
    tensor("policy_logps", value, FLOAT_DTYPES, A_FLOAT)
    if value.ndim != 1 or value.numel() == 0:
        raise ValueError(f"policy_logps must be [B] with B >= 1, got shape {_shape(value)}")


def ref_logits(value: torch.Tensor, logits: torch.Tensor) -> None:
    tensor("ref_logits", value, FLOAT_DTYPES, A_FLOAT)
    if value.shape != logits.shape:
        raise ValueError(f"ref_logits has shape {_shape(value)}, expected policy_logits' shape {_shape(logits)}")
    same_device("ref_logits", value, "policy_logits", logits)


def ref_hidden(value: torch.Tensor, hidden: torch.Tensor) -> None:
    tensor("ref_hidden", value, FLOAT_DTYPES, A_FLOAT)
    if value.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden has shape {_shape(value)}, expected {[*hidden.shape[:-1], 'H']} to match hidden")
    same_device("ref_hidden", value, "hidden", hidden)


def ref_lm_head(ref_hidden: object, weight: object, bias: object) -> None:
    """Require the reference's hidden states if its LM head came, and the head's weight if its bias came."""
    for name, value, needed_name, needed in (
        ("ref_lm_head_weight", weight, "ref_hidden", ref_hidden),
        ("ref_lm_head_bias", bias, "ref_lm_head_weight", weight),
    ):
        if value is not None and needed is None:
            raise ValueError(f"{name} came without {needed_name}: expected both or neither")


def reference_head(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the LM head of the reference's hidden states: its own weight [V, H_ref] and bias [V], or the policy's."""
    names = "ref_lm_head_weight", "ref_lm_head_bias"
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias
        names = tuple(f"{name} (also the reference's)" for name in ("lm_head_weight", "lm_head_bias"))
    lm_head(names[0], ref_weight, names[1], ref_bias, "ref_hidden", ref_hidden)
    if len(ref_weight) != len(weight):
        raise ValueError(
            f"ref_lm_head_weight has a vocabulary of {len(ref_weight)}, expected lm_head_weight's {len(weight)}"
        )
    return ref_weight, ref_bias
