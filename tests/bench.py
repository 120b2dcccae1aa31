"""What the training loop costs beside the networks' own arithmetic: ``make bench``.

And how long others take for the same distillation: torchdistill (extra ``bench``), and the loop of
PyTorch's tutorial. ``--rivals`` measures these alone, ``--out`` keeps every round as JSON.

Every ratio is of two things measured in turn in the same run, as the median over the rounds of
their quotient: what else the machine does then touches both alike. Exits with 1 if a goal is
missed. Pictures are random; no data is needed.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import lightning_fabric
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler

from kdutils import Study, data, files, grid, losses, models, records, train
from kdutils._torchvision import torchvision

BATCH = 128
STATISTICS = (np.full(3, 125.0), np.full(3, 60.0))
SMALL = dict(name="convnet", widths=(8, 16, 32))  # about 4 ms a step on two threads
SGD = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)


def batches(steps: int, size: int = BATCH, classes: int = 10) -> data.Batches:
    """Random pictures of 32 × 32 pixels, enough for ``steps`` batches of ``size`` an epoch."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size * steps, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, classes, len(images), dtype=np.uint8)
    device = train.fabric().device
    options = dict(statistics=STATISTICS, batch_size=size, seed=0, device=device)
    return data.Batches(images, labels, **options)


def build(name="resnet18", classes=10, **options):
    return models.build(name, classes=classes, seed=1, **options).to(train.fabric().device)


def sgd(network):
    return torch.optim.SGD(network.parameters(), fused=True, **SGD)


def hard(network, batch):
    return F.cross_entropy(network(batch.images), batch.labels)


