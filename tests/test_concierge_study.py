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
from kdutils.concierge import scenes
from kdutils.parameters import ParameterError

SHAPE = {"embedding": 8, "frames": 4, "size": 32}
SETTING = {
    "folder": "",
    "registered": 3,
    "others": 2,
    "strangers": [2, 2],
    "clips": [35, 42, 42],
    "data_seed": 0,
    "weakest": 0.7,
    "drift": 0.02,
    "covered": 0.15,
    "frames": 3,
    "size": 16,
    "embedding": 4,
    "epochs": 1,
    "batch_size": 16,
    "lr": 0.002,
    "pad": 1,
    "box_weight": 10.0,
    "false_accepts": 0.1,
}
LARGE, SMALL = {"width": 4, "depth": 1}, {"width": 2, "depth": 1}


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


HOW = {"emotion_temperature": 2.0, "emotion_alpha": 0.25, "user_temperature": 3.0}
HOW |= {"user_alpha": 0.5, "box_nu": 0.5, "bounded": True, "margin": 0.0}


def test_losses_of_each_head_are_as_computed_by_hand(study):
    where = study["layout"]("multimodal", 2, 3)
    torch.manual_seed(0)
    ours, theirs = (torch.rand(2, 7 + 4 + 2 + 3) for _ in range(2))
    given = batch()
    found = study["terms"](ours, given, where, theirs, HOW)
    for head, labels, T in (("emotion", given.emotions, 2.0), ("user", given.people, 3.0)):
        z, t = ours[:, where[head]].double().numpy(), theirs[:, where[head]].double().numpy()

        def soft(rows, T):
            powers = np.exp(rows / T)
            return powers / powers.sum(1, keepdims=True)

        hard = -np.mean([math.log(soft(z, 1)[i, int(labels[i])]) for i in range(2)])
        p, q = soft(t, T), soft(z, T)
        kl = T * T * np.mean((p * np.log(p / q)).sum(1))
        assert float(found[head][0]) == pytest.approx(hard, abs=1e-5)
        assert float(found[head][1]) == pytest.approx(kl, abs=1e-5)

    def smooth(d):
        return np.where(np.abs(d) < 0.05, d * d / 0.1, np.abs(d) - 0.025)

    b, c, y = (
        v.double().numpy() for v in (ours[:, where["face"]], theirs[:, where["face"]], given.boxes)
    )
    better = ((b - y) ** 2).sum(1) > ((c - y) ** 2).sum(1)
    assert float(found["face"][0]) == pytest.approx(smooth(b - y).mean(), abs=1e-5)
    assert float(found["face"][1]) == pytest.approx(
        (smooth(b - c).mean(1) * better).mean(), abs=1e-5
    )
    value = 0.75 * found["emotion"][0] + 0.25 * found["emotion"][1]
    value = value + 0.5 * (found["user"][0] + found["user"][1])
    value = value + 10 * (found["face"][0] + 0.5 * found["face"][1])
    assert float(study["total"](found, 10.0, HOW)) == pytest.approx(float(value), abs=1e-5)


def test_without_a_teacher_the_losses_are_those_of_the_labels(study):
    where = study["layout"]("emotion", 2, 3)
    ours = torch.randn(2, 7)
    found = study["terms"](ours, batch(), where)
    assert found["emotion"][1] is None
    expected = F.cross_entropy(ours, batch().emotions)
    torch.testing.assert_close(study["total"](found, 10.0), expected)


def test_the_teachers_box_is_off_where_the_student_is_better(study):
    truth = torch.tensor([[0.5, 0.5, 0.4, 0.6]] * 2)
    good, bad = truth + 0.01, truth + 0.1
    ours = torch.stack([good[0], bad[1]]).requires_grad_()
    theirs = torch.stack([bad[0], good[1]])
    assert study["teacher_nearer"](ours, truth, theirs, 0.0).tolist() == [False, True]
    _, soft = study["box_terms"](ours, truth, theirs, True, 0.0)
    (gradient,) = torch.autograd.grad(soft, ours)
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().min() > 0
    _, none = study["box_terms"](
        ours, truth, theirs, True, 1.0
    )  # better by a margin, or not at all
    assert none.item() == 0
    _, both = study["box_terms"](ours, truth, theirs, False, 0.0)
    assert torch.autograd.grad(both, ours)[0][0].abs().min() > 0


# Networks and measures


@pytest.mark.parametrize("network", ["emotion", "face", "user", "multimodal"])
def test_a_network_has_the_heads_of_its_task_side_by_side(study, network):
    model = study["build"](network, 4, 1, 5, 0, **SHAPE).eval()
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
    again = study["build"](network, 4, 1, 5, 0, **SHAPE).eval()
    assert torch.equal(again(torch.zeros(1, 12, 32, 32)), model(torch.zeros(1, 12, 32, 32)))


