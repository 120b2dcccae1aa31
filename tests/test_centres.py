"""Batches of few classes, and the memory of features, against slow counts in NumPy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils import centres, data, losses, records

STATISTICS = (np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7]))


def balanced(counts, classes=3, pictures=2, seed=3, size=2, **rest):
    """Batches of pictures of which ``counts[k]`` show class k, in mixed order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.uint8)
    images = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    options = {"statistics": STATISTICS, "pad": 1, "seed": seed} | rest
    return centres.Balanced(images, labels, classes=classes, pictures=pictures, **options)


# Batches of few classes


@settings(max_examples=25)
@given(st.data(), st.integers(1, 3), st.integers(0, 2**31), st.integers(1, 2**31))
def test_a_batch_has_so_many_pictures_of_so_many_classes_and_none_twice(
    draw, pictures, seed, epoch
):
    counts = draw.draw(st.lists(st.integers(pictures, 12), min_size=1, max_size=6))
    classes = draw.draw(st.integers(1, len(counts)))
    of = balanced(counts, classes, pictures, seed)
    found = of.order(epoch).reshape(-1, classes, pictures)
    labels = of.labels.numpy()[found]
    assert (labels == labels[:, :, :1]).all()
    assert all(len(set(batch)) == classes for batch in labels[:, :, 0].tolist())
    assert len(set(found.ravel().tolist())) == found.size
    # No arrangement has more batches: each takes at most one group of a class.
    groups = [count // pictures for count in counts]
    fitting = [m for m in range(sum(groups) + 1) if sum(min(g, m) for g in groups) >= m * classes]
    assert len(of) == len(found) == max(fitting)


def test_an_epoch_of_equal_classes_leaves_out_what_fills_no_group_and_no_batch():
    of = balanced([9] * 7, classes=4, pictures=2)
    assert len(of) == 7  # 28 groups of two: all of them
    assert len(of.order(1)) == 56
    assert len(balanced([9] * 7, classes=5, pictures=2)) == 5


def test_all_pictures_are_seen_in_time_and_about_equally_often():
    of = balanced([9] * 7, classes=4, pictures=2)
    seen = np.bincount(np.concatenate([of.order(epoch) for epoch in range(1, 201)]), minlength=63)
    assert seen.sum() == 200 * 56
    assert seen.min() > 150  # of 178 expected, with a deviation of 4.4
    assert seen.max() < 200


def test_any_two_classes_meet():
    of = balanced([8] * 10, classes=3, pictures=2)
    meetings = np.zeros((10, 10))
    for epoch in range(1, 101):
        for batch in of.labels.numpy()[of.order(epoch)].reshape(-1, 6)[:, ::2]:
            meetings[np.ix_(batch, batch)] += 1
    apart = meetings[np.triu_indices(10, 1)]
    assert apart.min() > 0.7 * apart.mean()
    assert apart.max() < 1.3 * apart.mean()


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 2**31), st.integers(0, 5), st.integers(0, 5))
def test_the_order_depends_on_seed_and_epoch_alone(seed, epoch, more, later):
    one, two = balanced([9] * 7, seed=seed), balanced([9] * 7, seed=seed + more)
    two.order(epoch + 7)  # what was drawn before does not matter
    same = np.array_equal(one.order(epoch), two.order(epoch + later))
    assert same == (more == later == 0)


def test_batches_go_on_at_any_step_with_the_same_bits():
    whole = list(balanced([9] * 7)(5))
    assert len(whole) == len(balanced([9] * 7))
    for step in (0, 3, len(whole) - 1):
        for again, batch in zip(
            itertools.islice(balanced([9] * 7)(5), step, None), whole[step:], strict=True
        ):
            assert torch.equal(again.images, batch.images)
            assert torch.equal(again.index, batch.index)
            assert torch.equal(again.labels, batch.labels)
            assert len(batch.labels) == 6
            assert batch.epoch == 5


def test_a_picture_is_seen_as_in_plain_batches_of_the_seed():
    of = balanced([9] * 7, size=6)
    images = np.random.default_rng(0)
    labels = images.permutation(np.repeat(np.arange(7), 9)).astype(np.uint8)
    images = images.integers(0, 256, (63, 6, 6, 3), dtype=np.uint8)
    plain = data.Batches(images, labels, batch_size=10, statistics=STATISTICS, pad=1, seed=3)
    views = {
        int(i): x for batch in plain(2) for i, x in zip(batch.index, batch.images, strict=True)
    }
    for batch in of(2):
        for index, view in zip(batch.index, batch.images, strict=True):
            assert torch.equal(view, views[int(index)])


def test_identity_knows_classes_and_pictures():
    found = {balanced([9] * 7, *how).identity() for how in ((3, 2), (2, 3), (6, 1), (3, 3))}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 4}, "classes is 4; it must be from 1 to all 3"),
        ({"classes": 0}, "classes is 0; it must be from 1 to all 3"),
        ({"pictures": 5}, "pictures is 5; it must be from 1 to 4, as many as class 1 has"),
        ({"pictures": 0}, "pictures is 0; it must be from 1 to 4, as many as class 1 has"),
    ],
)
def test_what_no_batch_can_have_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        balanced([6, 4, 5], **options)


