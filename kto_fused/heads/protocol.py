"""What a loss is: the class ``Head``, the registry of losses by name, and ``Mix``, a weighted sum of losses.

A loss is one frozen dataclass of plain PyTorch. Its numbers are fields, its formula is ``losses``; the engines do the
rest, from logits or from hidden states, on every backend:

>>> from dataclasses import dataclass
>>> import torch, kto_fused
>>> from kto_fused import heads
>>> @heads.register("doc_margin")
... @dataclass(frozen=True)
... class Margin(heads.Head):
...     margin: float = 1.0
...     group = 2  # one loss reads a pair: the batch's first half is chosen, its second half rejected
...     def losses(self, logps, counts, ref_logps):
...         chosen, rejected = (logps - ref_logps).chunk(2)
...         return torch.relu(self.margin - chosen + rejected)
>>> logits, labels = torch.zeros(2, 4, 8), torch.ones(2, 4, dtype=torch.int64)
>>> loss, metrics = kto_fused.fused_loss(heads.make("doc_margin", margin=2.0), logits, labels, ref_logits=logits)
>>> loss.item()
2.0
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from .. import checks
from .base import no_hooks, recording, weighted

_CLASSES: dict[str, type["Head"]] = {}
# the parameters of ``losses`` that are not tensors of the call
_SEQUENCES = ("logps", "counts", "ref_logps")
# what the row pass finds beside log-probabilities, by a head's level; the engines' names of the same values
STATISTICS = {
    "sequence": ("entropy", "mean_logits", "token_accuracy", "log_sum_squares"),
    "token": ("entropy", "mean_logits", "is_top1", "log_sum_squares"),
}
_ALL_STATISTICS = tuple(dict.fromkeys((*STATISTICS["sequence"], *STATISTICS["token"])))
# the names of parameters of ``losses`` that an engine fills
_RESERVED = ("self", *_SEQUENCES, "batch_counts", *_ALL_STATISTICS)


class _Parameters(NamedTuple):
    """What the signature of a head's ``losses`` says."""

    names: tuple[str, ...]  # of the tensors that the caller passes
    required: tuple[str, ...]  # those without a default
    takes_rest: bool  # whether it ends in **tensors
    reads_batch_counts: bool
    statistics: tuple[str, ...]  # of the row pass


def _parameters_of(losses: Callable[..., torch.Tensor]) -> _Parameters:
    parameters = inspect.signature(losses).parameters
    rest = tuple(name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD)
    names = tuple(name for name in parameters if name not in (*_RESERVED, *rest))
    required = tuple(name for name in names if parameters[name].default is inspect.Parameter.empty)
    statistics = tuple(name for name in parameters if name in _ALL_STATISTICS)
    return _Parameters(names, required, bool(rest), "batch_counts" in parameters, statistics)


