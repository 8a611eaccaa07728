"""Distances of quantized logits from float logits: the fitness of a search.

Source: `infonce` is from Evol-Q, arXiv 2308.10814; the other distances are from qat itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.ste import without_autocast

Fitness = Callable[[Tensor, Tensor], Tensor]
FITNESSES = ("infonce", "mse", "kl", "cosine")
TEMPERATURE = 3.0


def info_nce(q: Tensor, k: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """InfoNCE: the mean of -log softmax(S_i)[i] over the rows i, times 2 T.

    S contains the cosines between the rows of `q` and of `k`, divided by T. All rows of `k` in the
    batch are candidates, so do not split a batch.

    Args:
        q: (N, D) quantized logits.
        k: (N, D) float logits; no gradient flows into them.
        temperature: T, above 0.

    Returns:
        Scalar, float32, 0 for N = 1.
    """
    q = F.normalize(q.float(), dim=1)
    k = F.normalize(k.detach().float(), dim=1)
    with without_autocast(q):
        cosines = q @ k.T
    positives = torch.arange(len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(cosines / temperature, positives)


def _mse(q: Tensor, k: Tensor) -> Tensor:
    return F.mse_loss(q.float(), k.detach().float())


def _kl(q: Tensor, k: Tensor) -> Tensor:
    return F.kl_div(
        q.float().log_softmax(-1),
        k.detach().float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def _cosine(q: Tensor, k: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(q.float(), k.detach().float(), dim=-1).mean()


def logit_fitness(kind: str, temperature: float = TEMPERATURE) -> Fitness:
    """Return a function that compares quantized logits q with float logits k, (N, D) each.

    The function maps (q, k) to a float32 scalar; lower is better. `infonce`: `info_nce`. `mse`:
    mean of (q - k)^2 over all entries. `kl`: mean over the rows of KL(softmax k || softmax q).
    `cosine`: 1 - mean cosine of q_i and k_i. The last three may be averaged over equal parts of a
    batch.

    Args:
        kind: one of `FITNESSES`.
        temperature: temperature of `infonce`, above 0.
    """
    fitnesses: dict[str, Fitness] = {
        "infonce": partial(info_nce, temperature=temperature),
        "mse": _mse,
        "kl": _kl,
        "cosine": _cosine,
    }
    return fitnesses[kind]
