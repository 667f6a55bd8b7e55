"""Which blocks a step takes, and what dropout."""

import pytest
import torch

from kvcal.calibrate.cla.draws import blocks_of, dropout_seed


@pytest.mark.parametrize(("blocks", "batch_size"), [(12, 4), (7, 3), (3, 8), (1, 2)])
def test_every_epoch_takes_every_block_once(blocks, batch_size):
    steps = 2 * blocks  # of which every one of batch_size epochs is made
    taken = torch.cat([blocks_of(step, blocks, batch_size, seed=5) for step in range(steps)])
    epochs = taken.view(-1, blocks)
    assert len(epochs) == 2 * batch_size
    assert all(sorted(epoch.tolist()) == list(range(blocks)) for epoch in epochs)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(blocks_of(step, 50, 50, seed).tolist()) for seed in (0, 1) for step in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert orders[1] == tuple(blocks_of(1, 50, 50, 0).tolist())
    assert len({dropout_seed(step, seed) for seed in range(20) for step in range(20)}) == 400
