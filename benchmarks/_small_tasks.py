"""What `benchmarks.quality_kinds` trains: tasks of seconds, with so few data that dropout helps.

The settings were found with plain torch, none against Bernoulli: each docstring says what made
the difference. Classifiers get random labels: a share of the training set keeps the same wrong
ones, and a model without dropout learns these by heart, as it does texts that are short. All tasks
are judged after their last step, since a model that is stopped at its best needs less of any
regularisation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._tasks import Batch, Task, characters, mnist_images, shuffled, words
from torch import Tensor, nn

LABELS = 10
TEST = 3000


# ---- models ------------------------------------------------------------------------------


def mlp(p: float, width: int = 512) -> nn.Module:
    """Drops a part of the input as well, at most a fifth (Srivastava et al. 2014)."""
    return nn.Sequential(
        nn.Dropout(min(p, 0.2)),
        nn.Linear(784, width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(width, LABELS),
    )  # fmt: skip


class Encoder(nn.Module):
    """torch's encoder over the rows of an image. Shapes: b batch, t tokens, f pixels, d width."""

    def __init__(self, tokens: int, pixels: int, p: float, width: int = 64) -> None:
        super().__init__()
        self.tokens = tokens
        self.embed = nn.Linear(pixels, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.drop = nn.Dropout(p)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, p, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, LABELS)

    def forward(self, x_bn: Tensor) -> Tensor:
        x_btf = x_bn.unflatten(1, (self.tokens, -1))
        h_btd: Tensor = self.drop(self.embed(x_btf) + self.place)
        for block in self.blocks:
            h_btd = block(h_btd)
        logits: Tensor = self.head(h_btd.mean(1))
        return logits


class DropPath(nn.Module):
    """Drops whole samples of a branch (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_btd: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x_btd
        kept = x_btd.new_empty(x_btd.shape[0], 1, 1).bernoulli_(1 - self.p)
        return x_btd * kept / (1 - self.p)


class VisionBlock(nn.Module):
    """A pre-norm block, attention written out. Shapes: h heads, t and s tokens, e head width."""

    def __init__(self, width: int, p: float, path: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop, self.path = nn.Dropout(p), DropPath(path)

    def attention(self, x_btd: Tensor) -> Tensor:
        q_bhte, k_bhse, v_bhse = self.qkv(x_btd).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        scores_bhts = q_bhte @ k_bhse.transpose(2, 3) / q_bhte.shape[3] ** 0.5
        h_bhte = self.drop(scores_bhts.softmax(3)) @ v_bhse
        out_btd: Tensor = self.out(h_bhte.transpose(1, 2).flatten(2))
        return out_btd

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = x_btd + self.path(self.drop(self.attention(self.norm_1(x_btd))))
        hidden = self.drop(F.gelu(self.up(self.norm_2(x_btd))))
        y_btd: Tensor = x_btd + self.path(self.drop(self.down(hidden)))
        return y_btd


class VisionModel(nn.Module):
    """A small ViT over bands of four rows of MNIST, mean-pooled."""

    def __init__(self, p: float, path: float, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Linear(112, width)
        self.place = nn.Parameter(0.02 * torch.randn(7, width))
        self.drop = nn.Dropout(p)
        self.blocks = nn.ModuleList(VisionBlock(width, p, path) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LABELS)

    def forward(self, x_bn: Tensor) -> Tensor:
        h_btd = self.drop(self.embed(x_bn.unflatten(1, (7, 112))) + self.place)
        for block in self.blocks:
            h_btd = block(h_btd)
        logits: Tensor = self.head(self.norm(h_btd).mean(1))
        return logits


class ConvModel(nn.Module):
    """Three convolutions with `Dropout2d` after each; the last two may have a skip around them."""

    def __init__(self, p: float, *, skips: bool, channels: int = 16) -> None:
        super().__init__()
        self.skips = skips
        self.first = nn.Conv2d(1, channels, 5, stride=2, padding=2)
        self.others = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.drop = nn.Dropout2d(p)
        self.head = nn.Linear(49 * channels, LABELS)

    def forward(self, x_bn: Tensor) -> Tensor:
        h = F.max_pool2d(self.drop(F.relu(self.first(x_bn.view(-1, 1, 28, 28)))), 2)
        for conv in self.others:
            branch = self.drop(F.relu(conv(h)))
            h = h + branch if self.skips else branch
        logits: Tensor = self.head(h.flatten(1))
        return logits


class DropConnect(nn.Linear):
    """A linear layer that drops its weight (Wan et al. 2013)."""

    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__(inputs, outputs)
        self.p = p

    def forward(self, x_bn: Tensor) -> Tensor:
        return F.linear(x_bn, F.dropout(self.weight, self.p, self.training), self.bias)


def weights_model(p: float, width: int = 512) -> nn.Module:
    """Drops the weights of both hidden layers."""
    return nn.Sequential(
        DropConnect(784, width, p), nn.ReLU(),
        DropConnect(width, width, p), nn.ReLU(),
        nn.Linear(width, LABELS),
    )  # fmt: skip


# ---- tasks -------------------------------------------------------------------------------


def adamw(learning_rate: float, decay: float = 0.01) -> Callable[[nn.Module], torch.optim.AdamW]:
    return lambda model: torch.optim.AdamW(
        model.parameters(), learning_rate, weight_decay=decay, fused=True
    )


def wrong_labels(y: Tensor, share: float, labels: int = LABELS) -> Tensor:
    """Returns the labels with a share of them, always the same ones, drawn again at random."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(labels, y.shape, generator=generator)
    return torch.where(torch.rand(y.shape, generator=generator) < share, drawn, y)