def test_the_emotion_network_sees_all_frames_and_the_image_branch_the_middle_one(study):
    clip = torch.rand(1, 12, 32, 32) - 0.5
    changed = clip.clone()
    changed[:, 9:] += 0.2  # the last frame
    for network, same in (("emotion", False), ("face", True), ("user", True)):
        model = study["build"](network, 4, 1, 5, 0, **SHAPE).eval()
        assert torch.equal(model(clip), model(changed)) == same


def test_the_control_is_the_multimodal_network_with_one_head(study):
    control, whole = (
        study["build"](n, 4, 1, 5, 0, **SHAPE) for n in (study["CONTROL"], "multimodal")
    )
    assert control.eval()(torch.zeros(2, 12, 32, 32)).shape == (2, 7)
    ours, theirs = control.state_dict(), whole.state_dict()
    assert {k for k in theirs if k not in ours} == {
        "face.weight", "face.bias", "embedding.weight", "embedding.bias", "people.weight"
    }  # fmt: skip
    for name, value in ours.items():  # both begin at the same point
        assert torch.equal(theirs[name], value), name


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
    model = study["build"]("face", 32, 1, 5, 0, embedding=8, frames=2, size=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)  # the laptop's
    for _ in range(24):
        out = model(images.float() / 255 - 0.5)
        loss, _ = study["box_terms"](out, boxes, None, False, 0.0)
        optimizer.zero_grad()
        (10 * loss).backward()
        optimizer.step()
    assert study["overlap"](out.detach(), boxes).mean() > 0.9


def test_overlap_by_hand(study):
    a = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]])
    b = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]])
    torch.testing.assert_close(study["overlap"](a, b), torch.tensor([1.0, 1 / 3, 0.0]))


def test_the_threshold_lets_in_no_more_strangers_than_said(study):
    scores = np.random.default_rng(0).random(1000)
    for share in (0.01, 0.05, 0.5):
        found = study["threshold_for"](scores, share)
        assert (scores > found).mean() <= share
        assert (scores > found).mean() >= share - 0.002


def test_a_gallery_has_one_direction_a_person(study):
    embeddings = F.normalize(torch.randn(6, 3))
    found = study["enrol"](embeddings, torch.tensor([1, 0, 1, 0, 1, 0]))
    expected = F.normalize(embeddings[[1, 3, 5]].mean(0), dim=0)
    torch.testing.assert_close(found[0], expected)
    assert found.shape == (2, 3)


def test_people_enrolled_late_are_found_and_others_refused_at_the_rate(study):
    rng = np.random.default_rng(0)
    people, emotions = np.repeat(np.arange(40), 25), np.tile(np.arange(25) % 7, 40)
    faces = rng.normal(size=(40, 32))
    clips = faces[people] + 0.6 * rng.normal(size=(1000, 32))
    clips /= np.linalg.norm(clips, axis=1, keepdims=True)
    firsts, foreign = study["half_enrolled"](people, emotions)
    assert {study["EMOTIONS"][k] for k in emotions[firsts]} == {"neutral"}
    assert study["half_enrolled"](people, 0 * emotions)[0].tolist() == list(range(0, 1000, 50))
    assert people[firsts].tolist() == list(range(0, 40, 2))
    assert set(people[foreign]) == set(range(1, 40, 2))
    threshold = study["one_clip_threshold"](clips, people, emotions, 0.05)
    again = study["enrolled_late"](clips, people, emotions, threshold)
    assert 0.03 < again["late_let_in"] <= 0.05  # on the clips that it was set on
    assert again["late_recognised"] > 0.9
    assert study["enrolled_late"](clips, people, emotions, -1.0)["late_let_in"] == 1
    none = study["enrolled_late"](clips, people, emotions, 1.0)
    assert none == {"late_recognised": 0.0, "late_let_in": 0.0}
    clips[firsts] = clips[np.roll(firsts, 1)]  # each is enrolled by a clip of another
    assert study["enrolled_late"](clips, people, emotions, threshold)["late_recognised"] < 0.1


# Engines


def test_engines_give_the_networks_answers_on_drawn_clips(study, tmp_path):
    pytest.importorskip("onnxruntime", reason="engines are in the extra 'edge'")
    pytest.importorskip("openvino", reason="engines are in the extra 'edge'")
    drawn = scenes.draw([0, 1], 6, seed=0, frames=4, size=32).clips
    rows = torch.as_tensor(drawn).permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
    clips = [(one[None].float() / 255 - 0.5).contiguous() for one in rows]
    model = study["build"]("multimodal", 4, 1, 5, 0, **SHAPE)
    model.train()(torch.cat(clips))  # moves the batch norms' means off zero
    model.eval()
    samples = [clip.numpy() for clip in clips]
    with torch.no_grad():
        expected = torch.cat([model(clip) for clip in clips]).numpy()
    for runtime, near in (("torch", 1e-6), ("onnxruntime", 1e-4), ("openvino", 1e-4)):
        look = study["engine_for"](runtime, model, tmp_path / "student", clips[0])
        found = np.concatenate([look(values) for values in samples])
        np.testing.assert_allclose(found, expected, atol=near)
    for runtime in ("onnxruntime-int8", "openvino-int8"):
        look = study["engine_for"](runtime, model, tmp_path / "student", clips[0], samples)
        found = np.concatenate([look(values) for values in samples])
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
        lengths = np.linalg.norm(found[:, study["layout"]("multimodal", 5, 8)["embedding"]], axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)  # else its cosines are none


