"""The one training loop, and what is read off a network: logits, snapshots, stored outputs."""

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path

import lightning_fabric
import safetensors.torch as st
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kdutils import files, metrics
from kdutils.data import Batch, Batches, Parts


class Diverged(RuntimeError):
    """A number was not finite; ``epoch`` and ``step`` (both from 1) say where, ``what`` which."""

    def __init__(self, epoch: int, step: int, what: str = "loss"):
        super().__init__(f"the {what} is not finite in epoch {epoch}, step {step}")
        self.epoch, self.step, self.what = epoch, step, what

    def __reduce__(self):  # an exception of three arguments must say how it crosses processes
        return Diverged, (self.epoch, self.step, self.what)


@cache
def fabric() -> lightning_fabric.Fabric:
    """The device and precision in use: bf16 autocast where the processor has it, else float32."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a build without oneDNN has no such operator
        bf16 = torch.backends.mkldnn.is_available() and (
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    precision = "bf16-mixed" if bf16 else "32-true"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return lightning_fabric.Fabric(accelerator=accelerator, devices=1, precision=precision)


def device_description() -> dict[str, str]:
    """Device, precision and thread count, for a run's record."""
    device = fabric().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    precision = fabric()._precision.precision
    return {"device": name, "precision": precision, "threads": torch.get_num_threads()}


def fit(
    network: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    folder: Path | None = None,
    snapshots: Collection[int] = (),
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict]:
    """Train ``network`` in place and return its history, one row an epoch.

    ``loss(network, batch)`` returns the batch's mean loss; ``measure(network)`` returns what the
    row keeps beside epoch, loss, lr and seconds. With a ``folder``, the state is kept there after
    every epoch, and a call that finds it goes on from there to the same bits; the weights after
    each epoch k in ``snapshots`` are kept as ``e<k>.safetensors``. ``progress`` wraps the epochs.
    All that the optimizer trains has to be a part of ``network``, or it begins anew on resuming.
    torch's global seed is set at every epoch, and all of ``network`` is in train mode. A folder (a
    Path) is one training's: another network or loss in it would get the first one's history.
    Without one no snapshot is kept.
    Raises :class:`Diverged` after the first epoch with a loss or a measured number that is not
    finite.
    """
    model, steps = fabric().setup(network, optimizer)
    history = _resume(network, optimizer, schedule, folder, snapshots) if folder else []
    for epoch in progress(range(len(history) + 1, epochs + 1)):
        started = time.perf_counter()
        torch.manual_seed(1_000_003 * batches.seed + epoch)  # dropout's draws, resumable
        network.train()
        losses = torch.empty(len(batches), device=fabric().device)
        for step, batch in enumerate(batches(epoch)):
            value = loss(model, batch)
            steps.zero_grad()
            fabric().backward(value)
            steps.step()
            losses[step] = value.detach()
        broken = torch.nonzero(~torch.isfinite(losses))
        if len(broken):
            raise Diverged(epoch, int(broken[0]) + 1)
        row = {"epoch": epoch, "loss": float(losses.mean()), "lr": optimizer.param_groups[0]["lr"]}
        if schedule:
            schedule.step()
        if measure:
            found = measure(model)
            for name, value in found.items():
                if not math.isfinite(value):
                    raise Diverged(epoch, len(batches), name)
            row |= found
        history.append(row | {"seconds": round(time.perf_counter() - started, 3)})
        if folder:
            if epoch in snapshots:
                save_weights(network, folder / f"e{epoch}.safetensors")
            _save_state(network, optimizer, schedule, history, folder)
    return history


def fit_classifier(
    network: nn.Module,
    images: Parts,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    also: Callable[[torch.Tensor], dict[str, float]] = lambda logits: {},
    **rest,
) -> list[dict]:
    """:func:`fit` on ``images.train``, measured after every epoch on held-out and test pictures.

    A row has ``validation_<name>`` and ``test_<name>`` for each measure of
    :func:`metrics.classification`, and what ``also`` makes of the test logits (N, C). ``rest`` goes
    to :func:`fit`.
    """

    def measure(model):
        found = {}
        for part in ("validation", "test"):
            batches = getattr(images, part)
            logits = predict(model, batches)
            measured = metrics.classification(logits, batches.labels)
            found |= {f"{part}_{name}": value for name, value in measured.items()}
        return found | also(logits)

    return fit(network, images.train, loss, measure=measure, **rest)