def bare(network, optimizer, preloaded, term=hard) -> None:
    """Forward, backward, step on batches that lie ready, at the loop's precision."""
    device = train.fabric().device.type
    bf16 = train.device_description()["precision"] == "bf16-mixed"
    network.train()
    for batch in preloaded:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = term(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    float(loss.detach())  # waits for the device


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(a, b, rounds: int, warm_up: int = 1) -> list[tuple[float, float]]:
    """Seconds of a and of b, one after the other, after rounds that do not count."""
    return [(seconds(a), seconds(b)) for _ in range(warm_up + rounds)][warm_up:]


def quotient(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(a / b for a, b in pairs)


def milliseconds(pairs, steps: int) -> str:
    """Of a step of a and of b, for the table."""
    a, b = (statistics.median(times) / steps * 1e3 for times in zip(*pairs, strict=True))
    return f"{a:8.2f} {b:8.2f}"


def loop(network: dict, steps: int, rounds: int) -> list[tuple[float, float]]:
    """Epochs of bare steps and, between them, epochs of one :func:`kdutils.train.fit`."""
    trained, alone = build(**network), build(**network)
    optimizer, ready, pairs = sgd(alone), batches(steps), []
    preloaded = list(ready(1))

    def progress(epochs):
        for epoch in epochs:
            before = seconds(lambda: bare(alone, optimizer, preloaded))
            started = time.perf_counter()
            yield epoch  # fit trains here
            pairs.append((before, time.perf_counter() - started))

    options = dict(epochs=1 + rounds, optimizer=sgd(trained), progress=progress)
    train.fit(trained, ready, hard, **options)
    return pairs[1:]


def asked(teacher, batch):
    with torch.inference_mode():
        logits = teacher(batch.images)
    return logits.clone()


def taught(student, said, ready, **options):
    """An epoch of :func:`kdutils.train.fit`, to be called; ``said(batch)`` is the teacher's."""
    optimizer = sgd(student)

    def loss(network, batch):
        return losses.distillation(network(batch.images), said(batch), batch.labels, **options)

    return lambda: train.fit(student, ready, loss, epochs=1, optimizer=optimizer)


def cached_teacher(steps: int, rounds: int) -> tuple[list[tuple[float, float]], bool]:
    """Epochs with the teacher computed at every step and with its outputs read; same student?"""
    ready = batches(steps)
    teacher = train.fabric().setup_module(models.build("resnet34", classes=10, seed=2)).eval()
    students = [build(), build()]
    with tempfile.TemporaryDirectory() as folder:
        train.stored_outputs(teacher, ready, 1, Path(folder))
        stored = train.stored_outputs(teacher, ready, 1, Path(folder))  # from the file
    given = partial(asked, teacher), lambda batch: stored[batch.epoch - 1, batch.index]
    epochs = [taught(*one, ready) for one in zip(students, given, strict=True)]
    pairs = in_turn(*epochs, rounds)
    states = [student.state_dict() for student in students]
    return pairs, all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def fitted(steps: int, rounds: int) -> list[tuple[float, float]]:
    """Bare steps of torchvision's ResNet-18 and of the same fitted to 32 × 32 pictures."""
    whole = torchvision.models.resnet18(num_classes=10)
    whole = whole.to(train.fabric().device, memory_format=torch.channels_last)
    cut, preloaded = build(), list(batches(steps)(1))
    optimizers = sgd(whole), sgd(cut)
    return in_turn(
        lambda: bare(whole, optimizers[0], preloaded),
        lambda: bare(cut, optimizers[1], preloaded),
        rounds,
    )


CNN = ["layer1", "layer2", "layer3", "hidden"]  # study 2 links these
LINKS = {"pairwise": torch.diag(torch.tensor([1.0, 1, 1, 0])), "all": torch.full((4, 4), 0.25)}


def student_of(term: str, ready, stored: bool = True):
    """ConvVeryTiny, its optimizer and a loss: the labels' and one of study 2's terms.

    ``term`` is labels, hinton, pairwise or all; with ``stored``, what ConvTiny says of all pictures
    lies in memory, else it runs at every step.
    """
    teacher, student = (
        models.taps(models.small_cnn(name, classes=10, seed=seed), [*CNN, "logits"])
        for seed, name in enumerate(("convtiny", "convverytiny"))
    )
    tapped = train.fabric().setup_module(teacher.eval()).eval()
    with torch.no_grad():
        every = [tapped(batch.images) for batch in ready(1)]
        own = student.eval()(torch.zeros(1, 3, 32, 32))
    said = {name: torch.cat([one[name] for one in every]) for name in every[0]}

    def given(batch):
        if stored:
            return {name: values[batch.index] for name, values in said.items()}
        with torch.no_grad():
            return tapped(batch.images)

    parts = {"student": student.train()}
    if term in LINKS:
        own, first = ({name: taps[name] for name in CNN} for taps in (own, said))
        parts["vid"] = losses.VID(student=own, teacher=first, weights=LINKS[term])
    networks = torch.nn.ModuleDict(parts).to(train.fabric().device)

    def loss(networks, batch):
        taps = networks["student"](batch.images)
        task = F.cross_entropy(taps["logits"], batch.labels)
        if term == "labels":
            return task
        if term == "hinton":
            return losses.balanced(task, losses.kd(taps["logits"], given(batch)["logits"]), 0.5)
        return losses.balanced(task, networks["vid"](taps, given(batch)), 0.5)

    return networks, torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True), loss


def terms(one: dict, other: dict, steps: int, rounds: int) -> list[tuple[float, float]]:
    """Bare steps of ConvVeryTiny with one term and with another; see :func:`student_of`."""
    ready = batches(steps)
    preloaded = list(ready(1))
    both = [student_of(ready=ready, **options) for options in (one, other)]
    runs = [lambda n=n, o=o, t=t: bare(n, o, preloaded, t) for n, o, t in both]
    return in_turn(*runs, rounds)


def geometry(steps: int, rounds: int) -> list[tuple[float, float]]:
    """Bare steps with the classes and the batch of study 5's paper, without and with its term.

    Both read what a teacher says of the batch. ResNet-18 has its own stem, fitted: with the small
    one its steps are longer, and the term's share smaller.
    """
    ready = list(batches(steps, size=64, classes=100)(1))
    networks = [models.Featured(build(classes=100)) for _ in range(2)]
    device, width = train.fabric().device, networks[0].width
    said = torch.rand(64 * steps, 2048, device=device)  # as wide as the features of a ResNet-50

    def loss(network, batch, weight):
        outputs, given = network(batch.images), said[batch.index]
        task = F.cross_entropy(outputs[:, width:], batch.labels)
        if not weight:
            return task
        with torch.autocast(device.type, enabled=False):  # as in the loop: terms in 32 bits
            ours = losses.class_centres(outputs[:, :width], batch.labels)
            theirs = losses.class_centres(given, batch.labels)
            return task + weight * losses.geometric(ours, theirs)

    def steps_with(network, weight):
        optimizer = sgd(network)
        return lambda: bare(network, optimizer, ready, partial(loss, weight=weight))

    return in_turn(steps_with(networks[0], 0), steps_with(networks[1], 30), rounds)


def worker(steps: int) -> None:
    """Trains an epoch for every line it is sent, and answers when it is done."""
    network, preloaded = build(), list(batches(steps)(1))
    optimizer = sgd(network)
    print("ready", flush=True)
    for _ in sys.stdin:
        bare(network, optimizer, preloaded)
        print("done", flush=True)


def processes(steps: int, rounds: int) -> list[tuple[float, float]]:
    """Two processes of one thread that train at once; one process of two threads, twice."""

    def start(threads):
        command = [sys.executable, __file__, "--threads", str(threads), "--worker", str(steps)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8")
        process.stdout.readline()
        return process

    def epoch(several):
        for process in several:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in several:
            process.stdout.readline()

    single, double = [start(1), start(1)], [start(2)]
    try:
        return in_turn(lambda: [epoch(double), epoch(double)], lambda: epoch(single), rounds)
    finally:
        for process in single + double:
            process.stdin.close()
            process.wait()


def short_training(run, trial, steps):
    """A run as studies have them: a small network, trained for some seconds."""
    network, preloaded = build(**SMALL), list(batches(10)(1))
    optimizer = sgd(network)
    for _ in range(steps // 10):
        bare(network, optimizer, preloaded)
    return {"weight": float(next(network.parameters()).detach().sum())}


def dask_workers(steps: int, count: int, rounds: int) -> list[tuple[float, float]]:
    """Runs spread by ``Study.map`` over one Dask worker of one thread, and over two."""
    from dask.distributed import LocalCluster

    trials = itertools.count()

    def spread(cluster, steps):
        study = Study("bench", scale="smoke", engine=cluster.scheduler_address)
        fresh = [next(trials) for _ in range(count)]
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            study.map(study.run(short_training), grid(trial=fresh, steps=steps))

    def with_workers(n):  # a cluster that only waits would take its share of a full machine
        options = dict(threads_per_worker=1, dashboard_address=None)
        with LocalCluster(n_workers=n, **options) as cluster:
            spread(cluster, 10)  # imports PyTorch
            return seconds(lambda: spread(cluster, steps))

    return [(with_workers(1), with_workers(2)) for _ in range(rounds)]


KD = dict(temperature=2.0, alpha=0.25)  # the tutorial's; alpha is the teacher's share
KD_PAIRS = {  # teacher and student (resnet32x4 with a wider stem), and steps an epoch
    "resnet32x4 to resnet8x4": (partial(models.cifar_resnet, width=64), (32, 8), 4),
    "ConvTiny to ConvVeryTiny": (models.small_cnn, ("convtiny", "convverytiny"), 60),
}
# The batch is torchdistill's (configs/sample/cifar100/kd), the workers are the tutorial's, but
# kept: to start them anew for each short epoch would count against the rivals.
LOADER = dict(batch_size=64, num_workers=2, persistent_workers=True)


class Pictures(torchvision.datasets.CIFAR10):
    """The pictures of batches, unaugmented, read as torchvision reads CIFAR-10's."""

    def __init__(self, ready: data.Batches, *augmentation):
        of, (mean, deviation) = torchvision.transforms, STATISTICS
        last = of.ToTensor(), of.Normalize(mean / 255, deviation / 255)
        self.transform, self.target_transform = of.Compose([*augmentation, *last]), None
        inner = ready.windows[0, :, ready.pad, ready.pad].unflatten(2, (-1, 3))
        self.data, self.targets = inner.cpu().numpy(), ready.labels.tolist()


def tutorial(teacher, student, dataset):
    """Loss and an epoch of PyTorch's Knowledge Distillation Tutorial, to be called.

    (pytorch/tutorials, beginner_source/knowledge_distillation_tutorial.py at c53e7d4; at 035c541
    the soft term was the cross-entropy, larger by what the student cannot change.)
    """
    loader = DataLoader(dataset, shuffle=True, **LOADER)
    optimizer, device = torch.optim.SGD(student.parameters(), **SGD), train.fabric().device
    heat, share = KD["temperature"], KD["alpha"]

    def loss_of(images, labels):
        with torch.no_grad():
            targets = F.softmax(teacher(images) / heat, dim=-1)
        logits = student(images)
        gap = targets.log() - F.log_softmax(logits / heat, dim=-1)
        soft = (targets * gap).sum() / len(images) * heat**2
        return share * soft + (1 - share) * F.cross_entropy(logits, labels)

    def epoch():
        student.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            loss.item()  # as there, for a line that it prints

    return loss_of, epoch


def torchdistill(teacher, student, dataset):
    """The same by torchdistill, as in its configs/sample/cifar100/kd at 1.1.5.

    An epoch is that of examples/torchvision/image_classification.py.
    """
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger

    # its alpha is the labels' share (losses/mid_level.py, KDLoss)
    kd = dict(temperature=KD["temperature"], alpha=1 - KD["alpha"], reduction="batchmean")
    for who in ("student", "teacher"):
        kd |= {f"{who}_module_path": ".", f"{who}_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    sampler, device = {"class_or_func": RandomSampler, "kwargs": {}}, train.fabric().device
    config = {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "train", "sampler": sampler, "kwargs": LOADER},
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = get_distillation_box(teacher, student, {"train": dataset}, config, device, [], False, 1)

    def epoch():
        log = MetricLogger(delimiter="  ")
        box.pre_epoch_process(epoch=0)
        for images, labels, extra in log.log_every(box.train_data_loader, 100, "Epoch: [0]"):
            started = time.time()
            images, labels = images.to(device), labels.to(device)
            loss = box.forward_process(images, labels, extra)
            box.post_forward_process(loss=loss)
            log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            log.meters["img/s"].update(len(images) / (time.time() - started))
        box.post_epoch_process()

    return partial(box.forward_process, supp_dict={}), epoch


def rivals(row, pair: str, quick: bool) -> None:
    """Rows on one distillation by others' loops and ours; storing outputs is not counted.

    All have the same networks in our memory layout, and SGD, though the tutorial has Adam. Only
    ours is fused, and the others compute in 32 bits: as in their examples.
    """
    make, names, steps = KD_PAIRS[pair]
    steps, rounds = (max(2, steps // 5), 3) if quick else (steps, 9)
    fabric, ready = train.fabric(), batches(steps, LOADER["batch_size"], classes=100)
    options = dict(accelerator=fabric.device.type, devices=1, precision="32-true")

    def fresh():
        networks = (make(name, classes=100, seed=seed) for seed, name in enumerate(names))
        teacher, student = (network.to(fabric.device) for network in networks)
        return teacher.eval(), student  # torchdistill would leave the teacher in training mode

    def ours(fabric, said=None):
        teacher, student = fresh()
        said = said or partial(asked, fabric.setup_module(teacher).eval())
        epoch = taught(student, said, ready, **KD)

        def with_fabric():
            with mock.patch.object(train, "fabric", return_value=fabric):
                epoch()

        return with_fabric

    with tempfile.TemporaryDirectory() as folder:
        stored = train.stored_outputs(fresh()[0], ready, 1, Path(folder))
    own = {
        "ours in 32 bits": ours(lightning_fabric.Fabric(**options)),
        "ours": ours(fabric),
        "ours, outputs read": ours(fabric, lambda batch: stored[batch.epoch - 1, batch.index]),
    }
    other = {"tutorial": tutorial(*fresh(), Pictures(ready))}
    if find_spec("torchdistill"):
        of = torchvision.transforms
        cropped = Pictures(ready, of.RandomCrop(32, padding=4), of.RandomHorizontalFlip())
        other["torchdistill"] = torchdistill(*fresh(), cropped)
    batch, (teacher, student) = next(iter(ready(1))), fresh()
    found = [losses.distillation(student(batch.images), teacher(batch.images), batch.labels, **KD)]
    found += [loss(batch.images, batch.labels) for loss, _ in other.values()]
    found = [value.item() for value in found]
    assert max(found) - min(found) < 1e-5, f"not the same loss, so not the same work: {found}"
    runs = own | {name: epoch for name, (_, epoch) in other.items()}
    times = [[seconds(run) for run in runs.values()] for _ in range(1 + rounds)][1:]
    times = dict(zip(runs, zip(*times, strict=True), strict=True))
    print(where := f"{pair}, batch {LOADER['batch_size']}")
    for name, mine in itertools.product(other, own):
        row(f"  {name}, {mine}", [*zip(times[name], times[mine], strict=True)], steps, where=where)


def loop_rows(row, quick: bool, with_processes: bool) -> bool:
    """The rows on the loop itself; whether the students of :func:`cached_teacher` are the same."""
    few, rounds = (4, 5) if quick else (12, 9)
    many = 50 if quick else 150  # steps of a small network: an epoch is not too short
    row("ResNet-18: bare steps, the loop", loop({}, few, rounds), few, 0.97)
    row("small CNN: bare steps, the loop", loop(SMALL, many, rounds), many, 0.90)
    pairs, same = cached_teacher(few, rounds)
    row("ResNet-34 teaches: computed, outputs read", pairs, few, 1.4)
    print(f"    the two students are {'the same bits' if same else 'NOT the same: missed'}")
    row("ResNet-18: torchvision's, fitted to 32 × 32", fitted(few, rounds), few)
    pairs = geometry(few, 2 * rounds)  # the goal is close: twice the rounds
    row("ResNet-18, batch 64: labels, and geometry", pairs, few, 1 / 1.03)
    few, plain = max(4, many // 5), {"term": "labels"}
    for term, goal in {"hinton": None, "pairwise": 1 / 2.5, "all": 1 / 4}.items():
        pairs = terms(plain, {"term": term}, few, rounds)
        row(f"ConvVeryTiny: labels, {term} from ConvTiny", pairs, few, goal)
    pairs = terms({"term": "all", "stored": False}, {"term": "all"}, few, rounds)
    row("all from ConvTiny: at every step, stored", pairs, few)
    if find_spec("distributed"):
        few, count, turns = (100, 4, 1) if quick else (300, 10, 2)
        free = train.fabric().device.type == "cpu" and os.cpu_count() > 1  # for a second worker
        pairs = dask_workers(few, count, turns)
        row("runs by Dask: 1 worker, 2 workers", pairs, few * count, 1.7 if free else None)
    else:
        print("runs by Dask: not measured, needs the extra `cluster`")
    if with_processes:
        few = 4 if quick else 12
        row("a batch: 1 × 2 threads, 2 × 1", processes(few, rounds), 2 * few)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--threads", type=int, default=1, help="default: 1, as a study's runs")
    parser.add_argument("--processes", action="store_true", help="also 2 × 1 against 1 × 2 threads")
    parser.add_argument("--rivals", action="store_true", help="others' loops and nothing else")
    parser.add_argument("--out", type=Path, help="keep the outcome here, as JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        worker(options.worker)
        return 0

    where = train.device_description()
    print(f"{where['device']}, {where['precision']}, {where['threads']} threads, batch {BATCH}")
    print(f"{'':48}{'ms a step':>17}{'ratio':>8}{'goal':>8}")
    missed, rows = False, []

    def row(what, pairs, steps, goal=None, where=""):
        nonlocal missed
        ratio = quotient(pairs)
        short = goal is not None and ratio < goal
        missed |= short
        wanted = f"≥ {goal:.2f}" if goal else ""
        line = f"{what:48}{milliseconds(pairs, steps)}{ratio:8.3f}{wanted:>8}"
        print(line + ("  missed" if short else ""), flush=True)
        quotients = [a / b for a, b in pairs]
        found = {"median": ratio, "range": [min(quotients), max(quotients)], "goal": goal}
        found |= {"steps": steps, "quotients": quotients, "seconds": pairs}
        rows.append({"networks": where, "what": what.strip(), **found})

    same = options.rivals or loop_rows(row, options.quick, options.processes)
    for pair in KD_PAIRS:
        rivals(row, pair, options.quick)
    if not find_spec("torchdistill"):
        print("torchdistill: not measured, needs the extra `bench`")
    if options.out:
        told = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": records.commit()}
        told |= {"cores": os.cpu_count(), **records.made_with(where), "rows": rows}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told["versions"]["torchdistill"] = importlib.metadata.version("torchdistill")
        files.write(options.out, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return int(missed or not same)


if __name__ == "__main__":
    sys.exit(main())