def few_images(folder: Path, images: int, wrong: float = 0.0) -> tuple[Batch, Batch]:
    """Returns images to train on, a share of them labelled wrong, and 3,000 to test on."""
    x, y = mnist_images(folder)
    return (x[:images], wrong_labels(y[:images], wrong)), (x[-TEST:], y[-TEST:])


def digits(images: int) -> tuple[Batch, Batch]:
    """Returns images of 8 x 8 to train on, and all others of sklearn's digits to test on."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:images], y[:images]), (x[images:], y[images:])


@dataclasses.dataclass(frozen=True)
class Tuning(Task):
    """A task that starts from a trained model: a seed gives a new head."""

    trained: Callable[[], dict[str, Tensor]] = dict
    """Returns the weights of all but the head."""

    def renew(self, model: nn.Module, p: float, seed: int) -> None:
        trained = self.trained()
        super().renew(model, p, seed)
        model.load_state_dict(trained, strict=False)


def pretrained(
    build: Callable[[float], nn.Module], data: Batch, steps: int, learning_rate: float
) -> Callable[[], dict[str, Tensor]]:
    """Returns what trains a model once, without dropout, and keeps all but its head."""

    @functools.cache
    def trained() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build(0.0)
        optimizer = adamw(learning_rate)(model)
        for x, y in itertools.islice(shuffled(data, 50)(0), steps):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        state = model.state_dict()
        return {name: w for name, w in state.items() if not name.startswith("head")}

    return trained


def classifier(
    name: str,
    build: Callable[[float], nn.Module],
    data: tuple[Batch, Batch],
    *,
    epochs: int,
    learning_rate: float,
    batch: int = 50,
) -> Task:
    """Returns a task on images."""
    train, test = data
    steps = epochs * (len(train[0]) // batch)
    batches = shuffled(train, batch)
    return Task(name, "accuracy %", build, batches, test, steps, adamw(learning_rate))


def mlp_task(folder: Path) -> Task:
    """300 images, three tenths of them with random labels, 30 epochs.

    With right labels no dropout is as good as a tenth of it, and 0.8 points worse than a half; what
    is fitted of wrong ones costs the more, the less is dropped.
    """
    data = few_images(folder, 300, wrong=0.3)
    return classifier("MLP", mlp, data, epochs=30, learning_rate=1e-3)


def weights_task(folder: Path) -> Task:
    """As `mlp_task`, with weights dropped in place of features."""
    data = few_images(folder, 300, wrong=0.3)
    return classifier("DropConnect", weights_model, data, epochs=30, learning_rate=1e-3)


def encoder_task() -> Task:
    """torch's encoder on 300 digits of 8 rows, four tenths with random labels, 40 epochs.

    With right labels (128 wide, post-norm) no dropout is the best: dropout on every branch and on
    the embedding then costs more in steps than it gains.
    """
    (x, y), test = digits(300)

    def build(p: float) -> nn.Module:
        return Encoder(8, 8, p)

    data = (x, wrong_labels(y, 0.4)), test
    return classifier("encoder", build, data, epochs=40, learning_rate=2e-3)


def vision_task(folder: Path) -> Task:
    """A ViT on 300 images, four tenths with random labels, 40 epochs.

    Drop path is at a tenth on all sides, none included, and stays random whatever the masks. At
    30 epochs, 64 wide and 14 tokens a rate of 0.3 gains nothing yet; at 0.5, what it gains here is
    within the noise.
    """
    data = few_images(folder, 300, wrong=0.4)

    def build(p: float) -> nn.Module:
        return VisionModel(p, path=0.1)

    return classifier("ViT with drop path", build, data, epochs=40, learning_rate=2e-3)


def convolutions_task(folder: Path, *, skips: bool) -> Task:
    """Three convolutions on 400 images, four tenths with random labels, 25 epochs.

    With two tenths, 20 epochs and half the learning rate no dropout was 0.7 to 9 points better.
    """
    data = few_images(folder, 400, wrong=0.4)

    def build(p: float) -> nn.Module:
        return ConvModel(p, skips=skips)

    name = "CNN with skips" if skips else "CNN"
    return classifier(name, build, data, epochs=25, learning_rate=4e-3)


def tuning_task(folder: Path) -> Task:
    """An encoder that knows the digits 0 to 4 from 2,000 images learns 5 to 9 from 200.

    It is trained first without dropout, once for all sides and seeds; a seed gives the new head.
    Three tenths of the 200 have random labels, for the reason that `mlp_task` gives.
    """
    x, y = mnist_images(folder)
    old, new = y < 5, y >= 5
    x_new, y_new = x[new], y[new] - 5
    train = x_new[:200], wrong_labels(y_new[:200], 0.3, labels=5)

    def build(p: float) -> nn.Module:
        return Encoder(7, 112, p)

    trained = pretrained(build, (x[old][:2000], y[old][:2000]), steps=200, learning_rate=2e-3)
    data = train, (x_new[-TEST:], y_new[-TEST:])
    task = classifier("tuned encoder", build, data, epochs=40, learning_rate=1e-3)
    fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    return Tuning(**fields, trained=trained)


def characters_task(text: Path) -> Task:
    """A transformer on 5,000 characters, seen 20 times."""
    task = characters(text, 200, 5_000, width=64, length=32, batch=16)
    return dataclasses.replace(task, optimizer=adamw(1e-2))


def words_task(train: Path, valid: Path) -> Task:
    """Two LSTMs of 128 units on 5,000 words, 1,000 told apart, in 600 steps of 700 words.

    With 10,000 words, or at less than half the learning rate, no side has begun to overfit when it
    ends, and with 3,000 all sides have: there dropout is 0.05 nats worse than none.
    """
    task = words(train, valid, 600, 5_000, known=1_000, units=128)
    return dataclasses.replace(task, optimizer=adamw(1e-2))


def small_tasks(
    images: Path | None, text: Path | None, texts: Sequence[Path] | None
) -> dict[str, Callable[[], Task]]:
    """Returns the tasks that there are data for, by the name on the command line."""
    tasks: dict[str, Callable[[], Task]] = {"encoder": encoder_task}
    if images is not None:
        tasks["mlp"] = functools.partial(mlp_task, images)
        tasks["weights"] = functools.partial(weights_task, images)
        tasks["vit"] = functools.partial(vision_task, images)
        tasks["tuned"] = functools.partial(tuning_task, images)
        tasks["cnn"] = functools.partial(convolutions_task, images, skips=False)
        tasks["cnn-skips"] = functools.partial(convolutions_task, images, skips=True)
    if text is not None:
        tasks["characters"] = functools.partial(characters_task, text)
    if texts is not None:
        tasks["words"] = functools.partial(words_task, *texts)
    return tasks
