"""Batches by bucket, against the definition carried out with queues."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from pipeline import draws
from pipeline.draws import Purpose
from pipeline.training.order import NUM_CACHED, Order


def simulated(seed: int, bucket_of: list[int], batch_size: int, num_epochs: int) -> list[tuple[int, list[int]]]:
    """(epoch, samples) of every batch that the definition gives: fill queues, empty the one that is full."""
    queues, batches = defaultdict(list), []
    for epoch in range(num_epochs):
        for sample in draws.generator(seed, Purpose.ORDER, epoch).permutation(len(bucket_of)).tolist():
            queue = queues[bucket_of[sample]]
            queue.append(sample)
            if len(queue) == batch_size:
                batches.append((epoch, list(queue)))
                queue.clear()
    return batches


def configurations(count: int) -> list[tuple[int, list[int], int]]:
    """(seed, bucket_of, batch_size): 1 to 50 samples, 1 to 8 buckets, batches often larger than a bucket."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(count):
        num_samples, num_buckets = random.integers(1, 51), random.integers(1, 9)
        labels = random.choice(100, num_buckets, replace=False) - 50
        found.append((seed, random.choice(labels, num_samples).tolist(), int(random.integers(1, 17))))
    return found


def test_every_batch_is_the_one_that_queues_give_in_whatever_order_steps_are_asked_for():
    compared = 0
    for seed, bucket_of, batch_size in configurations(300):
        expected = simulated(seed, bucket_of, batch_size, num_epochs=12)
        order = Order(seed, bucket_of, batch_size)
        for step in np.random.default_rng(seed).permutation(len(expected)).tolist():
            assert (order.epoch(step), order.batch(step)) == expected[step], (seed, bucket_of, batch_size, step)
        compared += len(expected)
    assert compared > 10_000


def test_the_number_of_steps_is_that_of_the_queues():
    for seed, bucket_of, batch_size in configurations(60):
        order = Order(seed, bucket_of, batch_size)
        for num_epochs in range(6):
            assert order.steps_in_epochs(num_epochs) == len(simulated(seed, bucket_of, batch_size, num_epochs))


@pytest.mark.parametrize("num_samples, batch_size", [(10, 4), (5, 1), (7, 7), (3, 8), (1, 2), (12, 5), (50, 49)])
def test_with_one_bucket_each_epoch_is_a_permutation_and_batches_run_on_across_epochs(num_samples, batch_size):
    order = Order(5, [7] * num_samples, batch_size)
    taken = [sample for step in range(60) for sample in order.batch(step)]
    epochs = [draws.generator(5, Purpose.ORDER, epoch).permutation(num_samples) for epoch in range(60 * batch_size)]
    assert taken == np.concatenate(epochs)[: len(taken)].tolist()


def test_batches_are_of_one_bucket_and_no_epoch_drops_or_repeats_a_sample():
    for seed, bucket_of, batch_size in configurations(40):
        order = Order(seed, bucket_of, batch_size)
        num_epochs = 2 * batch_size  # so that every queue is empty at the end
        batches = [order.batch(step) for step in range(order.steps_in_epochs(num_epochs))]
        assert all(len({bucket_of[sample] for sample in batch}) == 1 for batch in batches)
        taken = Counter(sample for batch in batches for sample in batch)
        assert taken == dict.fromkeys(range(len(bucket_of)), num_epochs)


def test_the_labels_of_buckets_do_not_matter():
    first, second = Order(1, [0, 1, 1, 2, 0, 1, 2], 2), Order(1, np.array([9, -4, -4, 3, 9, -4, 3], np.int8), 2)
    assert [first.batch(step) for step in range(30)] == [second.batch(step) for step in range(30)]


def test_batches_are_plain_numbers():
    assert {type(sample) for sample in Order(0, np.zeros(5, np.int64), 3).batch(1)} == {int}


def test_each_seed_has_an_order_of_its_own():
    assert len({tuple(Order(seed, [0, 1] * 20, 10).batch(0)) for seed in range(10)}) == 10


def test_the_order_is_that_of_every_earlier_release():
    """Printed once by this code with NumPy 1.26 on x86-64: a run that is resumed later must draw the same."""
    assert [Order(0, [0] * 10, 4).batch(step) for step in range(5)] == [
        [0, 7, 8, 6], [9, 5, 1, 3], [2, 4, 3, 2], [9, 7, 1, 5], [0, 4, 8, 6]
    ]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The epochs whose permutations were drawn."""
    epochs, original = [], draws.generator

    def counted(seed, purpose, index):
        epochs.append(index)
        return original(seed, purpose, index)

    monkeypatch.setattr(draws, "generator", counted)
    return epochs


def test_a_step_far_away_draws_the_epochs_of_its_own_samples_only(drawn):
    order, step = Order(0, [0] * 500 + [1] * 300 + [2] * 200, 8), 10**12
    batch = order.batch(step)
    assert len(batch) == 8 and len({sample >= 500 for sample in batch}) == 1
    assert order.steps_in_epochs(order.epoch(step)) <= step < order.steps_in_epochs(order.epoch(step) + 1)
    assert {order.epoch(step)} <= set(drawn) <= {order.epoch(step), order.epoch(step) - 1}


def test_steps_in_turn_draw_each_epoch_once(drawn):
    order = Order(0, [0] * 50 + [1] * 30 + [2] * 9, 8)
    for step in range(order.steps_in_epochs(20)):
        order.batch(step)
    assert sorted(drawn) == list(range(20)) and NUM_CACHED < 20


def test_a_million_samples_take_less_than_two_seconds_an_epoch():
    bucket_of = np.random.default_rng(0).integers(0, 19, 1_000_000)
    started = time.process_time()
    order = Order(0, bucket_of, 4)
    step = order.steps_in_epochs(1000)
    batch = order.batch(step)
    assert time.process_time() - started < 4  # two epochs: the batch's first samples are of the one before
    assert len(set(bucket_of[batch])) == 1 and order.epoch(step) == 1000


@pytest.mark.parametrize("bucket_of, batch_size", [([], 4), ([0, 1], 0)])
def test_nothing_to_order_is_refused(bucket_of, batch_size):
    with pytest.raises(ValueError, match=f"{len(bucket_of)} examples in batches of {batch_size}"):
        Order(0, bucket_of, batch_size)


def test_a_step_before_the_first_is_refused():
    with pytest.raises(ValueError, match="steps count from 0, found -1"):
        Order(0, [0, 1], 2).batch(-1)
