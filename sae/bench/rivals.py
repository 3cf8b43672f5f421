"""The training steps of other libraries, each made from that library's own trainer with its own defaults.

What a step holds is what the library does between one batch and the next: forward, loss, backward, clipping,
normalisation, dead-latent counters, optimiser, schedule. All get the same activations, in float32, and the same
learning rate; nothing is logged. Beside the step stands what it trains, for `sae.bench.quality`. Rivals are imported
when they are asked for and are no dependency of this package.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor

from sae.bench.dense import DenseStep
from sae.bench.loading import RivalFailed, first_line, load, quiet
from sae.bench.shapes import L1_COEFFICIENT, N_STEPS, Shape, groups
from sae.schedules import learning_rate

Step = Callable[..., object]
"""Is given activations, and targets where there are some."""
Make = Callable[[Shape, float, str, "Settings"], Step]
"""A step from shape, learning rate, device and settings."""


@dataclass(frozen=True)
class Settings:
    """How long a run is that a step belongs to, and what its sparsity costs."""

    n_steps: int = N_STEPS
    l1: float = L1_COEFFICIENT
    """lambda of |e|^2 + lambda * sum |z|."""
    l0_price: float = L1_COEFFICIENT
    """lambda of |e|^2 + lambda * L0."""
    warmups: tuple[int, int] | None = None
    """Steps over which learning rate and penalty rise; None: the library's own, which are those of long runs."""
    decay_steps: int = 0
    """Last steps, over which the learning rate falls; no library does so by default."""
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """A step, and what it trains."""

    step: Step
    dictionary: Callable[[], Tensor]
    """W_dec [d_sae, d_out] as it is now."""
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Codes [batch, d_sae] and x_hat, as its inference gives them."""

    def __call__(self, *parts: Tensor) -> object:
        return self.step(*parts)


@dataclass(frozen=True)
class Rival:
    """Another library."""

    name: str
    """What it is installed as."""
    steps: Mapping[str, Make]
    """How a step of each kind is made."""
    precision: str = "highest"
    """What its own training loop sets `torch.set_float32_matmul_precision` to."""
    device: str | None = None
    """The kind of device that it takes part on; None: any."""

    def races(self, kind: str, device: str) -> bool:
        """Whether it takes part."""
        return kind in self.steps and self.device in (None, torch.device(device).type)

    @property
    def version(self) -> str | None:
        """The installed one."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def step(self, kind: str, shape: Shape, lr: float, device: str, settings: Settings = Settings()) -> Step:
        """A training step at its beginning.

        Raises:
            RivalFailed: the library is not installed, or does not work here; the message says why in one line.
        """
        torch.manual_seed(settings.seed)
        try:
            with quiet():
                return self.steps[kind](shape, lr, device, settings)
        except Exception as error:
            raise RivalFailed(f"{self.name} is left out: {first_line(error)}") from error


