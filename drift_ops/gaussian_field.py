"""Form A: the drifting field under a Gaussian kernel, each side normalised on its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from .arguments import check_flag, check_points, check_positive, check_positives
from .backends import choose
from .points import as_problems, full_precision, to_compute_dtype
from .spec import AffinitySpec


def compute_V(
    x: Tensor,
    x_data: Tensor,
    x_gen: Tensor,
    sigma: float = 1.0,
    temperature: float = 1.0,
    normalize_features: bool = True,
    normalize_drift: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Drifting field of the Gaussian kernel, each side normalised on its own.

    For each side s, ``K = exp(−d²/(2σ²))``, ``A = sqrt(softmax_rows(K/T)·softmax_cols(K/T))``, ``A ← A/ΣA``,
    ``W = A/(rowsum(A) + 1e-8)`` and ``m_s = W y_s``; the field is ``V = m_data − m_gen``.

    Args:
        x: queries (generated samples) ``[..., N, D]``; float64, float32, bfloat16 or float16. Leading dimensions are
            independent problems.
        x_data: data samples ``[..., P, D]``.
        x_gen: generated samples ``[..., M, D]``; with M = 0 there is no repulsion. Not masked where equal to ``x``.
        sigma: kernel width σ, in the units of the distances, from 1e-12 to 1e12.
        temperature: softmax temperature T, from 1e-12 to 1e12.
        normalize_features: take the distances between features scaled to norm √D; the means are of the points as given.
        normalize_drift: divide V by its mean row norm, per problem.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

    Returns:
        V ``[..., N, D]`` in the dtype of ``x``, differentiable once w.r.t. the three tensors.

    Raises:
        TypeError, ValueError: an argument is not what is described here.

    Source: github.com/91gaozhidao/Generative-Modeling-via-Drifting, ``drifting/utils/drifting_field.py``.
    """
    return _gaussian_field(
        x, x_data, x_gen, (check_positive("sigma", sigma),), temperature, normalize_features, normalize_drift, backend
    )


def compute_V_multiscale(
    x: Tensor,
    x_data: Tensor,
    x_gen: Tensor,
    sigmas: Sequence[float] = (0.1, 0.5, 1.0, 2.0),
    temperature: float = 1.0,
    normalize_features: bool = True,
    normalize_drift: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean of :func:`compute_V` over several ``sigmas``, normalised (``normalize_drift``) after the mean.

    All sigmas share one set of distances. Arguments, result and errors otherwise as for :func:`compute_V`.
    """
    sigmas = check_positives("sigmas", sigmas)
    return _gaussian_field(x, x_data, x_gen, sigmas, temperature, normalize_features, normalize_drift, backend)


def _gaussian_field(
    x: Tensor,
    x_data: Tensor,
    x_gen: Tensor,
    sigmas: tuple[float, ...],
    temperature: float,
    normalize_features: bool,
    normalize_drift: bool,
    backend: str | None,
) -> Tensor:
    check_points("x", x)
    check_points("x_data", x_data, x, "x")
    check_points("x_gen", x_gen, x, "x", empty=True)
    temperature = check_positive("temperature", temperature)
    check_flag("normalize_features", normalize_features)
    check_flag("normalize_drift", normalize_drift)
    chosen = choose(backend, x.device, x.dtype)
    with full_precision(x.device):
        points, data, gen = (to_compute_dtype(t) for t in (x, x_data, x_gen))
        if chosen == "reference":
            V = reference.compute_V(points, data, gen, sigmas, temperature, normalize_features, normalize_drift)
            return V.to(x.dtype)
        spec = AffinitySpec("gaussian", sigmas, temperature)
        q, sides = as_problems(points), [as_problems(data), as_problems(gen)]
        features = reference.unit_features if normalize_features else torch.Tensor.contiguous
        q_features = features(q)

        def mean_under_kernel(y: Tensor) -> tuple[Tensor, Tensor]:
            """m_s − centre ``[G, N, D]`` and the centre ``[G, 1, D]``."""
            keys = q_features if x_gen is x and y is sides[1] else features(y)
            values = [y] if normalize_features else None
            num, den, centre = ops.affinity_sums(q_features, [keys], values, None, spec, chosen)
            den = den.unsqueeze(-1)  # [S, G, 1, N, 1]
            slack = 1e-8 * den.sum(-2, keepdim=True)  # the 1e-8 beside rowsum(A), before A is divided by its sum
            centre = centre.unsqueeze(1)
            # m − centre = (num − slack·centre) / (den + slack)
            mean = (num - slack * centre.unsqueeze(1)) / (den + slack)
            return mean[:, :, 0].mean(0), centre

        V, centre = mean_under_kernel(sides[0])
        if gen.shape[-2] == 0:
            V = V + centre
        else:
            of_gen, centre_of_gen = mean_under_kernel(sides[1])
            V = V - of_gen + (centre - centre_of_gen)
        V = V.reshape(x.shape)
        return (reference.unit_drift(V) if normalize_drift else V).to(x.dtype)
