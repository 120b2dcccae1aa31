"""A study that trains in a second or two, for tests: a small network on scikit-learn's digits.

With ``$TINY_KILL_AT`` set to a step, a process kills itself there, as a power cut would.
"""

import os
import signal

from kdutils import Study


def tiny_study(engine="serial", scale="laptop", train=True):
    study = Study("tiny", scale=scale, engine=engine, train=train)

    @study.run
    def network(run, seed, dataset="digits", epochs=3, poison=None):
        import torch
        from torch.nn.functional import cross_entropy

        from kdutils import data, metrics, models, train

        with open(run.folder / "log", "a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        images = data.parts(dataset, validation=200, batch_size=50, seed=seed)
        model = models.build("convnet", classes=10, seed=seed, widths=(8, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
        kill_at, steps = int(os.environ.get("TINY_KILL_AT", -1)), [0]

        def loss(model, batch):
            steps[0] += 1
            if steps[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            value = cross_entropy(model(batch.images), batch.labels)
            return value * float("nan") if [batch.epoch, steps[0]] == poison else value

        def measure(model):
            logits = train.predict(model, images.test)
            found = metrics.classification(logits, images.test.labels)
            return {f"test_{k}": v for k, v in found.items()}

        history = train.fit(
            model,
            images.train,
            loss,
            epochs=epochs,
            optimizer=optimizer,
            schedule=schedule,
            folder=run.folder,
            snapshots=[1, epochs],
            measure=measure,
        )
        return {"history": history}

    return study, network


def alone(seed: int, environment: dict[str, str]) -> None:
    """Train one run, as a process of its own."""
    os.environ |= environment
    tiny_study()[1](seed=seed)