# What claims are made of


def test_times_and_temperatures_come_to_what_they_do_by_hand(study):
    assert study["three_over_one"](1.0, 2.0, 3.0, 4.0) == 1.5
    assert study["over_slowest"](6.0, 1.0, 4.0, 2.0) == 1.5
    assert study["doublings"](16.0, 4.0) == 2
    accuracies = dict.fromkeys(study["p"].temperatures, 0.5)
    assert study["best_tried"](*accuracies.values()) == 1  # of equal ones the lowest
    accuracies |= {4.0: 0.8, 16.0: 0.8}
    assert study["best_tried"](*accuracies.values()) == 4


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
        ({"alpha": 1.5}, "parameter alpha is 1.5"),
        ({"temperatures": [1.0, 0.0]}, r"parameter temperatures\[1\] is 0.0"),
        ({"false_accepts": 0.0}, "parameter false_accepts is 0.0"),
        ({"runtimes": ["openvino"]}, "runtimes must begin with torch, not with 'openvino'"),
        ({"runtimes": ["torch", "tflite"]}, r"parameter runtimes\[1\] is 'tflite'"),
        ({"size": 40}, "size is 40; it must be a multiple of 16"),
        ({"pad": 9}, "pad is 9; it must be at most size / 16 = 4"),
        ({"bounded": 1}, "parameter bounded is 1"),
        ({"clips": [70, 2240, 2800]}, r"clips\[0\] is 70; everybody in training needs one"),
        ({"clips": [5600, 158, 2800]}, r"clips\[1\] is 158; 40 strangers need 160"),
        ({"device": True, "runtimes": ["torch"]}, "device needs runtimes with onnxruntime or"),
    ]
    for change, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            check(given | change)


@pytest.mark.parametrize(
    ("people", "fine"), [([5, 5, 6, 6], True), ([5, 5, 6], True), ([5, 5], False), ([5, 6], False)]
)
def test_a_folder_with_too_few_strangers_is_refused_before_training(study, people, fine):
    part = SimpleNamespace(
        people=np.array([1, 2, *people]), registered=np.arange(2 + len(people)) < 2
    )
    if fine:
        study["enough_strangers"](part, "test")
    else:
        with pytest.raises(
            ParameterError, match=r"folder: the test part has \d people who are not"
        ):
            study["enough_strangers"](part, "test")


def test_emotions_have_the_same_names_and_order_where_they_are_drawn(study):
    assert study["EMOTIONS"] == list(scenes.EMOTIONS)


def test_a_missing_engine_is_said_before_anything_is_trained(study, monkeypatch):
    given = parameters_of(study) | {"train_missing": True}
    monkeypatch.setitem(study, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="runtimes names onnxruntime, which is not installed"):
        study["Setting"].check(given)
    study["Setting"].check(given | {"runtimes": ["torch"]})


def trained(setting):
    """A teacher and its distilled student of one epoch, multimodal; the student's record."""
    names = notebooks.procedure("concierge", {"scale": "smoke", "train_missing": True})
    how = names.get("how") or {**HOW}
    return names["distilled"](
        network="multimodal", seed=0, master=LARGE, how=how, **SMALL, **setting
    ).results


def test_a_student_is_trained_and_measured_on_drawn_clips():
    found = trained(SETTING)
    assert {"emotion_hard", "emotion_soft", "user_soft", "face_soft"} <= set(found["history"][0])
    # Validation has 21 clips of registered people, and the teacher is nearer on a number of them.
    nearer = 21 * found["history"][0]["teacher_nearer"]
    assert nearer == pytest.approx(round(nearer), abs=1e-4)
    for name in ("emotion_accuracy", "user_accuracy", "far", "frr", "iou", "ap50", "auc"):
        assert 0 <= found[name] <= 1
    assert len(found["examples"]) == 7
    assert sum(map(sum, found["confusion"])) == 42


def test_a_database_of_grey_faces_trains_end_to_end(tmp_path):
    test_recordings.database(tmp_path)
    found = trained(SETTING | {"folder": str(tmp_path)})
    assert found["examples"] == []  # nothing of real people goes into a record
    assert 0 <= found["emotion_accuracy"] <= 1
