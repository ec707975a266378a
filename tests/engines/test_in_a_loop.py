"""The losses in a training loop: under torch.compile, autocast and checkpointing, with accumulation, after a model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import chunks_of, is_masked, make_case, make_hidden_case
from devices import HAS_GPU
from torch.utils.checkpoint import checkpoint

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
from kto_fused.engines import logits as from_logits
from kto_fused.engines import operators
from kto_fused.engines.chunks import NUM_STATISTICS
from kto_fused.engines.options import HiddenOptions, LogitOptions, Needs
from kto_fused.engines.results import HiddenResults
from kto_fused.heads import base, preference

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.use_deterministic_algorithms(False)  # torch.compile has a guard on this setting
    torch._dynamo.reset()


def head_and_inputs(packed: bool = False, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    """Return a projection to logits, hidden states, and a case with the other arguments of a loss."""
    case = make_case(seq_len=6, vocab=64, device=device, packed=packed, seed=2)
    head = torch.nn.Linear(16, 64, device=device, dtype=dtype)
    hidden = torch.randn(*case.labels.shape, 16, device=device, dtype=dtype)
    return head, hidden, case


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_compiles_as_one_graph_and_gives_the_same_numbers(engine, loss, packed, inplace_backward):
    head, hidden, case = head_and_inputs(packed, device=engine[1])
    options = {
        "ref_logits": case.ref_logits,
        "inplace_backward": inplace_backward,
        "backend": engine[0],
        **case.options,
    }

    def step(hidden, labels, desirable):
        logits = head(hidden)
        if loss == "kto":
            value, metrics = fused_kto_loss(logits, labels, desirable, reference_point=0.1, **options)
        else:
            value, metrics = fused_dpo_loss(logits, labels, label_smoothing=0.1, **options)
        return value * 3, metrics.rewards, metrics.summary()

    expected, expected_rewards, expected_summary = step(hidden, case.labels, case.desirable)
    expected.backward()
    expected_grad, head.weight.grad = head.weight.grad, None
    compiled = torch.compile(step, fullgraph=True)
    actual, rewards, summary = compiled(hidden, case.labels, case.desirable)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rewards, expected_rewards)
    torch.testing.assert_close(summary, expected_summary, equal_nan=True)
    torch.testing.assert_close(head.weight.grad, expected_grad)


@pytest.mark.parametrize("function", [kto_fused.sequence_logps, kto_fused.fused_kto_loss])
def test_compiled_batches_of_many_lengths_share_one_graph(engine, function):
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def step(logits, labels, *others):
        options = {"ref_logps": others[1]} if others else {}
        result = function(logits, labels, *others[:1], backend=engine[0], **options)
        return result[0] if others else result

    for seq_len in (4, 7, 12, 33):
        logits = torch.randn(2, seq_len, 32, device=engine[1])
        labels = torch.randint(32, (2, seq_len), device=engine[1])
        others = ()
        if function is kto_fused.fused_kto_loss:
            others = (torch.tensor([True, False], device=engine[1]), torch.zeros(2, device=engine[1]))
        expected = function(logits, labels, *others[:1], **({"ref_logps": others[1]} if others else {}))
        torch.testing.assert_close(step(logits, labels, *others), expected[0] if others else expected)
    assert len(compilations) == 1


def test_a_changed_chunk_size_stays_symbolic():
    """The first change compiles the loss again, with a symbolic size; later changes compile nothing."""
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    case = make_hidden_case(vocab=32)
    hidden = case.hidden.nan_to_num_()

    @torch.compile(fullgraph=True, backend=count)
    def step(chunk_bytes):
        return linear_sequence_logps(hidden, case.weight, case.labels, chunk_bytes=chunk_bytes)

    expected = linear_sequence_logps(hidden, case.weight, case.labels)
    for chunk_bytes in (2**20, 2**21, 2**22, 2**23):
        torch.testing.assert_close(step(chunk_bytes), expected)
    assert len(compilations) == 2


def every_loss(engine):
    """Return {name: (leaf to train, step from the leaf to one number)} of every hand-written backward."""
    case = make_case(vocab=32, device=engine[1])
    hidden = make_hidden_case(vocab=32, device=engine[1])
    hidden.hidden.nan_to_num_()
    zeros, on_engine = torch.zeros(4, device=engine[1]), {"backend": engine[0]}
    tensors = {
        "logits": (case.logits, (), case.labels, case.desirable),
        "hidden": (hidden.hidden, (hidden.weight,), hidden.labels, hidden.desirable),
    }
    losses = {}
    for name in kto_fused.__all__:
        function = getattr(kto_fused, name)
        if name in ("fused_loss", "fused_linear_loss", "loss_from_logps"):
            function = partial(function, "sigmoid_norm" if name.startswith("fused") else "bco_pair")
        if name.endswith("loss_from_logps"):
            others = (zeros, case.desirable) if "kto" in name else (zeros,)
            losses[name] = zeros.double(), lambda x, f=function, others=others: f(x, *others, **on_engine)[0]
        elif name.startswith("fused_") or name.endswith("_logps"):
            leaf, head, labels, desirable = tensors["hidden" if "linear" in name else "logits"]
            others = (*head, labels, *([desirable] if "kto" in name else []))
            options = {"ref_logps": zeros, **on_engine} if name.endswith("_loss") else on_engine

            def step(x, f=function, others=others, options=options):
                result = f(x, *others, **options)
                return (result[0] if isinstance(result, tuple) else result).sum()

            losses[name] = leaf, step
    return losses


LOSSES = sorted(every_loss(("torch", "cpu")))


def test_every_hand_written_backward_is_looked_at():
    assert len(LOSSES) == 13


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_where_nothing_needs_a_gradient(engine, name):
    leaf, step = every_loss(engine)[name]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(leaf)
    with torch.no_grad():
        torch.testing.assert_close(compiled(leaf.clone().requires_grad_()), expected)
    torch.testing.assert_close(compiled(leaf), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_under_hooks_on_saved_tensors(engine, name):
    """Checkpointing and offloading set such hooks."""
    leaf, step = every_loss(engine)[name]
    gradients = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        inputs = leaf.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            loss = function(inputs)
        gradients.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*gradients)
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()


def test_compiled_batches_of_many_lengths_in_place(engine):
    """The check for elements that share memory compares strides of symbolic lengths."""
    head, _, case = head_and_inputs(device=engine[1])

    def step(hidden, labels):
        options = {"ref_logps": torch.zeros(4, device=engine[1]), "inplace_backward": True, "backend": engine[0]}
        return fused_kto_loss(head(hidden), labels, case.desirable, **options)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seq_len in (4, 6, 5):
        hidden = torch.randn(4, seq_len, 16, device=engine[1])
        labels = torch.randint(64, (4, seq_len), device=engine[1])
        gradients = [torch.autograd.grad(function(hidden, labels), head.weight) for function in (step, compiled)]
        torch.testing.assert_close(*gradients)


def test_what_waits_for_the_device_stays_out_of_cuda_graphs():
    for function in (operators.linear_forward, operators.linear_backward):
        assert torch.Tag.cudagraph_unsafe in function.op._opoverload.tags
    # this operator waits in its PyTorch version only, which serves GPUs without Triton
    assert torch.Tag.cudagraph_unsafe not in from_logits._token_logprobs.op._opoverload.tags


def test_the_operators_are_well_formed(engine):
    """Check schema, fake implementation and aliasing of every operator that torch.compile sees."""
    backend, device = engine
    case = make_case(batch=2, seq_len=3, vocab=8, device=device)
    check = torch.library.opcheck
    options = LogitOptions(temperature=0.7, logit_scale=1.5, logit_softcap=4.0, backend=backend).flat()
    with_squares = (case.logits, case.labels, None, *LogitOptions(backend=backend, sum_squares=True).flat())
    check(from_logits._token_logprobs.op, with_squares)
    targets, *_, five_rows = from_logits._token_logprobs(*with_squares)
    check(from_logits.sequence_sums.op, (targets, five_rows, None, 2, False, backend))
    of_rows = (case.logits, case.labels, None, *options)
    check(from_logits._token_logprobs.op, of_rows)
    targets, row_max, log_sum, per_token = from_logits._token_logprobs(*of_rows)
    of_sequences = (targets, per_token, None, 2, False, backend)
    check(from_logits.sequence_sums.op, of_sequences)
    sequences, counts, *_ = from_logits.sequence_sums(*of_sequences)
    one = torch.ones((), device=device)
    check(from_logits.sequence_backward.op, (targets, counts, sequences, one, None, False, torch.float32, backend))
    gradient = (targets, per_token[0], row_max, log_sum, *options)
    check(from_logits._token_logprobs_backward.op, (case.logits, torch.empty_like(case.logits), *gradient))
    check(from_logits._token_logprobs_backward_inplace.op, (case.logits.clone(), *gradient))
    of_kto = (sequences, sequences - 1, case.desirable, None, 0.5, "kto", 0.1, 1.0, 1.0, backend)
    check(preference._kto.op, (*of_kto, "mean", 3, torch.float32))
    check(preference._dpo.op, (sequences, None, counts, "simpo", 0.1, 0.0, 0.5, backend, "none", None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the model's logits are half precision; the loss computes in float32 all the same."""
    head, hidden, case = head_and_inputs()
    with torch.autocast(DEVICE, dtype=dtype):
        logits = head(hidden)
        assert logits.dtype == dtype
        loss, metrics = fused_kto_loss(logits, case.labels, case.desirable, ref_logits=case.ref_logits.to(dtype))
    exact, exact_metrics = reference.kto_loss(
        logits.detach().double(), case.labels, case.desirable, ref_logits=case.ref_logits.to(dtype).double()
    )
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics.logps, exact_metrics.logps, rtol=1e-6, atol=1e-5)
    assert head.weight.grad.isfinite().all()


