"""What the training loop costs beside the networks' own arithmetic: ``make bench``.

Every ratio is of two things measured in turn in the same run, as the median over the rounds of
their quotient: what else the machine does then touches both alike. Exits with 1 if a goal is
missed. Pictures are random; no data is needed.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kdutils import Study, data, grid, losses, models, train
from kdutils._torchvision import torchvision

BATCH = 128
STATISTICS = (np.full(3, 125.0), np.full(3, 60.0))
SMALL = dict(name="convnet", widths=(8, 16, 32))  # about 4 ms a step on two threads


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
    options = dict(lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    return torch.optim.SGD(network.parameters(), **options)


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


def cached_teacher(steps: int, rounds: int) -> tuple[list[tuple[float, float]], bool]:
    """Epochs with the teacher computed at every step and with its outputs read; same student?"""
    ready = batches(steps)
    teacher = train.fabric().setup_module(models.build("resnet34", classes=10, seed=2)).eval()
    students = [build(), build()]
    optimizers = [sgd(student) for student in students]

    def computed(network, batch):
        with torch.inference_mode():
            logits = teacher(batch.images)
        return losses.distillation(network(batch.images), logits.clone(), batch.labels)

    def read(network, batch):
        logits = stored[batch.epoch - 1, batch.index]
        return losses.distillation(network(batch.images), logits, batch.labels)

    def epoch(which, loss):
        return lambda: train.fit(
            students[which], ready, loss, epochs=1, optimizer=optimizers[which]
        )

    with tempfile.TemporaryDirectory() as folder:
        train.stored_outputs(teacher, ready, 1, Path(folder))
        stored = train.stored_outputs(teacher, ready, 1, Path(folder))  # from the file
    pairs = in_turn(epoch(0, computed), epoch(1, read), rounds)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--threads", type=int, default=1, help="default: 1, as a study's runs")
    parser.add_argument("--processes", action="store_true", help="also 2 × 1 against 1 × 2 threads")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        worker(options.worker)
        return 0

    few, rounds = (4, 5) if options.quick else (12, 9)
    many = 50 if options.quick else 150  # steps of a small network: an epoch is not too short
    where = train.device_description()
    print(f"{where['device']}, {where['precision']}, {where['threads']} threads, batch {BATCH}")
    print(f"{'':48}{'ms a step':>17}{'ratio':>8}{'goal':>8}")
    missed = False

    def row(what, pairs, steps, goal=None):
        nonlocal missed
        ratio = quotient(pairs)
        short = goal is not None and ratio < goal
        missed |= short
        wanted = f"≥ {goal:.2f}" if goal else ""
        line = f"{what:48}{milliseconds(pairs, steps)}{ratio:8.3f}{wanted:>8}"
        print(line + ("  missed" if short else ""), flush=True)

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
        few, count, turns = (100, 4, 1) if options.quick else (300, 10, 2)
        free = train.fabric().device.type == "cpu" and os.cpu_count() > 1  # for a second worker
        pairs = dask_workers(few, count, turns)
        row("runs by Dask: 1 worker, 2 workers", pairs, few * count, 1.7 if free else None)
    else:
        print("runs by Dask: not measured, needs the extra `cluster`")
    if options.processes:
        few = 4 if options.quick else 12
        row("a batch: 1 × 2 threads, 2 × 1", processes(few, rounds), 2 * few)
    return int(missed or not same)


if __name__ == "__main__":
    sys.exit(main())