class Head:
    """A loss of log-probabilities. Subclass it as a frozen dataclass, and register the class under a name.

    Class attributes:
        level: ``"sequence"``: ``losses`` gets one log-probability per sequence. ``"token"``: it gets those of single
            completion tokens, see ``heads.TokenHead``.
        group: how many sequences one loss value reads. 1: each sequence alone. 2: pairs; sequence i belongs together
            with i + B/2. None, the default: the whole batch. A head that declares 1 or 2 may be called on some of the
            batch's groups alone, which is what lets a long batch pass through the LM head in chunks with 3 GEMMs; a
            head that declares it wrongly is refused.
        needs_reference: whether ``losses`` reads the reference model's log-probabilities.
        is_paired: whether the batch's first half is chosen and its second half rejected, for metrics; so it is with
            ``group = 2``.
        summed_tensors: names of tensors, one entry per sequence, that a call from logits or hidden states may also give
            per token, shaped as ``labels`` and aligned with them. ``losses`` gets their sums over each sequence's
            completion tokens, float64.

    A field ``ld_alpha`` of a pair loss is a number in [0, 1] by which the engines multiply the log-probabilities of
    completion tokens beyond the shorter answer's length, see ``kto_fused.ld_token_weights``.

    Fields are the loss's numbers: floats, integers, booleans, strings, or a tuple of floats. Check them in
    ``__post_init__``. A number that changes from step to step should be a tensor of the call instead, so that
    ``torch.compile`` compiles nothing again.
    """

    level: ClassVar[str] = "sequence"
    group: ClassVar[int | None] = None
    needs_reference: ClassVar[bool] = True
    summed_tensors: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._parameters = _parameters_of(cls.losses)  # once per class: reading it costs a tenth of a small call

    @property
    def is_paired(self) -> bool:
        return self.group == 2

    def terms(self) -> tuple[tuple[float, "Head"], ...]:
        """Return the (weight, loss) pairs whose sum this loss is: (1, itself), unless it consists of several losses."""
        return ((1.0, self),)

    def beside_ld_alpha(self) -> "Head":
        """Return the loss that takes this one's place in a ``Mix`` whose other losses have ``ld_alpha`` < 1."""
        return self

    def losses(
        self, logps: torch.Tensor, counts: torch.Tensor, ref_logps: torch.Tensor | None, **tensors: torch.Tensor
    ) -> torch.Tensor:
        """Return one loss per sequence, or per pair, in differentiable PyTorch.

        Args:
            logps: [B] float64, each sequence's log-probability in nats, summed over its completion tokens.
            counts: [B] int64, the numbers of completion tokens.
            ref_logps: [B] float64, the reference model's log-probabilities; None without a reference.
            tensors: a subclass names its own tensors as parameters; the caller passes them by these names. A parameter
                with a default may be left out. A tensor has one entry per sequence, one per pair, or none (a scalar).
                The name ``batch_counts`` is reserved: it gets the token counts of the whole batch, [B], also where the
                head is called on a part of it.

        Other reserved names get what the row pass finds at no further read of the logits, as means over each
        sequence's completion tokens, [B]; 0 for a sequence without any:

        - ``entropy``: of the softmax, in nats
        - ``mean_logits``: the mean over the vocabulary of the logits after scale, soft cap and temperature
        - ``token_accuracy``: the share of tokens that are the most likely ones, ties included
        - ``log_sum_squares``: log sum_v p_v^2, in nats; computed only if a loss asks for it

        They are detached: no gradient flows through them, so that an entropy bonus, for example, would train nothing.
        """
        raise NotImplementedError

    def report(
        self, logps: torch.Tensor, counts: torch.Tensor, ref_logps: torch.Tensor | None, **tensors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what to log beside the loss, by name: ``rewards`` [B], and any tensor of one dimension or none.

        The names are the same for every batch, because several processes add up the values in their order.

        The default reward is ``beta`` (1 where the head has no such field) times the log-ratio, or the log-probability
        without a reference.
        """
        return {"rewards": getattr(self, "beta", 1.0) * (logps if ref_logps is None else logps - ref_logps)}

    def fast_options(self, tensors: dict[str, torch.Tensor]) -> tuple[type, dict[str, Any]] | None:
        """Return a head with a kernel of its own and its options, if there is one for this call; see ``heads.base``."""
        return None

    def statistics(self) -> tuple[str, ...]:
        """The row statistics that ``losses`` takes, by its parameters' names. A subclass whose fields decide whether it
        reads one gives that parameter a default, and overrides this method.
        """
        return self._parameters.statistics

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """The names of the tensors that ``losses`` takes from the caller."""
        return cls._parameters.names

    @classmethod
    def takes_any_tensor(cls) -> bool:
        """Whether ``losses`` ends in ``**tensors``, which gets every tensor of the call that has no name of its own."""
        return cls._parameters.takes_rest

    @classmethod
    def required_tensors(cls) -> tuple[str, ...]:
        """Those of ``tensor_names`` that have no default."""
        return cls._parameters.required

    @classmethod
    def reads_batch_counts(cls) -> bool:
        return cls._parameters.reads_batch_counts


def register(name: str) -> Callable[[type[Head]], type[Head]]:
    """Decorate a head's class, which is then known as ``name`` to ``make``, to operators and to other processes.

    The head is tried on random numbers, as far as its tensors can be made up: with ``group`` 1 or 2, a changed
    log-probability must not change the gradient of another group.

    Raises:
        ValueError: the name is taken; ``level`` or ``group`` has no such value; the trial finds that groups depend on
            each other, that the result has another shape than one loss per group, that the loss is not differentiable,
            or that it changes its input.
        TypeError: the class is no frozen dataclass derived from ``Head``, or a field is no number, string or boolean.

    >>> from kto_fused import heads
    >>> "ipo" in heads.names()
    True
    """

    def decorate(kind: type[Head]) -> type[Head]:
        _check_class(name, kind)
        taken = _CLASSES.get(name)
        # the same class may come again, when its module is reloaded or a notebook's cell runs twice
        if taken is not None and (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"the name {name!r} belongs to {taken.__module__}.{taken.__qualname__}: choose another one"
            )
        kind.name = name
        before, _CLASSES[name] = taken, kind
        from_text.cache_clear()  # it may hold heads of the class that had the name before
        try:
            _try_out(name, kind)
        except Exception:
            if before is None:
                del _CLASSES[name]
            else:
                _CLASSES[name] = before
            raise
        return kind

    return decorate


def make(name: str, **fields: Any) -> Head:
    """Return the registered loss ``name`` with some of its fields set.

    Raises:
        ValueError: no loss has this name, or a field's value is refused.
        TypeError: the loss has no such field.

    >>> from kto_fused import heads
    >>> heads.make("orpo", beta=0.25)
    ORPO(beta=0.25, nll_on='completion')
    """
    kind = class_of(name)
    for field in fields:
        if field not in kind.__dataclass_fields__:  # torch.compile traces no dataclasses.fields of a class
            known = [field.name for field in dataclasses.fields(kind)]
            raise TypeError(f"{name} has no field {field!r}: expected some of {known}")
    return kind(**fields)


def class_of(name: str) -> type[Head]:
    """Return the class that is registered as ``name``."""
    if name not in _CLASSES:
        raise ValueError(f"no loss is registered as {name!r}: expected one of {list(names())}")
    return _CLASSES[name]


def as_loss(loss: "Head | str | Callable[..., torch.Tensor]") -> "Head | Callable[..., torch.Tensor]":
    """Return a registered head, or a function ``f(logps, counts, ref_logps, **tensors)`` for any other loss."""
    if isinstance(loss, str):
        return make(loss)
    if not isinstance(loss, Head):
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(f"head must be a Head, a name of {list(names())} or a function, got {loss!r}")
        return loss
    if is_registered(loss):
        return loss
    if level_of(loss) != "sequence":
        raise TypeError(f"{loss!r} reads tokens and is not registered: decorate its class with heads.register(name)")
    return _formula_of(loss)


def _formula_of(loss: "Head") -> Callable[..., torch.Tensor]:
    """The formula of a head that is not registered, as a function of a whole batch."""

    if loss.statistics():
        raise ValueError(
            f"{loss!r} reads the row statistics {list(loss.statistics())}, which only a registered head gets: decorate "
            "its class with heads.register(name)"
        )

    def formula(logps, counts, ref_logps, *, weights=None, **tensors):
        if (ref_logps is not None) != loss.needs_reference:
            raise ValueError(f"{loss!r} has needs_reference={loss.needs_reference}: expected a reference accordingly")
        if "weights" in loss.tensor_names() and weights is not None:
            tensors["weights"], weights = weights, None
        check_tensor_names(loss, tensors)
        for name in loss.summed_tensors:
            if isinstance(tensors.get(name), torch.Tensor) and tensors[name].ndim > 1:
                raise ValueError(
                    f"{name} has shape {list(tensors[name].shape)}, expected [B] sums over completion tokens, because "
                    f"{type(loss).__name__} is not registered"
                )
        if loss.reads_batch_counts():
            tensors["batch_counts"] = counts
        losses = loss.losses(logps, counts, ref_logps, **tensors)
        return losses if weights is None else weighted(losses, weights)

    return formula


def names() -> tuple[str, ...]:
    """Return the names of all registered losses, in alphabetical order."""
    return tuple(sorted(_CLASSES))


def is_registered(head: Head) -> bool:
    return isinstance(head, Mix) or _CLASSES.get(getattr(type(head), "name", "")) is type(head)


def level_of(head: Head) -> str:
    """Return ``"sequence"``, ``"token"``, or ``"mixed"`` for a loss with a part of each."""
    levels = [term.level for _, term in head.terms()]
    return "mixed" if "token" in levels and "sequence" in levels else levels[0]


def part_of(head: Head, level: str) -> "Mix":
    """Return the sum of a loss's terms of one level."""
    return Mix(*[(weight, term) for weight, term in head.terms() if term.level == level])


def tensors_of(head: Head, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return those of a call's tensors that belong to a head: its ``losses`` declare them."""
    found = {name: tensors[name] for name in head.tensor_names() if name in tensors}
    if not isinstance(head, Mix) and normalizer_of(head) != "items":
        found.pop("num_items", None)  # it belongs to another loss of a mix
    return found


def report_of(
    head: Head,
    logps: torch.Tensor,
    counts: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    tensors: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Return a head's report, with the default rewards where it gives none."""
    sequences = logps, counts, ref_logps if head.needs_reference else None
    return {**Head.report(head, *sequences), **head.report(*sequences, **tensors_of(head, tensors))}


def ld_alpha_of(head: Head) -> float:
    """Return the ``ld_alpha`` of a loss, 1 where it has none.

    Raises:
        ValueError: parts of a ``Mix`` differ in it, since a sequence's log-probability is summed once; or the loss
            reads no pairs, whose shorter answer ``ld_alpha`` asks for.
    """
    found = [getattr(term, "ld_alpha", 1.0) for _, term in head.terms() if term.level == "sequence"]
    if not found or max(found) == 1.0 == min(found):
        return 1.0
    if min(found) != max(found):
        raise ValueError(
            f"{head!r} mixes ld_alpha={min(found)} and {max(found)} (1 where a loss has no such field): expected one "
            "value, since each sequence's log-probability is summed once"
        )
    if not head.is_paired:
        raise ValueError(f"ld_alpha={found[0]} compares the lengths of pairs, and {head!r} reads no pairs: set it to 1")
    return found[0]


class Mix(Head):
    """A weighted sum of losses, found in one visit to the tokens: ``Mix((1.0, DPO()), (0.2, SFT()))``.

    Losses of single sequences count as the mean over a pair's two sequences where others are losses of pairs. A
    loss of weight 0 takes no part, even if it is infinite.

    Losses of tokens may stand beside losses of sequences. The gradients of both add up token by token. From hidden
    states a mix of both levels takes 3 GEMMs with a trained LM head where groups of sequences fit the chunk, else 4; a
    mix of token-level losses alone takes 3 at any length. In such a mix

    - ``reduction="mean"`` gives each loss its own mean: token-level losses their ``normalizer``, losses of sequences or
      pairs the mean over their number. ``"sum"`` is the weighted sum of the losses' sums; ``"none"`` is refused
    - a tensor goes to the losses that declare its name, and ``num_items`` to those with ``normalizer="items"``
    - ``weights``, one per sequence-level loss (per pair where one of them reads pairs), also multiply the losses of the
      tokens in these sequences, unless a part declares ``weights`` itself
    - ``token_weights`` and ``ld_alpha`` belong to the losses of sequences. A mix of both levels also takes
      ``completion_mask`` [B, T], bool or 0 and 1, aligned with ``labels``: sequences' log-probabilities and lengths are
      then those of the labelled tokens in the mask, and token-level losses read all labelled tokens, for example the
      prompt's

    With ``ld_alpha`` < 1 in a mix, ``sft`` reads unweighted log-probabilities, as in TRL. It is then computed token by
    token.

    Raises:
        ValueError: no loss, or a weight below 0.
        TypeError: a part is not (weight, head), or a head is not registered.

    >>> from kto_fused import heads
    >>> mix = heads.Mix((1.0, heads.make("sigmoid")), (0.2, heads.make("sft")))
    >>> mix.group
    2
    """

    def __init__(self, *parts: tuple[float, Head]):
        if not parts:
            raise ValueError("Mix holds no loss: expected (weight, head) pairs")
        for part in parts:
            if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Head)):
                raise TypeError(f"Mix takes (weight, head) pairs, got {part!r}")
            weight, head = part
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(f"a weight of Mix must be a finite number >= 0, got {weight!r}")
            if not is_registered(head):
                raise TypeError(f"{type(head).__name__} is not registered: decorate it with heads.register(name)")
        self.parts = parts

    @property
    def heads(self) -> list[Head]:
        return [head for _, head in self.parts]

    @property
    def level(self) -> str:
        return level_of(self)

    def terms(self) -> tuple[tuple[float, Head], ...]:
        terms = [(weight * inner, term) for weight, part in self.parts for inner, term in part.terms()]
        if any(getattr(term, "ld_alpha", 1.0) < 1 for _, term in terms):
            terms = [(weight, term.beside_ld_alpha()) for weight, term in terms]
        return tuple(terms)

    @property
    def group(self) -> int | None:
        groups = [head.group for head in self.heads]
        return None if None in groups else max(groups)

    @property
    def needs_reference(self) -> bool:
        return any(head.needs_reference for head in self.heads)

    @property
    def is_paired(self) -> bool:
        return any(head.is_paired for head in self.heads)

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for head in self.heads for name in head.tensor_names()))

    def required_tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for head in self.heads for name in head.required_tensors()))

    def statistics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for head in self.heads for name in head.statistics()))

    def takes_any_tensor(self) -> bool:
        return False

    def reads_batch_counts(self) -> bool:
        return any(head.reads_batch_counts() for head in self.heads)

    @property
    def summed_tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for head in self.heads for name in head.summed_tensors))

    def losses(self, logps, counts, ref_logps, **tensors):
        if self.level != "sequence":
            raise TypeError(f"{self!r} holds losses of tokens, which fused_loss and fused_linear_loss compute")
        total, batch_counts = None, tensors.pop("batch_counts", None)
        results = [
            (weight, self._losses_of(head, logps, counts, ref_logps, batch_counts, tensors))
            for weight, head in self.parts
        ]
        fewest = min(len(losses) for _, losses in results)
        for weight, losses in results:
            if weight == 0:  # takes no part, even if it is infinite; its gradient is 0
                losses = logps[: len(losses)].masked_fill(losses.new_ones(len(losses), dtype=torch.bool), 0.0)
            if len(losses) != fewest:  # of single sequences: the mean over each pair
                if not len(losses) == len(logps) == 2 * fewest:
                    raise ValueError(
                        f"{self!r} holds losses of {[len(losses) for _, losses in results]} values for {len(logps)} "
                        "sequences, which have no common mean: expected one loss per sequence or per pair of each part"
                    )
                losses = losses.view(2, fewest).mean(0)
            total = weight * losses if total is None else total + weight * losses
        return total

    @staticmethod
    def _losses_of(head, logps, counts, ref_logps, batch_counts, tensors) -> torch.Tensor:
        its_tensors = {**tensors_of(head, tensors), **{name: tensors[name] for name in head.statistics()}}
        if head.reads_batch_counts():
            its_tensors["batch_counts"] = batch_counts
        return head.losses(logps, counts, ref_logps if head.needs_reference else None, **its_tensors)

    def report(self, logps, counts, ref_logps, **tensors):
        """The report of the first loss that reads sequences; of the first loss if all read tokens."""
        of_sequences = [part for part in self.heads if level_of(part) != "token"]
        return report_of((of_sequences or self.heads)[0], logps, counts, ref_logps, tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mix) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Mix({', '.join(repr(part) for part in self.parts)})"


