"""The loop: resume, snapshots, faults, stored outputs."""

import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from kdutils import data, metrics, models, train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(n=320, seed=0):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, n).astype(np.uint8)
    statistics = (np.full(3, 127.0), np.full(3, 60.0))
    return data.Batches(images, labels, statistics=statistics, batch_size=50, seed=seed)


class WithDropout(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = models.build("convnet", classes=10, seed=0, widths=(8, 16))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.inner(images))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def fit(folder, epochs, kind="sgd", model=None, loss=None, **options):
    model = model or WithDropout()
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    loss = loss or (lambda model, batch: cross_entropy(model(batch.images), batch.labels))
    history = train.fit(
        model,
        batches(),
        loss,
        epochs=epochs,
        optimizer=optimizer,
        schedule=schedule,
        folder=folder,
        **options,
    )
    return model, [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_interrupted_training_ends_with_the_same_bits(tmp_path, kind):
    whole, history = fit(None, 5, kind)
    fit(tmp_path, 3, kind)
    resumed, again = fit(tmp_path, 5, kind)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [row["lr"] for row in history][::2] == pytest.approx(
        [history[0]["lr"], history[0]["lr"] / 10, history[0]["lr"] / 100]
    )


def test_a_damaged_state_is_set_aside_and_training_starts_again(tmp_path, capsys):
    _, history = fit(None, 2)
    fit(tmp_path, 1)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    _, again = fit(tmp_path, 2)
    assert again == history
    assert "state.safetensors is damaged" in capsys.readouterr().out
    assert list(tmp_path.glob("state.safetensors.damaged-*"))


def test_a_lost_snapshot_makes_training_start_again(tmp_path):
    fit(tmp_path, 2, snapshots=[1])
    (tmp_path / "e1.safetensors").unlink()
    fit(tmp_path, 3, snapshots=[1])
    assert (tmp_path / "e1.safetensors").exists()


def test_snapshots_are_the_weights_of_their_epoch(tmp_path):
    fit(tmp_path, 3, snapshots=[2])
    model, _ = fit(None, 2)
    kept = train.load_weights(WithDropout(), tmp_path / "e2.safetensors").state_dict()
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    assert not (tmp_path / "e1.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_and_says_where():
    steps = []

    def loss(model, batch):
        steps.append(batch.epoch)
        value = cross_entropy(model(batch.images), batch.labels)
        return value * (float("nan") if len(steps) == 7 + 3 else 1)

    with pytest.raises(train.Diverged, match="epoch 2, step 3") as caught:
        fit(None, 3, loss=loss)
    assert (caught.value.epoch, caught.value.step) == (2, 3)


def test_a_measured_number_that_is_not_finite_stops_and_is_named():
    with pytest.raises(
        train.Diverged, match="test_loss is not finite in epoch 1, step 7"
    ) as caught:
        fit(None, 3, measure=lambda model: {"test_loss": float("inf")})
    assert pickle.loads(pickle.dumps(caught.value)).what == "test_loss"


def test_a_failed_write_leaves_the_previous_state(tmp_path, monkeypatch):
    fit(tmp_path, 1)
    good = (tmp_path / "state.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kdutils.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, 2)
    assert (tmp_path / "state.safetensors").read_bytes() == good
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    assert fit(tmp_path, 2)[1] == fit(None, 2)[1]


def test_stored_outputs_are_the_bits_of_computing_them_at_every_step(tmp_path):
    teacher = models.build("convnet", classes=10, seed=9, widths=(8, 16))
    stored = train.stored_outputs(teacher, batches(), 2, tmp_path)
    module = train.fabric().setup_module(teacher).eval()
    with torch.inference_mode():
        for epoch in (1, 2):
            for batch in batches()(epoch):
                assert torch.equal(stored[epoch - 1, batch.index], module(batch.images))


def test_stored_outputs_are_computed_once_and_never_for_other_views(tmp_path, monkeypatch):
    teacher = models.build("convnet", classes=10, seed=9, widths=(8, 16))
    first = train.stored_outputs(teacher, batches(), 2, tmp_path)
    other = train.stored_outputs(teacher, batches(seed=1), 2, tmp_path)
    assert not torch.equal(first, other)
    monkeypatch.setattr(train, "predict", lambda *_: pytest.fail("computed again"))
    assert torch.equal(train.stored_outputs(teacher, batches(), 2, tmp_path), first)


def test_damaged_stored_outputs_are_set_aside_and_computed_again(tmp_path, capsys):
    teacher = models.build("convnet", classes=10, seed=9, widths=(8, 16))
    first = train.stored_outputs(teacher, batches(), 1, tmp_path)
    (path,) = tmp_path.glob("outputs-*")
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(train.stored_outputs(teacher, batches(), 1, tmp_path), first)
    assert "is damaged" in capsys.readouterr().out


def test_predict_keeps_the_order_and_leaves_the_network_in_eval_mode():
    model = models.build("convnet", classes=10, seed=0, widths=(8, 16)).train()
    shuffled = batches()
    logits = train.predict(model, shuffled, epoch=3)
    assert logits.shape == (320, 10)
    assert not model.training
    batch = next(iter(shuffled(3)))
    with torch.inference_mode():
        again = train.fabric().setup_module(model)(batch.images)
    assert torch.equal(logits[batch.index], again)


def test_precision_is_recorded_as_used():
    used = train.device_description()
    expected = torch.ops.mkldnn._is_mkldnn_bf16_supported() or torch.cuda.is_available()
    assert used["precision"] == ("bf16-mixed" if expected else "32-true")
    assert used["threads"] == 1


def test_a_classifier_is_measured_on_held_out_and_test_pictures_after_every_epoch():
    images = data.parts("digits", validation=200, batch_size=50, seed=0)
    model = models.build("convnet", classes=10, seed=0, widths=(8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = train.fit_classifier(
        model,
        images,
        lambda model, batch: cross_entropy(model(batch.images), batch.labels),
        also=lambda logits: {"rows": len(logits)},
        epochs=2,
        optimizer=optimizer,
    )
    assert [row["epoch"] for row in history] == [1, 2]
    for part in ("validation", "test"):
        batches = getattr(images, part)
        found = metrics.classification(train.predict(model, batches), batches.labels)
        assert {f"{part}_{k}": v for k, v in found.items()}.items() <= history[-1].items()
    assert history[-1]["rows"] == len(images.test.labels)