def _save_state(network, optimizer, schedule, history, folder) -> None:
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    plain = {}  # numbers of the optimizer's state that are no tensors
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if torch.is_tensor(value):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    rest = {"history": history, "groups": state["param_groups"], "plain": plain}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    content = st.save(tensors, metadata={"rest": json.dumps(rest)})
    files.write(Path(folder) / "state.safetensors", content)


def _resume(network, optimizer, schedule, folder, snapshots) -> list[dict]:
    """Load the state kept in ``folder``, if there is a sound one, and return its history."""
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()["rest"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        files.set_aside(path, str(error))
        return []
    history = rest["history"]
    wanted = [f"e{row['epoch']}.safetensors" for row in history if row["epoch"] in snapshots]
    if not all((Path(folder) / name).exists() for name in wanted):
        return []
    state = {int(index): dict(entries) for index, entries in rest["plain"].items()}
    weights = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part == "network":
            weights[name] = tensor
        else:
            index, _, entry = name.partition(".")
            state.setdefault(int(index), {})[entry] = tensor
    network.load_state_dict(weights)
    with warnings.catch_warnings(action="ignore"):  # it expects optimizer steps in between
        for _ in history if schedule else ():
            schedule.step()  # a replay: its own state has keys that JSON cannot give back
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # fused optimizers read memory in order, so its layout must be the parameter's
                entries[key] = torch.empty_like(parameter).copy_(value)
    return history


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the network's weights and buffers as safetensors, whole or not at all."""
    files.write(path, st.save({k: v.contiguous() for k, v in network.state_dict().items()}))


def keras_adam(parameters: Iterable, lr: float, decay: float = 0.0) -> torch.optim.Adam:
    """torch's Adam, stepping as Keras 2 does: at step t from 1 with the rate lr / (1 + d (t − 1)).

    β is 0.9 and 0.999. Keras adds ε = 1e-7 to √v, torch to the larger √v / √(1 − β₂ᵗ), so ε is made
    larger by as much. After a resumption the count of steps goes on.
    (Kingma and Ba 2015, the formula before section 2.1; Biryukova 2020, eq. 9 and 10.)
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=True)
    done = None

    def before(optimizer, *_):
        nonlocal done
        if done is None:  # asked once: on a GPU an answer has to be waited for
            done = int(max((state["step"] for state in optimizer.state.values()), default=0))
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + decay * done)
            group["eps"] = 1e-7 / math.sqrt(1 - 0.999 ** (done + 1))
        done += 1

    optimizer.register_step_pre_hook(before)
    return optimizer


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Fill ``network`` with the weights in ``path`` and return it."""
    network.load_state_dict(st.load_file(path))
    return network


@torch.inference_mode()
def predict(network: nn.Module, batches: Batches, epoch: int = 1) -> torch.Tensor:
    """Logits (N, C), float32, in the order of the images; the network is left in eval mode.

    The network's output must be one tensor, and the batches must show every picture (not
    ``centres.Balanced``). What comes out cannot be trained through.
    ``network`` may come from :func:`fit` or be a plain module; both run at the same precision.
    """
    if not isinstance(network, lightning_fabric.wrappers._FabricModule):
        network = fabric().setup_module(network)
    network.eval()
    out = None
    for batch in batches(epoch):
        logits = network(batch.images)
        if out is None:
            out = logits.new_empty(len(batches.labels), *logits.shape[1:])
        out[batch.index] = logits
    return out


def stored_outputs(teacher: nn.Module, batches: Batches, epochs: int, folder: Path) -> torch.Tensor:
    """The teacher's logits for every view its student will see: (epochs, N, C), float32.

    Views depend on (seed, epoch, index) alone, so they are computed once, in the student's own
    batches (which makes them the same bits as computing them at every step), and kept in
    ``folder`` under a name made of the teacher's weights and the batches' content. Two networks of
    the same weights whose outputs differ (a last layer without weights) need folders of their own.
    """
    digest = hashlib.sha256(batches.identity().encode())
    for value in teacher.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    path = Path(folder) / f"outputs-{digest.hexdigest()[:16]}-{epochs}.safetensors"
    if path.exists():
        try:
            return st.load_file(path)["logits"].to(batches.device)
        except (SafetensorError, KeyError) as error:
            files.set_aside(path, str(error))
    logits = torch.stack([predict(teacher, batches, epoch) for epoch in range(1, epochs + 1)])
    files.write(path, st.save({"logits": logits.cpu().clone()}))
    return logits.clone()
