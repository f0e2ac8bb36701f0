"""Alternating solvers for Tucker factors of several weight tensors at once (see ``tucker_factorization``).

The problem: min Σ_p w_p tr(L_p (W_p − Ŵ_p) S_p (W_p − Ŵ_p)ᵀ), Ŵ_p = (U_head_p ⊗ U_feat) core_p U_hiddenᵀ, where several
kinds p may share U_feat, and all share U_hidden. ``plain_solution`` is HOOI (De Lathauwer, De Moor, Vandewalle, SIAM J.
Matrix Anal. 21(4), 2000) over coupled tensors, begun by tensorly's; ``whitened_solution`` solves for the average
metric; ``refine`` alternates in the parts' own metrics. All float64.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tpa_train.factorization.latent import symmetric_power

START_SWEEPS = 5  # of tensorly's, which the plain sweeps continue
SWEEPS, TOLERANCE = 50, 1e-7  # of plain sweeps; relative to the tensor's energy
DATA_SWEEPS, DATA_TOLERANCE = 60, 1e-4  # of alternating least squares; relative to the error
GRADIENT_STEPS = 6  # conjugate-gradient steps an update
METRIC_FLOOR = 1e-10  # of a metric's mean eigenvalue, so that directions that never mattered have a length


@dataclass
class Part:
    """One kind in the common problem. ``tensor`` [N, d, X] is W, or a root of W S Wᵀ where the hidden mode is whole."""

    kind: str
    features: str
    rank: int
    head_rank: int  # 0: whole
    tensor: Tensor
    metric: Tensor | None = None  # L [N d, N d]
    inner: Tensor | None = None  # S [D, D], with a truncated hidden mode
    scale: float = 1.0
    left: Tensor | None = None  # L^½
    right: Tensor | None = None  # S^½

    def __post_init__(self) -> None:
        self.target = self.tensor.flatten(0, 1)
        if self.metric is not None:
            floor = METRIC_FLOOR * self.metric.diagonal().mean()
            self.left = symmetric_power(self.metric + floor * torch.eye(len(self.metric), dtype=torch.float64), 0.5)
            self.metric = self.left @ self.left
            self.target = self.left @ self.target
        if self.inner is not None:
            self.right = symmetric_power(self.inner, 0.5)
            self.inner = self.right @ self.right
            self.target = self.target @ self.right

    @property
    def size(self) -> float:
        return float(self.target.square().sum())

    def head_metric(self) -> Tensor:
        """Returns the average over heads of a head's own metric, [d, d]."""
        width = self.tensor.shape[1]
        if self.metric is None:
            return torch.eye(width, dtype=torch.float64)
        blocks = self.metric.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        return torch.einsum("ndne->de", blocks) / len(self.tensor)


