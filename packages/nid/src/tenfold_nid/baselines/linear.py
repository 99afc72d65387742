"""Linear dictionaries on the sample grid: the control without any network (section 8)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..fitting import System, system
from ..sparse import omp


class LinearDictionary(nn.Module):
    """Signals as ``mean + atoms @ code``; the solvers of the neural dictionary apply to it unchanged."""

    mean: Tensor
    atoms: Tensor

    def __init__(self, mean: Float[Tensor, " rows"], atoms: Float[Tensor, "rows components"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("atoms", atoms)

    def system(
        self, targets: Float[Tensor, "batch points channels"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> System:
        """The linear system of a batch of signals; rows are points with the channels innermost."""
        channels = targets.shape[-1]
        centred = targets - self.mean.view(-1, channels)
        # Columns of zeros in the place of the biases, which the mean already carries.
        padded = torch.cat([self.atoms, self.atoms.new_zeros(len(self.atoms), channels)], dim=1)
        problem = system(padded, centred, mask)
        return problem._replace(design=problem.design[..., : self.atoms.shape[1]])

    def render(self, code: Float[Tensor, "batch components"], channels: int) -> Float[Tensor, "batch points channels"]:
        """Signals from codes."""
        return (self.mean + code @ self.atoms.T).unflatten(1, (-1, channels))


def pca(signals: Float[Tensor, "signals rows"], components: int, *, whiten: bool = False) -> LinearDictionary:
    """Principal components, orthonormal; ``whiten`` scales each to the deviation of the signals along it.

    A ridge fit on whitened components is the most probable code under the signals' Gaussian distribution.

    Raises:
        ValueError: more components than the data can have.

    """
    if not 1 <= components <= min(len(signals) - 1, signals.shape[1]):
        most = min(len(signals) - 1, signals.shape[1])
        raise ValueError(
            f"{len(signals)} signals of {signals.shape[1]} numbers have at most {most} principal components, "
            f"got {components}"
        )
    mean = signals.mean(dim=0)
    centred = (signals - mean) / (len(signals) - 1) ** 0.5
    if len(signals) < signals.shape[1]:
        _, deviations, axes = torch.linalg.svd(centred, full_matrices=False)
        atoms = axes[:components].T.contiguous()
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        deviations, atoms = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :components].contiguous()
    return LinearDictionary(mean, atoms * deviations[:components] if whiten else atoms)


def ksvd(
    signals: Float[Tensor, "signals rows"], atoms: int, sparsity: int, *, iterations: int = 10, seed: int = 0
) -> LinearDictionary:
    """K-SVD (Aharon, Elad and Bruckstein 2006): OMP codes, then each atom and its coefficients by the leading singular
    pair.

    Args:
        signals: training signals.
        atoms: size of the dictionary.
        sparsity: atoms a signal.
        iterations: alternations.
        seed: of the training signals that start the dictionary.

    Raises:
        ValueError: fewer signals than atoms.

    """
    if len(signals) < atoms:
        raise ValueError(f"{atoms} atoms cannot be learned from {len(signals)} signals")
    mean = signals.mean(dim=0)
    centred = signals - mean
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(signals), generator=generator)[:atoms].to(signals.device)
    dictionary = torch.nn.functional.normalize(centred[start] + 1e-6 * centred.std(), dim=1).T.contiguous()
    for _ in range(iterations):
        codes, _ = omp(System(dictionary, centred, None, atoms), sparsity)
        residual = centred - codes @ dictionary.T
        for i in range(atoms):
            users = codes[:, i].nonzero().squeeze(1)
            if not len(users):  # an atom nobody uses is restarted at the signal that is worst off
                worst = residual.square().sum(dim=1).argmax()
                dictionary[:, i] = torch.nn.functional.normalize(residual[worst] + 1e-12, dim=0)
                continue
            error = residual[users] + codes[users, i, None] * dictionary[:, i]
            coefficients = codes[users, i]
            for _ in range(2):  # power iteration in the place of a full decomposition
                dictionary[:, i] = torch.nn.functional.normalize(error.T @ coefficients, dim=0)
                coefficients = error @ dictionary[:, i]
            codes[users, i] = coefficients
            residual[users] = error - coefficients[:, None] * dictionary[:, i]
    return LinearDictionary(mean, dictionary)