def test_a_backward_under_autocast_computes_as_the_forward_did(engine):
    case = make_hidden_case(vocab=32, device=engine[1])
    gradients = []
    for is_cast in (False, True):
        inputs = [case.hidden.nan_to_num(), case.weight.clone()]
        for tensor in inputs:
            tensor.requires_grad_()
        logps = linear_sequence_logps(*inputs, case.labels, backend=engine[0])
        with torch.autocast(engine[1], torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(logps.sum(), inputs))
    for plain, cast in zip(*gradients, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_around_the_model(use_reentrant):
    head, hidden, case = head_and_inputs()
    hidden.requires_grad_()
    grads = []
    for model in (head, lambda x: checkpoint(head, x, use_reentrant=use_reentrant)):
        loss, _ = fused_kto_loss(
            model(hidden), case.labels, case.desirable, ref_logits=case.ref_logits, inplace_backward=True
        )
        grads.append(
            torch.autograd.grad(loss, [head.weight, hidden]) if model is head else backward(loss, head, hidden)
        )
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def backward(loss, head, hidden):
    """Reentrant checkpoints work with .backward() alone."""
    loss.backward()
    return head.weight.grad, hidden.grad


def test_checkpointing_around_the_loss_too():
    head, hidden, case = head_and_inputs()

    def step(hidden):
        return fused_kto_loss(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits)[0]

    (plain,) = torch.autograd.grad(step(hidden), head.weight)
    (checkpointed,) = torch.autograd.grad(checkpoint(step, hidden, use_reentrant=False), head.weight)
    torch.testing.assert_close(plain, checkpointed)


def test_accumulated_micro_batches_add_up_to_the_batch():
    head, hidden, case = head_and_inputs()
    options = {"reference_point": 0.2, "reduction": "sum"}
    whole, _ = fused_kto_loss(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits, **options)
    (expected,) = torch.autograd.grad(whole, head.weight)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        loss, _ = fused_kto_loss(
            head(hidden[rows]),
            case.labels[rows],
            case.desirable[rows],
            ref_logits=case.ref_logits[rows],
            inplace_backward=True,
            **options,
        )
        loss.backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_gradients_through_a_model_equal_the_twins():
    head, hidden, case = head_and_inputs(dtype=torch.float64)
    grads = []
    for function in (fused_kto_loss, reference.kto_loss):
        loss, _ = function(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits.double())
        grads.append(torch.autograd.grad(loss, [head.weight, head.bias]))
    for fused, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)