def normalizer_of(head: Head) -> str:
    """Return what a loss of tokens, or of sequences weighted by their tokens, divides by."""
    return getattr(head, "normalizer", "tokens")  # "tokens" is that of a class which is no TokenHead


def normalizers_of(loss: Head) -> list[str]:
    """Return the normalizers of those of a loss's parts that have one."""
    terms = [term for _, term in loss.terms()]
    return [normalizer_of(term) for term in terms if term.level == "token" or "num_items" in term.tensor_names()]


def check_tensor_names(loss: Head, tensors: dict[str, Any]) -> None:
    """Refuse tensors that a loss does not know, and name those that it lacks."""
    known = (*loss.tensor_names(), *(() if "weights" in loss.tensor_names() else ("weights",)), *loss.statistics())
    normalizers = normalizers_of(loss)
    for name in tensors:
        is_known = name in known or (name == "num_items" and normalizers)
        if not is_known and not loss.takes_any_tensor():
            raise TypeError(f"{loss!r} takes no tensor {name!r}: expected some of {list(known)}")
    missing = [name for name in loss.required_tensors() if tensors.get(name) is None]
    if missing:
        raise TypeError(f"{loss!r} needs the tensors {missing}: pass them by name")
    num_items = tensors.get("num_items")
    if normalizers and (num_items is None) == ("items" in normalizers):
        came = "none" if num_items is None else "one"
        raise TypeError(
            "num_items is the number of tokens that normalizer='items' divides by: expected one for it and none for "
            f"any other, got {came} with normalizer={', '.join([repr(normalizer) for normalizer in normalizers])}"
        )


