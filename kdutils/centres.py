"""Class centres of more than a plain batch: batches of few classes, and a memory of features."""

import numpy as np
import torch
import torch.nn.functional as F

from kdutils import data


class Balanced(data.Batches):
    """Batches of ``classes`` classes with ``pictures`` pictures of each; else as :class:`Batches`.

    In an epoch every class is shuffled and cut into groups of ``pictures``, and every batch takes a
    group of each of the classes with most groups left; which of those that are level is drawn. No
    batch holds a class or a picture twice, and no epoch a picture twice. What fills no group or no
    batch is left out; as everything is drawn anew each epoch, all pictures are seen in time. The
    order depends on (seed, epoch, labels) alone, so an interrupted run continues bit for bit.

    A picture's view is the one that :class:`Batches` of the same seed shows in that epoch. So what
    a teacher is asked beforehand is asked through those, which hold all pictures.
    ``rest`` is as there, less ``batch_size`` and ``shuffle``.
    Raises ValueError for more classes than there are or a class of fewer pictures than asked for.
    """

    def __init__(self, images, labels, *, classes: int, pictures: int, **rest):
        names, counts = np.unique(labels, return_counts=True)
        if not 1 <= classes <= len(names):
            raise ValueError(f"classes is {classes}; it must be from 1 to all {len(names)}")
        few = counts.argmin()
        if not 1 <= pictures <= counts[few]:
            most = f"{counts[few]}, as many as class {names[few]} has"
            raise ValueError(f"pictures is {pictures}; it must be from 1 to {most}")
        super().__init__(images, labels, batch_size=classes * pictures, shuffle=True, **rest)
        self.classes, self.pictures = classes, pictures

    def __len__(self) -> int:
        """Batches in an epoch, each of the same size."""
        return len(self.order(1)) // self.batch_size

    def identity(self) -> str:
        return f"{super().identity()} by {self.classes} classes"

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's indices, batch by batch and in a batch class by class."""
        _, members, counts = np.unique(
            self.labels.cpu().numpy(), return_inverse=True, return_counts=True
        )
        starts, left = np.cumsum(counts) - counts, counts // self.pictures
        most = left.sum() // self.classes
        draws = data._random(self.seed, epoch, 0, len(members) + most * len(left))
        shuffled = np.lexsort([draws[: len(members)], members])  # class by class
        batches = []
        for ties in draws[len(members) :].reshape(most, -1):
            chosen = np.lexsort([ties, -left])[: self.classes]
            if left[chosen[-1]] == 0:
                break
            left[chosen] -= 1
            first = starts[chosen] + left[chosen] * self.pictures
            batches.append(shuffled[first[:, None] + np.arange(self.pictures)].ravel())
        return np.concatenate(batches)


class RememberedCentres(torch.nn.Module):
    """Class centres over the latest ``size`` pictures; call as :func:`losses.class_centres`.

    With ``size`` = the number of training pictures, centres are means over (almost) all pictures
    of a class, as the network saw each when it last came, and not as it would see it now. Older
    features are forgotten, picture by picture. The gradient runs through the present batch alone,
    so it is smaller by the batch's share in the remembered pictures of a class. Returns centres
    (C, D) and the mask of the classes **remembered**, not only of those in the batch.

    Stores nothing in eval mode, where a batch still counts for its own centres. As a part of the
    network that is trained, it is saved and resumed with it. Sums are kept in double precision,
    since features are added to them and taken away again.
    Raises ValueError when a batch has more than ``size`` pictures or the width is not ``width``.
    """

    def __init__(self, classes: int, width: int, size: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), classes))  # that is: nothing here yet
        self.register_buffer("sums", torch.zeros(classes, width, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("met", torch.zeros((), dtype=torch.int64))  # pictures so far

    def forward(self, features, labels):
        (size, width), classes = self.features.shape, len(self.counts)
        if len(features) > size:
            raise ValueError(f"a batch has {len(features)} pictures, the memory holds {size}")
        if (found := features.shape[1]) != width:
            raise ValueError(f"features have width {found}, the memory {width}")
        new = features.to(self.features)
        at = (self.met + torch.arange(len(new), device=new.device)) % size  # the oldest
        gone, come = F.one_hot(self.labels[at], classes + 1)[:, :-1], F.one_hot(labels, classes)
        counts = self.counts + (come - gone).sum(0)
        sums = self.sums - gone.T.double() @ self.features[at].double()
        sums = sums + come.T.double() @ new.double()
        if self.training:
            self.sums, self.counts, self.met = sums.detach(), counts, self.met + len(new)
            self.features[at], self.labels[at] = new.detach(), labels
        centres = sums * ((counts > 0) / counts.clamp(min=1))[:, None]
        return centres.to(features), counts > 0