@dataclass
class State:
    """Factors while they are solved; ``heads`` is the identity where the mode is whole."""

    hidden: Tensor | None
    features: dict[str, Tensor]
    heads: dict[str, Tensor]

    def outer(self, part: Part) -> Tensor:
        """Returns L^½ (U_head ⊗ U_feat), [N d, r_h r₂]; needs a metric."""
        return part.left @ kronecker(self.heads[part.kind], self.features[part.features])

    def inner(self, part: Part) -> Tensor | None:
        """Returns S^½ U_hidden, [D, r₁]."""
        return self.hidden if self.hidden is None or part.right is None else part.right @ self.hidden

    def latents(self, part: Part, vectors: Tensor) -> Tensor:
        """Returns the best latents [r_h, r₂, X] of ``vectors`` [N, d, X]: the least-squares inverse of ``expand``."""
        heads, features = self.heads[part.kind], self.features[part.features]
        if part.left is None:  # the inverse of a Kronecker product, without the product
            return torch.linalg.pinv(features) @ torch.einsum("hn,ndx->hdx", torch.linalg.pinv(heads), vectors)
        q, r = torch.linalg.qr(self.outer(part))
        latents = torch.linalg.solve_triangular(r, q.mT @ (part.left @ vectors.flatten(0, 1)), upper=True)
        return latents.unflatten(0, (heads.shape[1], features.shape[1]))

    def expand(self, part: Part, latents: Tensor) -> Tensor:
        """Returns (U_head ⊗ U_feat) latents, [N, d, X], of [r_h, r₂, X]."""
        return self.features[part.features] @ torch.einsum("nh,hrx->nrx", self.heads[part.kind], latents)

    def core(self, part: Part) -> Tensor:
        """Returns the best core given the factors, [r_h, r₂, r₁ or X]."""
        core = self.latents(part, part.tensor if part.right is None else part.tensor @ part.right)
        if (inner := self.inner(part)) is not None:
            q, r = torch.linalg.qr(inner)
            core = torch.linalg.solve_triangular(r.mT, core @ q, upper=False, left=False)
        return core

    def error(self, part: Part) -> float:
        """Returns the squared error in the metric with the best core."""
        product, inner = self.expand(part, self.core(part)).flatten(0, 1), self.inner(part)
        product = product if part.left is None else part.left @ product
        return float((part.target - (product if inner is None else product @ inner.mT)).square().sum())

    def total(self, parts: list[Part]) -> float:
        return sum(part.scale * self.error(part) for part in parts)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """Returns the ``rank`` leading eigenvectors, with signs that two machines agree on."""
    vectors = torch.linalg.eigh(0.5 * (gram + gram.mT)).eigenvectors.flip(-1)[:, :rank]
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Returns a ⊗ b of matrices of any strides; ``torch.kron`` wants contiguous ones."""
    return torch.einsum("nh,dr->ndhr", a, b).flatten(2).flatten(0, 1)


def tensorly_factors(tensor: Tensor, ranks: dict[int, int]) -> dict[int, Tensor]:
    """Returns tensorly's ``partial_tucker`` factors of the modes that ``ranks`` truncates, by mode."""
    modes = sorted(mode for mode, rank in ranks.items() if rank < tensor.shape[mode])  # tensorly skips by order
    if not modes:
        return {}
    with tl.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to compute SVD")  # a rank above what the other modes span is allowed
        (_, factors), _ = partial_tucker(
            tensor, [ranks[m] for m in modes], modes, n_iter_max=START_SWEEPS, random_state=0
        )
    return dict(zip(modes, factors, strict=True))


def plain_solution(parts: list[Part], tensors: dict[str, Tensor], hidden: int, fixed: dict[str, Tensor]) -> State:
    """Minimises Σ_p w_p ‖T_p − T̂_p‖² over orthonormal factors, from tensorly's solutions of the stacked tensors.

    Args:
        parts: with ranks and scales.
        tensors: T by kind, [N, d, X].
        hidden: r₁, 0 to leave the mode whole.
        fixed: factors that are given, by "hidden" or the name of the features.
    """
    scaled = {p.kind: tensors[p.kind] * p.scale**0.5 for p in parts}
    width, depth = next(iter(tensors.values())).shape[1:]
    eye = torch.eye(width, dtype=torch.float64)
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.features, []).append(part)
    state = State(None, {}, {p.kind: torch.eye(len(p.tensor), dtype=torch.float64) for p in parts})
    if hidden:
        state.hidden = fixed.get("hidden", torch.eye(depth, dtype=torch.float64)[:, :hidden])

    # Starts: a group that shares features is one tensor; so are all groups together for the hidden mode.
    for name, group in groups.items():
        ranks = {1: group[0].rank} | ({2: hidden} if hidden else {})
        if len(group) == 1 and group[0].head_rank:
            ranks[0] = group[0].head_rank
        found = tensorly_factors(torch.cat([scaled[p.kind] for p in group]), ranks)
        state.features[name] = fixed.get(name, found.get(1, eye[:, : group[0].rank]))
        if len(groups) == 1 and 2 in found and "hidden" not in fixed:
            state.hidden = found[2]
        for part in group:
            if part.head_rank:
                start = found if len(group) == 1 else tensorly_factors(scaled[part.kind], {0: part.head_rank})
                state.heads[part.kind] = start.get(0, state.heads[part.kind][:, : part.head_rank])
    if len(groups) > 1 and hidden and "hidden" not in fixed:
        state.hidden = tensorly_factors(torch.cat(list(scaled.values())), {2: hidden}).get(2, state.hidden)

    def reduce() -> dict[str, Tensor]:
        return {kind: t if state.hidden is None else t @ state.hidden for kind, t in scaled.items()}

    def projected(part: Part, skip: int) -> Tensor:
        """Returns T in the factors of all modes but ``skip`` (-1: of all)."""
        t = (scaled if skip == 2 else reduced)[part.kind]
        if skip != 1:
            t = state.features[part.features].mT @ t
        return t if skip == 0 else torch.einsum("nh,nde->hde", state.heads[part.kind], t)

    total, previous, reduced = sum(float(t.square().sum()) for t in scaled.values()), torch.inf, reduce()
    for _ in range(SWEEPS):
        for name, group in groups.items():
            if name not in fixed and group[0].rank < width:
                grams = [torch.einsum("hdx,hex->de", t, t) for t in (projected(p, 1) for p in group)]
                state.features[name] = leading_vectors(sum(grams), group[0].rank)
        for part in parts:
            if 0 < part.head_rank < len(part.tensor):
                t = projected(part, 0).flatten(1)
                state.heads[part.kind] = leading_vectors(t @ t.mT, part.head_rank)
        if hidden and "hidden" not in fixed and hidden < depth:
            t = torch.cat([projected(p, 2).flatten(0, 1) for p in parts])
            if hidden <= len(t) < depth:  # the smaller Gram matrix has the same spectrum
                state.hidden = torch.linalg.qr(t.mT @ leading_vectors(t @ t.mT, hidden)).Q
            else:
                state.hidden = leading_vectors(t.mT @ t, hidden)
            reduced = reduce()
        error = total - sum(float(projected(p, -1).square().sum()) for p in parts)
        if previous - error <= TOLERANCE * total:
            break
        previous = error
    return state