# ---- a head as a string: an operator of torch.compile takes no object ------------------------------------------------


def to_text(head: Head) -> str:
    """Return the head's name, module and fields as a Python literal. ``torch.compile`` traces this function."""
    if isinstance(head, Mix):
        return "[" + ", ".join([f"({float(weight)!r}, {to_text(part)})" for weight, part in head.parts]) + "]"
    fields = [(field.name, getattr(head, field.name)) for field in dataclasses.fields(head) if field.init]
    for name, value in fields:
        check_field(type(head), name, value)
    values = ", ".join([f"{name!r}: {_literal(value)}" for name, value in fields])
    return f"({head.name!r}, {type(head).__module__!r}, {{{values}}})"


def _literal(value: bool | float | str | tuple) -> str:
    if isinstance(value, tuple):
        return "(" + "".join([f"{_literal(x)}, " for x in value]) + ")"
    if isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value))
    number = float(value)  # also a number of NumPy
    if number == math.inf or number == -math.inf:
        return "1e999" if number > 0 else "-1e999"  # the literals that Python reads as infinite
    return repr(number)


@functools.lru_cache(maxsize=1024)
def from_text(text: str) -> Head:
    """Return the head that ``to_text`` described. In a new process it imports the module that registers the head."""
    return _described(ast.literal_eval(text))