@pytest.mark.parametrize("option", ["batch_size", "shuffle"])
def test_what_classes_and_pictures_decide_cannot_be_given(option):
    with pytest.raises(TypeError, match=option):
        balanced([6, 4, 5], **{option: 1})


# The memory of features


def features(seed, rows=4, width=3):
    return np.random.default_rng(seed).normal(1.0, 1.0, (rows, width))


def test_remembered_centres_are_means_over_the_latest_pictures():
    memory = centres.RememberedCentres(5, 3, size=10)
    past = []
    for step in range(12):
        x = features(step, rows=1 + step % 4).astype(np.float32)
        labels = (np.arange(len(x)) * (step + 1) + step // 3) % 5
        found, known = memory(torch.tensor(x), torch.tensor(labels))
        past = [*past, *zip(labels, x, strict=True)][-10:]
        for k in range(5):
            own = [row for label, row in past if label == k]
            assert bool(known[k]) == bool(own)
            expected = np.mean(own, axis=0) if own else np.zeros(3)
            np.testing.assert_allclose(found[k], expected, atol=1e-6)
    other = centres.RememberedCentres(5, 3, size=10)
    other.load_state_dict(memory.state_dict())  # what is saved is all there is
    batch = torch.tensor(features(99), dtype=torch.float32), torch.tensor([0, 1, 1, 4])
    for one, two in zip(memory(*batch), other(*batch), strict=True):
        assert torch.equal(one, two)


def test_a_memory_of_one_batch_gives_the_batchs_centres():
    memory = centres.RememberedCentres(5, 3, size=4).double()
    for step in range(3):
        x, labels = torch.tensor(features(step)), torch.tensor([step, 3, 3, 1])
        for one, two in zip(memory(x, labels), losses.class_centres(x, labels, 5), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_what_was_added_and_taken_away_many_times_leaves_nothing():
    memory = centres.RememberedCentres(2, 3, size=8)
    for step in range(500):
        big = torch.tensor(1e3 * features(step), dtype=torch.float32)
        memory(big, torch.zeros(4, dtype=torch.long))
    for _ in range(2):
        found, known = memory(torch.full((4, 3), 1e-3), torch.ones(4, dtype=torch.long))
    assert known.tolist() == [False, True]
    assert torch.equal(found[0], torch.zeros(3))
    torch.testing.assert_close(found[1], torch.full((3,), 1e-3), rtol=1e-5, atol=0)


def test_the_gradient_runs_through_the_batchs_part_and_is_its_share():
    memory = centres.RememberedCentres(5, 3, size=100)
    labels = torch.tensor([0, 2, 2, 4])
    for step in range(1, 4):  # a graph kept from an earlier batch would raise here
        x = torch.tensor(features(step), dtype=torch.float32, requires_grad=True)
        memory(x, labels)[0].sum().backward()
        expected = torch.tensor([1, 1 / 2, 1 / 2, 1])[:, None].expand(-1, 3) / step
        torch.testing.assert_close(x.grad, expected)
    assert not any(part.requires_grad for part in memory.buffers())


def test_a_term_learns_from_pairs_of_the_batchs_classes_with_remembered_ones():
    memory = centres.RememberedCentres(5, 3, size=100).double()
    memory(torch.tensor(features(0)), torch.tensor([0, 1, 2, 3]))
    x = torch.tensor(features(1, rows=2), requires_grad=True)
    teacher = torch.tensor(features(2, rows=5)), torch.ones(5, dtype=torch.bool)
    ours = memory(x, torch.tensor([4, 4]))  # one class: without the memory there is no pair
    loss = losses.geometric(ours, teacher)
    loss.backward()
    assert float(loss.detach()) > 1e-3
    assert x.grad.abs().max() > 1e-4


def test_a_memory_stores_nothing_in_eval_mode():
    memory = centres.RememberedCentres(5, 3, size=10).double()
    labels = torch.tensor([0, 1, 1, 4])
    memory(torch.tensor(features(0)), labels)
    before = {name: part.clone() for name, part in memory.state_dict().items()}
    found, _ = memory.eval()(torch.tensor(features(1)), labels)
    expected = (features(0)[0] + features(1)[0]) / 2
    np.testing.assert_allclose(found[0], expected, atol=1e-12)
    for name, part in memory.state_dict().items():
        assert torch.equal(part, before[name])


def test_a_memory_shorter_than_a_batch_and_another_width_are_named():
    with pytest.raises(ValueError, match="a batch has 4 pictures, the memory holds 3"):
        centres.RememberedCentres(5, 3, size=3)(torch.zeros(4, 3), torch.zeros(4).long())
    with pytest.raises(ValueError, match="features have width 2, the memory 3"):
        centres.RememberedCentres(5, 3, size=8)(torch.zeros(4, 2), torch.zeros(4).long())


def test_the_source_hash_sees_this_room():
    def uses(run):
        return centres.Balanced, centres.RememberedCentres

    def does_not(run):
        return losses.dist

    assert "centres" in records.SOURCE_ROOMS
    assert records.source_hash(uses) != records.source_hash(does_not)
