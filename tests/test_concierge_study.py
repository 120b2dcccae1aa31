"""Study 1: its losses head by head, its measures, its engines, and a folder of faces end to end."""

import ast
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_recordings
import torch
import torch.nn.functional as F

from kdutils import notebooks, records, results
from kdutils.concierge import deciding, recordings, scenes

SHAPE = {"embedding": 8, "frames": 4, "size": 32}
SETTING = {
    "folder": "",
    "registered": 3,
    "others": 2,
    "strangers": [2, 2],
    "clips": [35, 42, 42],
    "weakest": 0.7,
    "drift": 0.02,
    "covered": 0.15,
    "frames": 3,
    "size": 16,
    "embedding": 4,
    "epochs": 1,
    "batch_size": 16,
    "lr": 0.002,
    "box_weight": 10.0,
    "false_accepts": 0.1,
}
LARGE, SMALL = [24, 1], [16, 1]  # narrower ones meet oneDNN's issue 6035


@pytest.fixture(scope="module")
def study():
    return notebooks.procedure("concierge", {"scale": "laptop", "train_missing": False})


def parameters_of(study):
    return {k: study[k] for k in study["Setting"].model_fields}


# Scenes


def test_emotions_are_told_apart_by_their_true_action_units():
    """A linear classifier on what is drawn gets it right: the labels are those of the drawing."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = [], []
    for k in range(490):
        units = scenes._units(k % 7, scenes._Draws(1, k), 8)
        rows.append([float(units[name][-1, 0, 0]) for name in scenes.UNITS])
        labels.append(k % 7)
    found = LogisticRegression(C=100, max_iter=1000).fit(rows[:350], labels[:350])
    assert found.score(rows[350:], labels[350:]) > 0.97


def test_people_are_told_apart_by_the_geometry_that_is_drawn(monkeypatch):
    """The nearest of the shapes drawn in other clips, of another emotion, is the same person's."""
    from sklearn.neighbors import KNeighborsClassifier

    drawn, paint = [], scenes._Canvas.ellipse

    def ellipse(self, x, y, a, b, *rest, **more):
        if np.ndim(y) == np.ndim(b) == 0 and not rest and not more:  # no frame moves it
            drawn.append([float(v) for v in (x, y, a, b)])
        return paint(self, x, y, a, b, *rest, **more)

    monkeypatch.setattr(scenes._Canvas, "ellipse", ellipse)
    looks, people = [], list(range(30))
    still = scenes.Play(covered=0.0)
    for index, emotion in enumerate((3, 6)):
        for person in people:
            drawn.clear()
            scenes.clip(person, emotion, seed=1, index=index, frames=2, size=32, play=still)
            shapes = np.array(drawn)
            looks.append(np.concatenate([shapes.mean(0), shapes.std(0), shapes[-3:].ravel()]))
    known = KNeighborsClassifier(1).fit(looks[:30], people)
    assert known.score(looks[30:], people) == 1


def test_the_records_of_this_study_name_the_code_that_drew_and_those_of_others_do_not(monkeypatch):
    def sources():
        names = {
            name: notebooks.procedure(name, {"scale": "laptop"}) for name in ("concierge", "eskd")
        }
        return [names[name]["teacher"].source for name in names]

    before, tree = sources(), records._tree
    assert sources() == before

    def changed(room):
        found = tree(room)
        if room != "concierge/scenes":
            return found
        return ast.Module([*found.body, tree("files").body[-1]], [])

    monkeypatch.setattr(records, "_tree", changed)
    after = sources()
    assert after[0] != before[0]
    assert after[1] == before[1]


# Losses


def batch(n=2):
    return SimpleNamespace(
        emotions=torch.tensor([0, 3])[:n],
        people=torch.tensor([1, 0])[:n],
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.4, 0.6, 0.3, 0.5]])[:n],
    )


HOW = [2.0, 0.25]  # temperature and α