def _described(description: list | tuple) -> Head:
    if isinstance(description, list):
        return Mix(*((weight, _described(part)) for weight, part in description))
    name, module, fields = description
    if name not in _CLASSES and module not in sys.modules:
        importlib.import_module(module)
    if name not in _CLASSES:
        raise ValueError(f"no loss is registered as {name!r}, not even by its module {module}: register it there")
    return _CLASSES[name](**fields)


# ---- a head is not trusted ------------------------------------------------------------------------------------------


def _check_class(name: object, kind: object) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"register takes a name, a string that is not empty, got {name!r}")
    if not isinstance(kind, type) or not issubclass(kind, Head):
        raise TypeError(f"register({name!r}) decorates a class derived from kto_fused.heads.Head, got {kind!r}")
    # of its own: a subclass of a dataclass would lose its new fields
    if "__dataclass_params__" not in vars(kind) or not kind.__dataclass_params__.frozen:
        raise TypeError(f"{kind.__name__} must be a frozen dataclass: decorate it with @dataclass(frozen=True)")
    if kind.level not in ("sequence", "token"):
        raise ValueError(f"{kind.__name__}.level must be 'sequence' or 'token', got {kind.level!r}")
    if not isinstance(kind.group, property):
        check_group(kind, kind.group)
    parameters = inspect.signature(kind.losses).parameters
    for parameter in parameters:
        if parameter in _ALL_STATISTICS and parameter not in STATISTICS[kind.level]:
            raise TypeError(
                f"{kind.__name__}.losses asks for {parameter}, which a {kind.level}-level head does not get: expected "
                f"some of {list(STATISTICS[kind.level])}"
            )
    is_named = all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters.values())
    if kind.losses is Head.losses or tuple(parameters)[:4] != _RESERVED[:4] or not is_named:
        raise TypeError(
            f"{kind.__name__} must define losses(self, logps, counts, ref_logps), followed by its tensors by name"
        )
    for field in dataclasses.fields(kind):
        if field.name == "name":
            raise ValueError(f"{kind.__name__} has a field called 'name', which holds the registered name: rename it")
        if field.default is not dataclasses.MISSING:
            check_field(kind, field.name, field.default)


