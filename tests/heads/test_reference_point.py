"""KTO's reference point and class weights. Real processes test the mean over ranks."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import kto_fused


def test_it_is_the_papers_estimator():
    """max(0, mean of policy - ref), computed in float64 from the first subtraction on."""
    policy, ref = torch.randn(1000) * 30 + 5, torch.randn(1000) / 3
    z0 = kto_fused.kto_reference_point(policy, ref)
    assert z0.dtype == torch.float64
    expected = math.fsum(a - b for a, b in zip(policy.tolist(), ref.tolist(), strict=True)) / 1000
    assert expected > 1
    assert z0.item() == pytest.approx(expected, rel=1e-13)


def test_it_is_never_negative_and_has_no_gradient():
    policy = torch.tensor([-9.0, -5.0], requires_grad=True)
    z0 = kto_fused.kto_reference_point(policy, torch.zeros(2))
    assert z0.item() == 0.0
    assert not z0.requires_grad


def test_nan_stays_nan():
    assert kto_fused.kto_reference_point(torch.tensor([torch.nan, 1.0]), torch.zeros(2)).isnan()
    assert kto_fused.kto_reference_point(torch.zeros(0), torch.zeros(0)).isnan()


def test_the_mean_of_a_batch_is_not_clamped():
    policy, ref = torch.tensor([-9.0, -5.0]), torch.tensor([-8.0, -3.0])
    _, metrics = kto_fused.kto_loss_from_logps(policy, ref, torch.tensor([True, False]))
    assert metrics.reference_point.item() == -1.5


def rank_main(rank: int, world_size: int, store: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    # the ranks hold 3, 1 and 0 pairs: the mean is over pairs, not over ranks
    ratios = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([6.0]), torch.zeros(0)][rank]
    z0 = kto_fused.kto_reference_point(ratios, torch.zeros_like(ratios))
    alone = torch.distributed.new_subgroups(group_size=1)[0]
    local = kto_fused.kto_reference_point(ratios, torch.zeros_like(ratios), process_group=alone)
    results[rank] = (z0.item(), local.item())
    torch.distributed.destroy_process_group()


def test_the_mean_is_over_all_ranks_of_the_group(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (3, str(tmp_path / "store"), results), nprocs=3)
        assert [results[rank][0] for rank in range(3)] == [3.0, 3.0, 3.0]
        assert [results[rank][1] for rank in range(2)] == [2.0, 6.0]


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((100, 100), (1, 1)), ((400, 300), (1, 1)), ((30, 300), (10, 1)), ((800, 300), (1, 2)), ((90, 100), (10 / 9, 1))],
)
def test_class_weights_put_the_ratio_into_the_advised_range(counts, weights):
    assert kto_fused.kto_class_weights(*counts) == pytest.approx(weights)
    assert {type(weight) for weight in kto_fused.kto_class_weights(*map(np.int64, counts))} == {float}
    (desirable, undesirable), (n_desirable, n_undesirable) = weights, counts
    assert 1 - 1e-9 <= desirable * n_desirable / (undesirable * n_undesirable) <= 4 / 3 + 1e-9