# ---- from hidden states -------------------------------------------------------------------------------------------


def linear_inputs(device: str = DEVICE, packed: bool = False, dtype: torch.dtype = torch.float32):
    """Return an LM head, a layer below it, that layer's inputs, and a case with the other arguments of a loss."""
    case = make_hidden_case(seq_len=6, vocab=64, device=device, packed=packed, dtype=dtype, seed=2)
    lm_head = torch.nn.Linear(16, 64, device=device, dtype=dtype)
    layer = torch.nn.Linear(16, 16, device=device, dtype=dtype)
    return lm_head, layer, torch.randn_like(case.hidden), case


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["kto", "dpo", "none", "logps", "token logps"])
def test_losses_from_hidden_states_compile_as_one_graph(engine, loss, packed, frozen):
    lm_head, layer, inputs, case = linear_inputs(engine[1], packed)
    lm_head.requires_grad_(not frozen)
    options = {"backend": engine[0], "lm_head_bias": lm_head.bias, **case.options}
    reference_hidden = torch.randn_like(case.hidden)

    def step(inputs, labels, desirable):
        hidden = layer(inputs)
        if loss == "logps":
            return (linear_sequence_logps(hidden, lm_head.weight, labels, **options).sum(),)
        if loss == "token logps":
            logps, metrics = linear_token_logps(hidden, lm_head.weight, labels, return_metrics=True, **options)
            return (logps * logps.detach()).sum(), logps, metrics.entropy, metrics.mean_logits, metrics.is_top1
        if loss == "dpo":
            value, metrics = fused_linear_dpo_loss(
                hidden, lm_head.weight, labels, ref_hidden=reference_hidden, **options
            )
        else:
            value, metrics = fused_linear_kto_loss(
                hidden,
                lm_head.weight,
                labels,
                desirable,
                ref_hidden=reference_hidden,
                reference_point=0.1,
                reduction="none" if loss == "none" else "mean",
                **options,
            )
        return value.sum() * 3, metrics.rewards, metrics.summary()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        outputs = function(inputs, case.labels, case.desirable)
        parameters = [x for x in (*layer.parameters(), *lm_head.parameters()) if x.requires_grad]
        results.append((outputs, torch.autograd.grad(outputs[0], parameters)))
    (expected, expected_grads), (actual, grads) = results
    torch.testing.assert_close(actual, expected, equal_nan=True)
    torch.testing.assert_close(grads, expected_grads)