def whitened_solution(parts: list[Part], hidden: int, fixed: dict[str, Tensor]) -> State:
    """Solves for the average metric of the heads that share a factor, where whitening makes the problem plain."""
    metrics: dict[str, Tensor] = {}
    for part in parts:
        metrics[part.features] = metrics.get(part.features, 0) + part.scale * part.head_metric()
    roots = {name: symmetric_power(m, 0.5) for name, m in metrics.items()}
    inner = [p.inner for p in parts if p.inner is not None]
    root = symmetric_power(sum(inner) / len(inner), 0.5) if inner else None
    tensors = {}
    for part in parts:
        t = roots[part.features] @ part.tensor
        tensors[part.kind] = t if root is None else t @ root
    state = plain_solution(parts, tensors, hidden, fixed)
    for name in state.features:
        if name not in fixed:
            state.features[name] = torch.linalg.qr(torch.linalg.solve(roots[name], state.features[name])).Q
    if hidden and root is not None and "hidden" not in fixed:
        state.hidden = torch.linalg.qr(torch.linalg.solve(root, state.hidden)).Q
    return state


def _descend(apply, target: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns ``x`` after a few conjugate-gradient steps towards apply(x) = target, none of which raises the error.

    ``left`` and ``right`` are inverses of what ``apply`` multiplies with on average: the preconditioner.
    """
    residual = target - apply(x)
    step, last = None, None
    for _ in range(GRADIENT_STEPS):
        direction = left @ residual @ right
        product = (residual * direction).sum()
        step = direction if step is None else direction + (product / last) * step
        image = apply(step)
        curvature = (step * image).sum()
        if not curvature > 0:
            break
        x, residual = x + (product / curvature) * step, residual - (product / curvature) * image
        last = product
    return x


def _update_features(parts: list[Part], state: State, name: str) -> None:
    """Improves one U_feat with cores and all other factors held."""
    users = [p for p in parts if p.features == name]
    width = users[0].tensor.shape[1]
    grams, metrics, target = [], [], 0
    for part in users:
        inner = state.inner(part)
        core = torch.einsum("nh,hrx->nrx", state.heads[part.kind], state.core(part))
        core = core if inner is None else core @ inner.mT  # Ŵ[n] = U_feat core[n]
        wanted = part.target if part.left is None else part.left @ part.target
        target = target + part.scale * torch.einsum("ndx,nrx->dr", wanted.unflatten(0, (-1, width)), core)
        flat = core.flatten(0, 1)
        grams.append((flat @ flat.mT).unflatten(0, core.shape[:2]).unflatten(2, core.shape[:2]))  # [N, r₂, N, r₂]
        blocks = None if part.metric is None else part.metric.unflatten(0, (-1, width)).unflatten(2, (-1, width))
        metrics.append(blocks)

    def apply(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for part, gram, metric in zip(users, grams, metrics, strict=True):
            if metric is None:
                total += part.scale * x @ torch.einsum("nrns->rs", gram)
            else:
                total += part.scale * torch.einsum("ndmr,mrns->ds", metric @ x, gram)
        return total

    left = symmetric_power(sum(p.scale * p.head_metric() for p in users), -1.0)
    right = symmetric_power(sum(torch.einsum("nrns->rs", g) for g in grams), -1.0)
    state.features[name] = torch.linalg.qr(_descend(apply, target, state.features[name], left, right)).Q


def _update_heads(part: Part, state: State) -> None:
    """Solves for one U_head with the core and all other factors held."""
    inner, core, features = state.inner(part), state.core(part), state.features[part.features]
    core = core if inner is None else core @ inner.mT
    product = features @ core  # [r_h, d, X]; Ŵ[n] = Σ_h U_head[n, h] product[h]
    count, width, rank = len(part.tensor), part.tensor.shape[1], part.head_rank
    flat = product.flatten(0, 1)
    gram = (flat @ flat.mT).view(rank, width, rank, width)
    if part.metric is None:
        normal = kronecker(torch.eye(count, dtype=torch.float64), torch.einsum("hdkd->hk", gram))
        wanted = part.target
    else:
        blocks = part.metric.view(count, width, count, width)
        normal = torch.einsum("gdfe,hdke->ghfk", blocks, gram).reshape(count * rank, count * rank)
        wanted = part.left @ part.target
    right = torch.einsum("gdx,hdx->gh", wanted.view(count, width, -1), product).flatten()
    solution = torch.linalg.lstsq(normal, right[:, None], driver="gelsd").solution
    state.heads[part.kind] = torch.linalg.qr(solution.view(count, rank)).Q


def _update_hidden(parts: list[Part], state: State, left: Tensor) -> None:
    """Improves U_hidden with cores and all other factors held; ``left`` is an inverse of Σ S_p."""
    inners, grams, target = [], [], 0
    for part in parts:
        product = state.expand(part, state.core(part)).flatten(0, 1)
        product = product if part.left is None else part.left @ product  # [N d, r₁]; the target is product (S^½ U)ᵀ
        wanted = part.target.mT @ product
        target = target + part.scale * (wanted if part.right is None else part.right @ wanted)
        grams.append(part.scale * product.mT @ product)
        inners.append(part.inner)

    def apply(x: Tensor) -> Tensor:
        pairs = zip(inners, grams, strict=True)
        return sum((x if inner is None else inner @ x) @ gram for inner, gram in pairs)

    state.hidden = torch.linalg.qr(_descend(apply, target, state.hidden, left, symmetric_power(sum(grams), -1.0))).Q


def refine(parts: list[Part], state: State, fixed: dict[str, Tensor]) -> list[float]:
    """Alternates over all factors in the parts' own metrics; returns Σ w_p error_p before and after every sweep."""
    names = [name for name in state.features if name not in fixed]
    names = [n for n in names if state.features[n].shape[0] > state.features[n].shape[1]]
    mixed = [p for p in parts if 0 < p.head_rank < len(p.tensor)]
    inverse = None
    if state.hidden is not None and "hidden" not in fixed:
        eye = torch.eye(state.hidden.shape[0], dtype=torch.float64)
        inverse = symmetric_power(sum(eye if p.inner is None else p.inner for p in parts), -1.0)
    errors = [state.total(parts)]
    for _ in range(DATA_SWEEPS if names or mixed or inverse is not None else 0):
        before = dataclasses.replace(state, features=dict(state.features), heads=dict(state.heads))
        for name in names:
            _update_features(parts, state, name)
        for part in mixed:
            _update_heads(part, state)
        if inverse is not None:
            _update_hidden(parts, state, inverse)
        error = state.total(parts)
        if error > errors[-1]:  # rounding, at the optimum
            state.hidden, state.features, state.heads = before.hidden, before.features, before.heads
            break
        errors.append(error)
        if errors[-2] - error <= DATA_TOLERANCE * errors[-2]:
            break
    return errors


def rotate_features(parts: list[Part], state: State, name: str) -> None:
    """Turns one U_feat so that latents are uncorrelated and an error costs equally in every one of them.

    A change of basis that the core undoes: only rounding in a quantized cache sees it (as in ``factorization.latent``).
    """
    users = [p for p in parts if p.features == name]
    metric = sum(p.scale * p.head_metric() for p in users)
    features = state.features[name]
    gram = features.mT @ (metric / metric.diagonal().mean()) @ features
    second = 0
    for part in [p for p in users if p.kind in "kv"] or users:
        inner, core = state.inner(part), state.core(part)
        core = core if inner is None else core @ inner.mT
        second = second + part.scale * torch.einsum("hrx,hsx->rs", core, core)
    root = symmetric_power(gram, 0.5)
    turn = leading_vectors(root @ second @ root, features.shape[1])
    state.features[name] = features @ symmetric_power(gram, -0.5) @ turn