def test_losses_of_all_heads_are_as_computed_by_hand(study):
    where = study["layout"]("multimodal", 2, 3)
    torch.manual_seed(0)
    ours, theirs = (torch.rand(2, 7 + 4 + 2 + 3) for _ in range(2))
    given, (T, alpha), value = batch(), HOW, 0.0
    for head, labels in (("emotion", given.emotions), ("user", given.people)):
        z, t = ours[:, where[head]].double().numpy(), theirs[:, where[head]].double().numpy()

        def soft(rows, T):
            powers = np.exp(rows / T)
            return powers / powers.sum(1, keepdims=True)

        hard = -np.mean([math.log(soft(z, 1)[i, int(labels[i])]) for i in range(2)])
        p, q = soft(t, T), soft(z, T)
        kl = T * T * np.mean((p * np.log(p / q)).sum(1))
        value += (1 - alpha) * hard + alpha * kl

    def smooth(d):
        return np.where(np.abs(d) < 0.05, d * d / 0.1, np.abs(d) - 0.025)

    b, c, y = (
        v.double().numpy() for v in (ours[:, where["face"]], theirs[:, where["face"]], given.boxes)
    )
    better = ((b - y) ** 2).sum(1) > ((c - y) ** 2).sum(1)
    value += 10 * (smooth(b - y).mean() + 0.5 * (smooth(b - c).mean(1) * better).mean())
    found = study["total"](ours, given, where, 10.0, theirs, HOW)
    assert float(found) == pytest.approx(value, abs=1e-5)


def test_without_a_teacher_the_losses_are_those_of_the_labels(study):
    where = study["layout"]("emotion", 2, 3)
    ours = torch.randn(2, 7)
    expected = F.cross_entropy(ours, batch().emotions)
    torch.testing.assert_close(study["total"](ours, batch(), where, 10.0), expected)


def test_the_teachers_box_is_off_where_the_student_is_better(study):
    truth = torch.tensor([[0.5, 0.5, 0.4, 0.6]] * 2)
    good, bad = truth + 0.01, truth + 0.1
    ours = torch.stack([good[0], bad[1]]).requires_grad_()
    theirs = torch.stack([bad[0], good[1]])
    soft = study["box_loss"](ours, truth, theirs) - study["box_loss"](ours, truth)
    (gradient,) = torch.autograd.grad(soft, ours)
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().min() > 0


# Networks and measures


@pytest.mark.parametrize("network", ["emotion", "face", "user", "multimodal"])
def test_a_network_has_the_heads_of_its_task_side_by_side(study, network):
    model = study["build"](network, [4, 1], 5, 0, SHAPE).eval()
    where = study["layout"](network, 5, 8)
    out = model(torch.rand(3, 12, 32, 32) - 0.5)
    assert out.shape == (3, max(at.stop for at in where.values()))
    assert {"embedding"} ^ set(where) >= set(study["TASKS"][network]) - {"embedding"}
    if "user" in where:
        torch.testing.assert_close(out[:, where["embedding"]].norm(dim=1), torch.ones(3))
    if "face" in where:
        box = out[:, where["face"]]
        assert (box > 0).all()
        assert (box < 1).all()
    again = study["build"](network, [4, 1], 5, 0, SHAPE).eval()
    assert torch.equal(again(torch.zeros(1, 12, 32, 32)), model(torch.zeros(1, 12, 32, 32)))


def test_the_emotion_network_sees_all_frames_and_the_image_branch_the_middle_one(study):
    clip = torch.rand(1, 12, 32, 32) - 0.5
    changed = clip.clone()
    changed[:, 9:] += 0.2  # the last frame
    for network, same in (("emotion", False), ("face", True), ("user", True)):
        model = study["build"](network, [4, 1], 5, 0, SHAPE).eval()
        assert torch.equal(model(clip), model(changed)) == same


def test_the_video_branch_sees_the_first_frame_in_grey_and_what_the_others_differ_by(study):
    clips = torch.rand(3, 12, 5, 5)
    grey = clips.view(3, 4, 3, 5, 5).mean(2)
    expected = torch.cat([grey[:, :1], 4 * (grey[:, 1:] - grey[:, :1])], 1)
    found = torch.nn.functional.conv2d(clips, study["movement"](4))
    torch.testing.assert_close(found, expected)


def test_boxes_of_a_wide_network_are_learned_and_do_not_stick_to_the_edge(study):
    found = scenes.draw(list(range(16)), 24, seed=0, frames=2, size=64)
    images = torch.as_tensor(found.clips).permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
    boxes = torch.as_tensor(found.boxes)
    model = study["build"]("face", [32, 1], 5, 0, {"frames": 2, "size": 64}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)  # the laptop's
    for _ in range(24):
        out = model(images.float() / 255 - 0.5)
        loss = study["box_loss"](out, boxes)
        optimizer.zero_grad()
        (10 * loss).backward()
        optimizer.step()
    assert deciding.overlap(out.detach(), boxes).mean() > 0.9


