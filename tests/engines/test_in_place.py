"""``inplace_backward``: the gradient is written over the logits, and nothing then reads it as logits."""

import pytest
import torch
from cases import assert_same_gradient
from torch.utils.checkpoint import checkpoint

import kto_fused
from kto_fused import fused_kto_loss


def policy_logits(engine):
    source = torch.randn(2, 4, 11, device=engine[1], requires_grad=True)
    return source, source * 1


def policy_loss(logits, engine, **options):
    labels = torch.ones(logits.shape[:2], dtype=torch.long, device=engine[1])
    desirable = torch.tensor([True, False], device=engine[1])
    ref_logps = torch.zeros(2, device=engine[1])
    return fused_kto_loss(
        logits, labels, desirable, ref_logps=ref_logps, inplace_backward=True, backend=engine[0], **options
    )[0]


def test_the_gradient_takes_the_logits_memory(engine):
    source, logits = policy_logits(engine)
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    policy_loss(logits, engine).backward()
    assert seen == [address]
    assert logits._version > version
    assert source.grad.isfinite().all()


def test_another_user_of_the_logits_gets_autograds_error(engine):
    _, logits = policy_logits(engine)
    square = logits.square().sum()  # saves the logits
    policy_loss(logits, engine).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_a_second_backward_gets_autograds_error(engine):
    _, logits = policy_logits(engine)
    loss = policy_loss(logits, engine)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_view_of_the_logits_is_protected_too(engine):
    source, logits = policy_logits(engine)
    square = logits[:, 0].square().sum()
    policy_loss(logits[:, 1:], engine).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_packed_logits_in_a_batch_of_one_are_overwritten_too(engine):
    """Hugging Face models return such logits: neither forward nor backward copies them."""
    source = torch.randn(1, 8, 11, device=engine[1], requires_grad=True)
    logits = source * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    labels = torch.ones(1, 8, dtype=torch.long, device=engine[1])
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device=engine[1])
    options = {"cu_seqlens": offsets, "inplace_backward": True, "backend": engine[0]}
    kto_fused.sequence_logps(logits, labels, **options).sum().backward()
    assert seen == [logits.data_ptr()]
    plain = source.detach().requires_grad_()
    kto_fused.reference.sequence_logps(plain, labels, cu_seqlens=offsets).sum().backward()
    assert_same_gradient(source.grad, plain.grad)


def stored(function, *arguments):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return function(*arguments)


def checkpointed(function, *arguments):
    return checkpoint(function, *arguments, use_reentrant=False)


@pytest.mark.parametrize("keeping", [stored, checkpointed])
def test_where_hooks_hide_the_version_nothing_is_overwritten(engine, keeping):
    """It is neither overwritten before another user of the logits reads them, nor before a second backward."""
    source, _ = policy_logits(engine)
    plain = source.detach().requires_grad_()
    (policy_loss(plain * 1, engine) + 2 * plain.square().sum()).backward()

    def losses(source):
        logits = source * 1
        return policy_loss(logits, engine), logits.square().sum()

    loss, square = keeping(losses, source)
    loss.backward(retain_graph=True)
    square.backward(retain_graph=True)
    square.backward()
    torch.testing.assert_close(source.grad, plain.grad)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = policy_loss(source * 1, engine)
    gradients = [torch.autograd.grad(loss, source, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("view", [lambda x: x.view(2, 4, 11), lambda x: x[:, :-1]], ids=["view", "slice"])
def test_a_view_of_a_leaf_is_refused(engine, view):
    leaf = torch.randn(2, 4, 11, device=engine[1], requires_grad=True)
    with pytest.raises(ValueError, match="a view of one"):
        policy_loss(view(leaf), engine)


def test_a_leaf_is_refused(engine):
    leaf = torch.randn(2, 4, 11, device=engine[1], requires_grad=True)
    with pytest.raises(ValueError, match="policy_logits, which is a leaf"):
        policy_loss(leaf, engine)


def test_evaluation_needs_no_graph(engine):
    logits = torch.randn(2, 4, 11, device=engine[1])
    before = logits.clone()
    policy_loss(logits, engine)
    assert torch.equal(logits, before)