def dictionary_learning(kind: str, shape: Shape, lr: float, device: str, settings: Settings) -> Training:
    """`update` of its trainer classes, as `trainSAE` calls it."""
    fractions = [m / shape.d_sae for m in groups(shape)]
    penalised: dict[str, Any] = {}
    if settings.warmups is not None:
        penalised["sparsity_warmup_steps"] = settings.warmups[1]
    l1 = penalised | {"l1_penalty": settings.l1}
    p_annealing = penalised | {"initial_sparsity_penalty": settings.l1}
    if settings.n_steps < N_STEPS:
        # Its default, of a run of N_STEPS; and it divides by a p_end of 0, its default, near the end of a run.
        p_annealing |= {"anneal_start": 15_000 * settings.n_steps // N_STEPS, "p_end": 0.2}
    trainers: dict[str, tuple[str, str, dict[str, Any]]] = {
        "topk": ("top_k", "TopKTrainer", {"k": shape.k}),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer", {"k": shape.k}),
        "relu": ("standard", "StandardTrainer", l1),
        "gated": ("gdm", "GatedSAETrainer", l1),
        "jumprelu": ("jumprelu", "JumpReluTrainer", penalised | {"target_l0": float(shape.k)}),
        "p_annealing": ("p_anneal", "PAnnealTrainer", p_annealing),
        "matryoshka": (
            "matryoshka_batch_top_k",
            "MatryoshkaBatchTopKTrainer",
            {"k": shape.k, "group_fractions": fractions},
        ),
    }
    module, name, own = trainers[kind]
    if settings.warmups is not None:
        own = own | {"warmup_steps": settings.warmups[0]}
    if settings.decay_steps:
        own = own | {"decay_start": settings.n_steps - settings.decay_steps}
    trainer = getattr(load(f"dictionary_learning.trainers.{module}"), name)(
        steps=settings.n_steps,
        activation_dim=shape.d_in,
        dict_size=shape.d_sae,
        layer=0,
        lm_name="none",
        lr=lr,
        seed=settings.seed,
        device=device,
        **own,
    )
    steps = count()

    def dictionary() -> Tensor:
        return trainer.ae.W_dec if hasattr(trainer.ae, "W_dec") else trainer.ae.decoder.weight.T

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = trainer.ae.encode(x)
        return codes, trainer.ae.decode(codes)

    return Training(lambda x: trainer.update(next(steps), x), dictionary, reconstruct)


def sae_lens(kind: str, shape: Shape, lr: float, device: str, settings: Settings) -> Training:
    """What `SAETrainer.fit` does for a batch, by the methods that it offers to other loops; no progress bar."""
    config, trainers = load("sae_lens.config"), load("sae_lens.training.sae_trainer")
    lr_warmup, warmup = settings.warmups or (0, 0)  # its defaults
    l1 = {"l1_coefficient": settings.l1, "l1_warm_up_steps": warmup}
    l0 = {"l0_coefficient": settings.l0_price, "l0_warm_up_steps": warmup}
    classes: dict[str, tuple[str, str, dict[str, Any]]] = {
        "topk": ("topk_sae", "TopKTrainingSAE", {"k": shape.k}),
        "batchtopk": ("batchtopk_sae", "BatchTopKTrainingSAE", {"k": shape.k}),
        "relu": ("standard_sae", "StandardTrainingSAE", l1),
        "gated": ("gated_sae", "GatedTrainingSAE", l1),
        "jumprelu": ("jumprelu_sae", "JumpReLUTrainingSAE", l0),
        "matryoshka": (
            "matryoshka_batchtopk_sae",
            "MatryoshkaBatchTopKTrainingSAE",
            {"k": shape.k, "matryoshka_widths": list(accumulate(groups(shape)))},
        ),
        "matching_pursuit": ("matching_pursuit_sae", "MatchingPursuitTrainingSAE", {"max_iterations": shape.k}),
    }
    module, name, own = classes[kind]
    saes = load(f"sae_lens.saes.{module}")
    sae = getattr(saes, name)(getattr(saes, f"{name}Config")(d_in=shape.d_in, d_sae=shape.d_sae, device=device, **own))
    trainer = trainers.SAETrainer(
        config.SAETrainerConfig(
            total_training_samples=settings.n_steps * shape.batch,
            train_batch_size_samples=shape.batch,
            lr=lr,
            lr_end=lr / 10,  # what its runner's configuration derives; the default schedule is constant
            lr_warm_up_steps=lr_warmup,
            lr_decay_steps=settings.decay_steps,
            device=device,
        ),
        sae,
        data_provider=iter(()),
    )

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind in {"batchtopk", "matryoshka"}:  # they are saved as a JumpReLU with this threshold
            _, scores = sae.encode_with_hidden_pre(x)
            codes = scores * (scores > sae.topk_threshold)
        else:
            codes = sae.encode(x)
        return codes, sae.decode(codes)

    return Training(step, lambda: sae.W_dec, reconstruct)


def sparsify(kind: str, shape: Shape, lr: float, device: str, settings: Settings) -> Training:
    """Its coder, and what `Trainer.fit` with its hook does for a batch: the trainer itself needs a language model.

    sparsify/trainer.py 1.3.3, one process, no accumulation. Left out is what handles tokens: flattening, and the two
    copies that drop excluded ones.
    """
    configs, coders = load("sparsify.config"), load("sparsify.sparse_coder")
    transcode = kind == "transcoder"
    own = configs.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k, transcode=transcode)
    cfg = configs.TrainConfig(sae=own, lr=lr)
    if cfg.optimizer != "signum" or cfg.loss_fn != "fvu":
        raise NotImplementedError(f"its defaults are now {cfg.optimizer} and {cfg.loss_fn}; this step is out of date")
    sae = coders.SparseCoder(shape.d_in, cfg.sae, device, dtype=torch.float32)
    optimizer = load("schedulefree").ScheduleFreeWrapper(
        load("sparsify.sign_sgd").SignSGD([{"params": sae.parameters(), "lr": cfg.lr}]), momentum=0.95
    )
    optimizer.train()
    since_fired = torch.zeros(sae.num_latents, device=device, dtype=torch.long)
    did_fire = torch.zeros(sae.num_latents, device=device, dtype=torch.bool)
    steps = count()

    def step(x: Tensor, target: Tensor | None = None) -> None:
        y = x if target is None else target
        # the hook
        if next(steps) == 0:
            if transcode:
                sae.encoder.bias.data = -x.mean(0) @ sae.encoder.weight.data.T
            sae.b_dec.data = y.mean(0)
        if sae.cfg.normalize_decoder and not transcode:
            sae.set_decoder_norm_to_unit_norm()
        dead_mask = since_fired > cfg.dead_feature_threshold if cfg.auxk_alpha > 0 else None
        total_variance = (y - y.mean(0)).pow(2).sum()
        out = sae(x=x, y=y, dead_mask=dead_mask, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it sums this up even when nothing is logged
        loss = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.div(cfg.grad_acc_steps * cfg.micro_acc_steps).backward()
        # fit
        if sae.cfg.normalize_decoder and not transcode:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[did_fire] = 0
            did_fire.zero_()

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.eval()  # the averaged weights of a schedule-free optimiser
        values, latents, _ = sae.encode(x)
        codes = values.new_zeros(len(x), shape.d_sae).scatter_(1, latents, values)
        return codes, sae.decode(values, latents)

    return Training(step, lambda: sae.W_dec, reconstruct)


def overcomplete(kind: str, shape: Shape, lr: float, device: str, settings: Settings) -> Training:
    """`train_sae` on a loader of one batch, with monitoring off; k of BatchTopK counts a whole batch there."""
    train_sae = load("overcomplete.sae.train").train_sae
    module, name, own = {
        "topk": ("topk_sae", "TopKSAE", {"top_k": shape.k}),
        "batchtopk": ("batchtopk_sae", "BatchTopKSAE", {"top_k": shape.k * shape.batch}),
        "relu": ("base", "SAE", {}),
        "jumprelu": ("jump_sae", "JumpSAE", {}),
        "matching_pursuit": ("mp_sae", "MpSAE", {"k": shape.k}),
    }[kind]
    sae = getattr(load(f"overcomplete.sae.{module}"), name)(shape.d_in, shape.d_sae, device=device, **own)

    def criterion(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()  # its README's

    if kind in ("relu", "jumprelu"):
        # It takes the mean of the squared error over batch and d_in, and the sum of |z| over both.
        penalty = settings.l1 / (shape.batch * shape.d_in)
        criterion = partial(load("overcomplete.sae.losses").mse_l1, penalty=penalty)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    warmup, decay = (settings.warmups or (0, 0))[0], settings.decay_steps
    scheduler = None
    if warmup or decay:
        shares = partial(learning_rate, n_steps=settings.n_steps, peak=1.0, warmup_steps=warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(shares, decay_fraction=decay / settings.n_steps)
        )

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        _, codes = sae.encode(x)
        return codes, sae.decode(codes)

    return Training(
        lambda x: train_sae(sae, [x], criterion, optimizer, scheduler, nb_epochs=1, monitoring=0, device=device),
        sae.get_dictionary,
        reconstruct,
    )


def dense_torch(kind: str, shape: Shape, lr: float, device: str, settings: Settings) -> Training:
    """What anybody can write with torch alone, tuned."""
    step = DenseStep(kind, shape, lr, device, settings.l1)
    return Training(step, lambda: step.model.W_dec, step.reconstruct)


def _each_kind(make: Callable[[str, Shape, float, str, Settings], Step], *kinds: str) -> dict[str, Make]:
    return {kind: partial(make, kind) for kind in kinds}


SELECTIONS = ("topk", "batchtopk", "relu")
RIVALS = {
    rival.name: rival
    for rival in (
        Rival(
            "dictionary-learning",
            _each_kind(dictionary_learning, *SELECTIONS, "gated", "jumprelu", "p_annealing", "matryoshka"),
        ),
        Rival("sae-lens", _each_kind(sae_lens, *SELECTIONS, "gated", "jumprelu", "matryoshka", "matching_pursuit")),
        Rival("overcomplete", _each_kind(overcomplete, *SELECTIONS, "jumprelu", "matching_pursuit")),
        Rival("eai-sparsify", _each_kind(sparsify, "topk", "transcoder"), precision="high"),
        Rival("dense torch", _each_kind(dense_torch, *SELECTIONS), device="cuda"),
    )
}