def check_group(kind: type, group: object) -> None:
    if group not in (None, 1, 2):
        raise ValueError(f"{kind.__name__}.group must be 1, 2 or None (the whole batch), got {group!r}")


def check_field(kind: type, name: str, value: object) -> None:
    """Refuse a field that does not survive the way through a string."""
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(x, (bool, str)) or (checks.is_number(x) and x == x) for x in values):
        came = "NaN" if isinstance(value, float) else type(value).__name__
        raise TypeError(
            f"{kind.__name__}.{name} is {came}, expected a number, a string, a boolean or a tuple of them; a tensor is "
            "passed with the call, as a parameter of losses"
        )


def _try_out(name: str, kind: type[Head]) -> None:
    """Try the class at its registration, where its fields have defaults and its tensors can be made up."""
    if any(field.default is dataclasses.MISSING for field in dataclasses.fields(kind)):
        return
    if set(kind.required_tensors()) <= {"desirable"}:
        try_head(kind(), {})


_tried: set[tuple[Any, ...]] = set()


def try_once(head: Head, tensors: dict[str, torch.Tensor], num_items: int) -> None:
    """Try a head at its first call, with tensors shaped as those of the call, which has ``num_items`` sequences, or
    tokens where the head is of token level.

    It is tried again where a string or a boolean among its fields changes, which may choose another formula. A compiled
    call tries nothing: the operator inside does.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(head, Mix):
        for part in head.heads:
            try_once(part, tensors, num_items)
    else:
        given = {
            name: value
            for name, value in tensors.items()
            if name in head.tensor_names() or (head.takes_any_tensor() and name != "weights")
        }
        kinds = tuple((name, value.ndim and len(value) == num_items) for name, value in given.items())
        values = [getattr(head, field.name) for field in dataclasses.fields(head)]
        choices = tuple(value for value in values if isinstance(value, (str, bool)))
        key = type(head), head.group, choices, kinds
        if key not in _tried:
            try_head(head, given, num_items)
            _tried.add(key)


def try_head(head: Head, tensors: dict[str, torch.Tensor], num_items: int = 0) -> None:
    """Call the head on random numbers and check shape, differentiability, and that groups do not depend on each other.
    For a token-level head a group is one token.

    ``tensors`` are those of a call with ``num_items`` sequences or tokens. Only their dtypes and lengths are looked at.
    """
    with torch.inference_mode(False), recording(), no_hooks(), torch.device("cpu"):
        _try_head(head, tensors, num_items)


def _try_head(head: Head, tensors: dict[str, torch.Tensor], num_items: int) -> None:
    group, is_token_level = head.group, head.level == "token"
    check_group(type(head), group)  # a property may depend on fields
    group = 1 if is_token_level else group
    size = 4 * (group or 2)  # in sequences, or tokens
    generator = torch.Generator().manual_seed(0)

    def random(length: int = size) -> torch.Tensor:
        return torch.randn(length, dtype=torch.float64, generator=generator)

    def made_up(like: torch.Tensor) -> torch.Tensor:
        values = random(size if not like.ndim or len(like) == num_items else size // 2).abs()
        values = values if like.ndim else values[0]
        return values if like.is_floating_point() else (values > 0.5).to(like.dtype)

    counts = torch.randint(2, 9, (size,), generator=generator)
    mean = torch.full_like(counts, -3) if is_token_level else -3 * counts  # of a log-probability
    batch = {"logps": random() + mean, "counts": counts, "ref_logps": None}
    if head.needs_reference and not is_token_level:
        batch["ref_logps"] = random() + mean
    batch.update({name: made_up(like) for name, like in tensors.items()})
    if "desirable" in head.tensor_names():
        batch["desirable"] = torch.arange(size) % 3 != 0
    for name in head.statistics():
        values = torch.rand(size, generator=generator)
        batch[name] = -values if name == "log_sum_squares" else values.round() if name == "is_top1" else values
    whole = {"batch_counts": counts} if head.reads_batch_counts() else {}

    losses, grads = _losses_and_gradient(head, batch, whole, None if group is None else size // group)
    if group is None:
        return
    num_groups = size // group

    def part(value: torch.Tensor | None, index: int) -> torch.Tensor | None:
        return value if value is None or not value.ndim else value[index % len(value) :: num_groups]

    for index in range(num_groups):
        alone = _losses_and_gradient(head, {name: part(value, index) for name, value in batch.items()}, whole, 1)
        for value, expected in zip(alone, (losses[index : index + 1], grads[index::num_groups]), strict=True):
            # a formula may compute in float32, which rounds otherwise in a batch of another length
            largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
            if not torch.allclose(value, expected, rtol=1e-4, atol=1e-6 * largest, equal_nan=True):
                raise ValueError(_coupled(head))


def _coupled(head: Head) -> str:
    """The error of a head whose groups depend on each other."""
    kind = type(head).__name__
    if head.level == "token":
        return (
            f"{kind} has level='token', but a token's loss or gradient depends on other tokens: make it a loss of "
            "sequences (level='sequence')"
        )
    return (
        f"{kind} declares group={head.group}, but a group's loss or gradient depends on the batch's other groups: set "
        "group = None, by which the head reads the whole batch"
    )


def _losses_and_gradient(
    head: Head, batch: dict[str, torch.Tensor | None], whole: dict[str, torch.Tensor], num_losses: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``num_losses`` losses and the gradient of their sum by the log-probabilities. Refuses what is no loss."""
    kind, leaf = type(head).__name__, batch["logps"].clone().requires_grad_()
    given = {**batch, "logps": leaf * 1}  # no leaf, so that a change in place raises nothing by itself
    before = {name: value.detach().clone() for name, value in given.items() if value is not None}
    sequences, tensors = [given[name] for name in _SEQUENCES], {x: given[x] for x in given if x not in _SEQUENCES}
    losses = head.losses(*sequences, **tensors, **whole)
    unit, group = ("token", "level='token'") if head.level == "token" else ("sequence", f"group={head.group}")
    if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
        came = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        per = "token" if head.level == "token" else "group"
        raise ValueError(f"{kind}.losses must return one loss per {per}, a tensor of one dimension, got {came}")
    if num_losses is not None and len(losses) != num_losses:
        raise ValueError(
            f"{kind}.losses returned {len(losses)} losses for {len(leaf)} {unit}s, expected {num_losses} with {group}"
        )
    for name, value in before.items():
        if not torch.equal(given[name].detach(), value):
            raise ValueError(f"{kind}.losses changes its argument {name} in place: work on a copy")
    if not losses.requires_grad:
        why = f"; no gradient flows through {list(head.statistics())}" if head.statistics() else ""
        raise ValueError(f"{kind}.losses is not differentiable by logps: it must use PyTorch operations on them{why}")
    (grads,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
    if grads is None:
        raise ValueError(f"{kind}.losses does not depend on logps")
    return losses.detach(), grads