def test_a_loss_from_hidden_states_compiles_to_code():
    lm_head, layer, inputs, case = linear_inputs()

    def step(inputs):
        return fused_linear_kto_loss(
            layer(inputs), lm_head.weight, case.labels, case.desirable, ref_hidden=inputs, reference_point=0.1
        )[0]

    grads = [
        torch.autograd.grad(function(inputs), [layer.weight, lm_head.weight])
        for function in (step, torch.compile(step, fullgraph=True))
    ]
    torch.testing.assert_close(*grads)


def test_masked_positions_keep_a_gradient_of_0_where_a_compiled_loss_gets_a_nan():
    lm_head, _, _, case = linear_inputs()
    hidden = case.hidden.requires_grad_()

    def step(hidden):
        ref_logps = torch.zeros(4, device=DEVICE)
        return fused_linear_kto_loss(hidden, lm_head.weight, case.labels, case.desirable, ref_logps=ref_logps)[0]

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    loss.backward(torch.full_like(loss, torch.nan))
    assert hidden.grad[is_masked(case)].eq(0).all()
    assert hidden.grad[~is_masked(case)].isnan().all()


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, False), (True, True, True)], ids=str)
def test_the_operators_from_hidden_states_are_well_formed(engine, needs):
    backend, device = engine
    case = make_hidden_case(batch=2, seq_len=3, vocab=8, bias=True, device=device)
    case.hidden.nan_to_num_()  # opcheck compares inputs before and after
    case.ref_hidden.nan_to_num_()
    weights = torch.linspace(0, 1, 6, device=device).view(2, 3) if needs[1] else None
    tensors = (case.hidden, case.weight, case.bias, case.labels, None, weights)
    logits = LogitOptions(temperature=0.7, logit_scale=1.5, logit_softcap=4.0, backend=backend)
    of_sequences = HiddenOptions(logits, torch.float32, torch.float32, 2**30, needs=Needs(*needs))
    options, of_positions = of_sequences.flat(), replace(of_sequences, per_position=True).flat()
    kto = preference.KTOHead("kto", 0.1, 1.0, 1.0, "batch_mean", 0.0, "mean", torch.float32, backend)
    ipo = preference.DPOHead("ipo", 0.1, 0.0, 0.5, True, "none", torch.float32, backend)
    logps = torch.zeros(2, device=device, dtype=torch.float64)
    forward = [
        ((None, None, None, None, []), base.FlatHead()),
        ((None, None, None, logps, [case.desirable, None]), base.flatten(kto)),
        ((case.ref_hidden, case.weight, None, None, []), base.flatten(ipo)),
    ]
    for reference_and_tensors, head in forward:
        torch.library.opcheck(operators.linear_forward.op, (*tensors, *reference_and_tensors, *options, *head))
    reference_and_tensors, head = forward[0]
    torch.library.opcheck(operators.linear_forward.op, (*tensors, *reference_and_tensors, *of_positions, *head))
    outputs = operators.linear_forward(*tensors, *reference_and_tensors, *options, *head)
    # with a trained LM head the backward computes the gradients; otherwise it is never called
    statistics = (
        HiddenResults.from_list(outputs).statistics if needs[1] else torch.zeros(NUM_STATISTICS, 6, device=device)
    )
    for grads, of_each in ((logps + 1, options), (torch.ones(6, device=device), of_positions)):
        torch.library.opcheck(operators.linear_backward.op, (*tensors, grads, statistics, *of_each))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_from_hidden_states(engine, dtype):
    """Like torch.nn.Linear under autocast, GEMMs read half precision, and gradients have the parameters' float32."""
    case = make_hidden_case(seq_len=6, vocab=64, bias=True, device=engine[1], backend=engine[0])
    rounded = case.map(lambda x: x.to(dtype).float())
    rounded.bias = case.bias
    losses = {}
    for name, function in (("fused", fused_linear_kto_loss), ("twin", reference.linear_kto_loss)):
        inputs = [x.clone().requires_grad_() for x in (rounded.hidden, rounded.weight)]
        with torch.autocast(engine[1], dtype=dtype):
            loss, _ = function(
                *inputs, case.labels, case.desirable, lm_head_bias=case.bias, ref_hidden=rounded.ref_hidden
            )
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(x.grad.dtype == torch.float32 for x in inputs)
        losses[name] = (loss, *(x.grad for x in inputs))
    torch.testing.assert_close(losses["fused"][0], losses["twin"][0], rtol=1e-5, atol=1e-6)
    for actual, expected in zip(losses["fused"][1:], losses["twin"][1:], strict=True):
        assert (actual - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["the layer", "the loss too"])