def test_a_part_is_measured_by_the_gallery_of_who_is_enrolled(study):
    """Of drawn embeddings: everybody known is found, strangers are refused but for the share."""
    draw = np.random.default_rng(0)
    faces = draw.normal(size=(6, 16))

    def part(people, registered):
        whose = np.repeat(people, 20)
        rest = draw.integers(0, 7, len(whose)), np.isin(whose, range(registered))
        boxes = np.tile([0.5, 0.5, 0.4, 0.4], (len(whose), 1))
        return SimpleNamespace(people=whose, emotions=rest[0], registered=rest[1], boxes=boxes)

    train, held, test = part([0, 1], 2), part([0, 1, 2, 3], 2), part([0, 1, 4, 5], 2)
    where = {"emotion": slice(0, 7), "face": slice(7, 11), "user": None, "embedding": slice(11, 27)}

    def outputs(of):
        seen = faces[of.people] + 0.05 * draw.normal(size=(len(of.people), 16))
        return np.concatenate([np.eye(7)[of.emotions], of.boxes, seen], 1)

    found = SimpleNamespace(train=train, validation=held, test=test)
    out = {"enrolled": outputs(train), "validation": outputs(held), "test": outputs(test)}
    said = study["measured"](out, found, where, 0.05)
    assert said["test_emotion"] == 1
    assert said["test_iou"] == pytest.approx(1)
    assert said["test_identified"] == 1
    assert said["validation_user"] >= 0.95
    assert said["test_user"] >= 0.5  # of other strangers
    out["test"][:, :7] = np.roll(out["test"][:, :7], 1, axis=1)
    assert study["measured"](out, found, where, 0.05)["test_emotion"] == 0


def test_what_is_chosen_is_best_by_the_mean_once_all_choice_seeds_have_run(study):
    rows = [(1.0, 100, 0.4), (1.0, 101, 0.8), (4.0, 100, 0.5), (4.0, 101, 0.5), (9.0, 100, 0.9)]
    frame = pd.DataFrame(rows, columns=["T", "seed", "validation_emotion"])
    found = study["held_out"](frame, "T", "validation_emotion")
    assert found.to_dict() == {"1.0": pytest.approx(0.6), "4.0": 0.5}
    assert study["best"]([1.0, 4.0], found) == 1.0
    assert study["best"]([1.0, 4.0, 9.0], found) is None  # not all ran
    assert not len(study["held_out"](frame[:0], "T", "validation_emotion"))


# Engines


def test_engines_give_the_networks_answers_on_drawn_clips(study, tmp_path):
    pytest.importorskip("onnxruntime", reason="engines are in the extra 'edge'")
    pytest.importorskip("openvino", reason="engines are in the extra 'edge'")
    drawn = scenes.draw([0, 1], 6, seed=0, frames=4, size=32)
    samples = [deciding.entered(clip) for clip in drawn.clips]
    rows = torch.as_tensor(np.concatenate(samples))
    model = study["build"]("multimodal", [4, 1], 5, 0, SHAPE)
    model.train()(rows)  # moves the batch norms' means off zero
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(clip[None]) for clip in rows]).numpy()
    where = study["layout"]("multimodal", 5, 8)
    for runtime, near in (("torch", 1e-6), ("onnxruntime", 1e-4), ("openvino", 1e-4)):
        look = study["engine_for"](runtime, model, tmp_path / "student", samples[0], samples)
        found, worth = study["looked_at"](look, drawn.clips, where)
        np.testing.assert_allclose(found, expected, atol=near)
        assert list(worth) == ["small", "dark", "blurred", "nobody"]
        assert len(worth) == 6
    look = study["engine_for"]("openvino-int8", model, tmp_path / "student", samples[0], samples)
    found = np.concatenate([look(values) for values in samples])
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
    lengths = np.linalg.norm(found[:, where["embedding"]], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)  # else its cosines are none


def test_clips_come_back_as_they_were_drawn(study):
    drawn = scenes.draw([0, 1], 4, seed=0, frames=4, size=32)
    part = SimpleNamespace(clips=recordings.side_by_side(drawn.clips))
    np.testing.assert_array_equal(study["clips_of"](part, 4), drawn.clips)


# What claims are made of


