"""A short fit of contextual factors to tokens, for what their closed form cannot see: a(x) that follows the token.

The factors stay linear in the original's own keys (W_A = Q W_K, W_B = P W_K): which rank-R matrix is best for a token
depends on nothing else, and there are fewer numbers to fit than in the hidden size. The coordinates are whitened, so
that one learning rate suits all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_train.factorization.latent import symmetric_power
from tpa_train.factorization.stacked import ActivationSample, HeadMoments

BATCH = 1024  # tokens of a step
LEARNING_RATE = 0.2  # of a parameter's typical size, a step; smaller ones end in the noise of the sample
CHECK_EVERY = 20  # steps between two looks at all tokens
HELD_OUT = 8  # every so-many-th token only judges the iterates
WHITENING_FLOOR = 1e-6  # of the largest variance


class TokenTargets:
    """The original's vectors on a sample of tokens, and what an error of them costs; float64.

    Keys and queries are divided by the token's rms over all heads, as the norm behind them does; values count around
    their weighted mean, since the output's bias gives back any constant.

    Args:
        weight: W_K, W_V or W_Q [G, d, D].
        sample: the tokens.
        moments: of the metric; a plain squared error when None.
        kind: "k", "v" or "q".
    """

    def __init__(self, weight: Tensor, sample: ActivationSample, moments: HeadMoments | None, kind: str) -> None:
        self.weight = weight.detach().double().cpu()
        groups, width, _ = self.weight.shape
        self.vectors = torch.einsum("gdi,ti->tgd", self.weight, sample.x.double())
        size = groups * width
        if moments is None:
            self.metric = torch.eye(size, dtype=torch.float64).view(groups, width, groups, width)
        else:
            self.metric = moments.metric.double()
        root = symmetric_power(self.metric.reshape(size, size), 0.5)
        self.root = root / root.square().mean().sqrt()  # errors are relative: float32 likes numbers near one
        share = {"k": sample.key_weight, "v": sample.value_weight}.get(kind, torch.ones(len(sample.x)))
        self.share = (share.double() / share.double().sum())[:, None]
        self.centred = kind == "v"
        nothing = torch.zeros_like(self.vectors)
        self.mean = self.missing(nothing) if self.centred else nothing[0]
        power = self.vectors.square().mean((1, 2), keepdim=True)
        self.scale = torch.ones_like(power) if self.centred else power.clamp_min(1e-300).sqrt()
        self.reference = self._cost(self.vectors)

    def _cost(self, delta: Tensor) -> float:
        """Returns Σ share δ·M·δ for errors [T, G, d]."""
        return float(self.cost((delta / self.scale).flatten(1), self.root, self.share))

    def cost(self, delta: Tensor, root: Tensor, share: Tensor) -> Tensor:
        """Returns Σ share δ·M·δ of scaled errors [T, G·d] with weights [T, 1], around their mean for values."""
        if self.centred:
            delta = delta - (share * delta).sum(0) / share.sum()
        return (share * (delta @ root).square()).sum()

    def missing(self, predicted: Tensor) -> Tensor:
        """Returns the weighted mean [G, d] of what predictions [T, G, d] lack."""
        return (self.share[..., None] * (self.vectors - predicted)).sum(0)

    def error(self, predicted: Tensor) -> float:
        """Returns the relative error of predictions [T, G, d]."""
        return self._cost(self.vectors - predicted) / max(self.reference, 1e-300)


@torch.enable_grad()
def fit_contextual(
    targets: TokenTargets, a_bias: Tensor, b: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Fits a(x) = Q k + a₀ and b(x) = P k to ``targets`` by Adam in float32, from W_A = 0.

    Deterministic. The iterate that does best on held-out tokens is kept, and only if it is better there and no worse on
    all tokens than the start.

    Args:
        targets: the tokens.
        a_bias: a₀ [R, G] of the start.
        b: W_B [R, d, D] of the start, linear in the original's vectors.
        steps: of Adam.

    Returns:
        W_A [R, G, D], a₀ [R, G], W_B [R, d, D] and the weighted mean of what is missing [G, d], float64; None if no
        iterate was better.
    """
    (count, groups, width), rank = targets.vectors.shape, a_bias.shape[0]
    features = targets.vectors.flatten(1)
    values, vectors = torch.linalg.eigh(features.mT @ features / count)
    deviation = values.clamp_min(values[-1].clamp_min(1e-300) * WHITENING_FLOOR).sqrt()
    whiten = vectors / deviation  # z = k · whiten
    flat = targets.weight.flatten(0, 1)  # [G·d, D]
    # b = W_B x = P k: the start is in the row space of W_K by construction.
    start_p = deviation[:, None] * (vectors.mT @ torch.linalg.lstsq(flat.mT, b.flatten(0, 1).mT).solution)

    z, y = (features @ whiten).float(), (features / targets.scale[:, 0]).float()
    inverse, share, root = (1.0 / targets.scale).float(), targets.share.float(), targets.root.float()
    a0, q, p = (t.detach().float().requires_grad_() for t in (a_bias, torch.zeros(len(flat), rank * groups), start_p))

    def residual(rows: Tensor) -> Tensor:
        a = (z[rows] @ q).unflatten(-1, (rank, groups)) + a0
        k = torch.einsum("trg,trd->tgd", a, (z[rows] @ p).unflatten(-1, (rank, width))) / rank
        return y[rows] - (k * inverse[rows]).flatten(1)

    def judge() -> tuple[float, float]:
        with torch.no_grad():
            delta = residual(everything)
            held = float(targets.cost(delta[judges], root, share[judges]))
            return held, float(targets.cost(delta, root, share))

    everything = torch.arange(count)
    judges = everything[::HELD_OUT]
    training = everything[everything % HELD_OUT != 0] if count > HELD_OUT else everything
    training = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(0))]
    batches = training.split(BATCH)
    typical = float(a_bias.square().mean().sqrt()), float(start_p.square().mean().sqrt())
    adam = torch.optim.Adam(
        [
            {"params": [a0], "lr": LEARNING_RATE * typical[0]},
            {"params": [q], "lr": LEARNING_RATE * typical[0] / len(flat) ** 0.5},
            {"params": [p], "lr": LEARNING_RATE * typical[1]},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    best_held, start_total = judge()
    best: list[Tensor] | None = None
    for step in range(1, steps + 1):
        rows = batches[step % len(batches)]
        loss = targets.cost(residual(rows), root, share[rows]) / share[rows].sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            held, total = judge()
            if held < best_held and total < start_total:
                best, best_held = [t.detach().double().clone() for t in (q, p, a0)], held
    if best is None:
        return None
    q, p, a0 = best
    a = torch.einsum("kn,nx->kx", (whiten @ q).mT, flat).unflatten(0, (rank, groups))
    b = torch.einsum("kn,nx->kx", (whiten @ p).mT, flat).unflatten(0, (rank, width))
    predicted = torch.einsum(
        "trg,trd->tgd", (features @ whiten @ q).unflatten(-1, (rank, groups)) + a0,
        (features @ whiten @ p).unflatten(-1, (rank, width)),
    ) / rank  # fmt: skip
    return a, a0, b, targets.missing(predicted)