def test_gradient_checkpointing_from_hidden_states(use_reentrant, around):
    lm_head, layer, inputs, case = linear_inputs()
    inputs.requires_grad_()

    def loss_of(hidden):
        return fused_linear_kto_loss(
            hidden, lm_head.weight, case.labels, case.desirable, ref_logps=torch.zeros(4, device=DEVICE)
        )[0]

    loss_of(layer(inputs)).backward()
    expected = [x.grad.clone() for x in (inputs, layer.weight, lm_head.weight)]
    for x in (inputs, layer.weight, lm_head.weight):
        x.grad = None
    if around == "the layer":
        loss_of(checkpoint(layer, inputs, use_reentrant=use_reentrant)).backward()
    else:
        checkpoint(lambda x: loss_of(layer(x)), inputs, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close([x.grad for x in (inputs, layer.weight, lm_head.weight)], expected)


@pytest.mark.parametrize("num_tokens", [None, 3])
def test_accumulated_micro_batches_from_hidden_states_add_up(num_tokens):
    lm_head, layer, inputs, case = linear_inputs()
    options = {"reference_point": 0.2, "reduction": "sum"}
    ref_logps = torch.linspace(-9, -3, 4, device=DEVICE)

    def backward(rows: slice) -> None:
        tensors = layer(inputs[rows]), lm_head.weight, case.labels[rows], case.desirable[rows]
        fused_linear_kto_loss(*tensors, ref_logps=ref_logps[rows], **options)[0].backward()

    backward(slice(None))
    expected = [layer.weight.grad.clone(), lm_head.weight.grad.clone()]
    layer.weight.grad = lm_head.weight.grad = None
    with chunks_of(num_tokens):
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
            backward(rows)
    torch.testing.assert_close([layer.weight.grad, lm_head.weight.grad], expected)