def test_times_and_temperatures_come_to_what_they_do_by_hand(study):
    assert study["three_over_one"](1.0, 2.0, 3.0, 4.0) == 1.5
    assert study["over_slowest"](6.0, 1.0, 4.0, 2.0) == 1.5


def test_what_is_made_of_records_says_where_its_numbers_stand(study):
    runs = {0: ("a", [1.0, 2.0]), 1: ("b", [2.0, 4.0])}
    frame = pd.DataFrame(
        [
            {"key": key, "seed": seed, "milliseconds": {"m": [0.0, one, 9.0], "e": [0.0, two, 9.0]}}
            for seed, (key, (one, two)) in runs.items()
        ]
    )
    whole, part = (results.final(frame, f"milliseconds/{name}/1") for name in "me")
    found = results.made_of(study["over_slowest"], whole, part, part)
    assert found.how == "over_slowest"
    assert found.values.to_dict() == {0: 0.5, 1: 0.5}
    assert found.sources[1] == [
        ("b", "milliseconds/m/1", 2.0),
        ("b", "milliseconds/e/1", 4.0),
        ("b", "milliseconds/e/1", 4.0),
    ]
    fewer = results.final(frame[frame.seed == 1], "milliseconds/e/1")
    assert results.made_of(study["over_slowest"], whole, fewer).values.to_dict() == {1: 0.5}
    assert results.made_of(study["over_slowest"], whole, whole - part).how.endswith("of difference")
    assert not len(results.made_of(study["over_slowest"], whole, results.NOTHING).values)


# The page


def test_a_wrong_setting_stops_with_one_sentence(study):
    given = parameters_of(study)
    check = study["Setting"].check
    check(given)
    wrong = [
        ({"registered": 1}, "parameter registered is 1"),
        ({"strangers": [20]}, "parameter strangers is"),
        ({"ways": [[1.0, 0.5], [1.0, 1.5]]}, r"ways has \[\[1.0, 1.5\]\]; a temperature must be"),
        ({"ways": [[4.0, 0.5]]}, "list should have at least 2 items after validation"),
        ({"ways": [[0.0, 0.5], [1.0, 0.5]]}, r"ways has \[\[0.0, 0.5\]\]"),
        ({"false_accepts": 0.0}, "parameter false_accepts is 0.0"),
        ({"runtimes": ["openvino"]}, "runtimes must begin with torch, not 'openvino'"),
        ({"runtimes": ["torch", "tflite"]}, r"parameter runtimes\[1\] is 'tflite'"),
        ({"size": 40}, "size is 40; it must be a multiple of 16"),
        ({"large": [32]}, "parameter large is"),
        ({"clips": [70, 2240, 2800]}, r"clips\[0\]: everybody in training needs one"),
        ({"clips": [5600, 158, 2800]}, "clips: 160 strangers need 2240 in each part"),
        ({"enrolled": [1, 160]}, "enrolled: 160 of 160 strangers leave none over"),
        ({"choice_seeds": [0]}, "choice_seeds must not be in seeds"),
    ]
    for change, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            check(given | change)


def test_a_missing_engine_is_said_before_anything_is_trained(study, monkeypatch):
    given = parameters_of(study) | {"train_missing": True}
    monkeypatch.setitem(study, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"runtimes need .*onnxruntime.*leave them out, or install"
    ):
        study["Setting"].check(given)
    study["Setting"].check(given | {"runtimes": ["torch"]})


def trained(setting):
    """A teacher and its distilled student of one epoch, multimodal; the student's record."""
    names = notebooks.procedure("concierge", {"scale": "smoke", "train_missing": True})
    asked = {"network": "multimodal", "seed": 0, "master": LARGE, "how": HOW, "shape": SMALL}
    return names["distilled"](**asked, **setting).results


def test_a_student_is_trained_and_measured_on_drawn_clips():
    found = trained(SETTING)
    for part in ("validation", "test"):
        for name in ("emotion", "iou", "user", "identified"):
            assert 0 <= found[f"{part}_{name}"] <= 1
    assert len(found["taught_by"]) == 64
    assert found["history"][0]["loss"] > 0


def test_a_database_of_grey_faces_trains_end_to_end(tmp_path):
    test_recordings.database(tmp_path)
    found = trained(SETTING | {"folder": str(tmp_path)})
    assert 0 <= found["test_emotion"] <= 1
    numbers = [v for v in found.values() if not isinstance(v, list)]
    assert len(numbers) == len(found) - 1  # but for the history; nothing of real people is kept
