"""Least squares on sample activations, shrunk towards the mean-gate update.

The static update that a site's mixture is nearest to on its own inputs:

    W = argmin_W sum_t |d_t - W x_t|^2 + lambda |W - W_mean|^2        d_t = Bt^T zg_t
      = Bt^T P,   P = P_mean + (M - P_mean C) (C + lambda I)^-1

with C = sum x x^T, M = sum zg x^T and W_mean = Bt^T P_mean the mean-gate update, so
the whole fit is in rank space. It is then cut to the rank-r update that is nearest in
the norm |W C^(1/2)|, which is the error on the tokens and not in the weights: with
Bt^T = Q_b R_b and U the leading r eigenvectors of the small (R_b P) C (R_b P)^T,

    A = U^T R_b P    B^T = (Q_b U)^T

which needs no root or inverse of C. lambda, relative to the mean diagonal of C, is the
one of a grid whose truncated fit has the least error on held-out rows.

Least squares on inner products of the inputs: Jin et al. 2022 (RegMean),
arXiv:2212.09849. The truncation is that of reduced-rank regression, Izenman 1975.

Shape legend: see factors.py.
"""

from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence

Ridge = Annotated[float, pydantic.Field(gt=0)]


@COLLAPSERS.register("calibrated", paper="arXiv:2212.09849")
class Calibrated(Collapser):
    """Nearest static update on sample activations, truncated in the input's metric.

    Limitations: each site is fitted on the inputs it has in the mixture, so errors of
    earlier layers are not made up for; the reported error is on the rows that chose
    lambda, a choice among a few; an [I, I] system is solved per lambda and site.
    """

    class Config(CollapseConfig):
        """Settings of the calibrated fit."""

        rank: int = pydantic.Field(default=16, ge=1)
        """Rank of the result, at most; a site that holds less keeps what it holds."""
        ridges: list[Ridge] = pydantic.Field(
            default=[1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0],
            min_length=1,
        )
        """Grid for lambda, relative to the mean diagonal of the inputs' covariance."""

    config: Config
    needs_moments = True
    reduces_rank = True

    def why_calibration(self) -> str | None:
        """See base class."""
        return "the fit is to sample activations"

    def tune(
        self, factors: SiteFactors, fit: Evidence, held: Evidence
    ) -> dict[str, float]:
        """See base class; chooses the ridge."""
        moments = held.moments
        assert moments is not None
        error = {
            ridge: moments.distance(factors, self._delta(factors, fit, ridge))
            for ridge in self.config.ridges
        }
        return {"ridge": min(error, key=lambda ridge: error[ridge])}

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        delta = self._delta(factors, data, tuned["ridge"])
        return truncate(delta), {}

    def _delta(self, factors: SiteFactors, data: Evidence, ridge: float) -> LowRank:
        assert data.moments is not None
        P_QI = fitted(factors, data, ridge)
        return truncate_in_metric(
            P_QI, factors.Bt_QO, data.moments.C_II, self.config.rank
        )


def fitted(factors: SiteFactors, data: Evidence, ridge: float) -> Tensor:
    """Factor P of the ridge solution W = Bt^T P.

    Args:
        factors: The site's experts.
        data: Mean gates and second moments of the tokens.
        ridge: lambda, relative to the mean diagonal of C.

    Returns:
        P, [Q, I].
    """
    moments = data.moments
    assert moments is not None
    mean_QI = factors.mixed(data.usage.mean())
    # inputs that are all zero leave nothing to fit, and nothing to scale by
    size = float(moments.C_II.diagonal().mean()) or 1.0
    system_II = moments.C_II.clone()
    system_II.diagonal().add_(ridge * size)
    lower_II = torch.linalg.cholesky(system_II)
    rest_QI = moments.M_QI - mean_QI @ moments.C_II
    return mean_QI + torch.cholesky_solve(rest_QI.t(), lower_II).t()


def truncate_in_metric(P_QI: Tensor, Bt_QO: Tensor, C_II: Tensor, rank: int) -> LowRank:
    """Best approximation of Bt^T P in the norm |W C^(1/2)|.

    Args:
        P_QI: Right factor.
        Bt_QO: Left factor, transposed.
        C_II: Second moment of the inputs; may be singular.
        rank: Rank of the result, at most.

    Returns:
        The update of rank min(rank, Q, O).
    """
    qb_Oq, rb_qQ = torch.linalg.qr(Bt_QO.t())
    y_qI = rb_qQ @ P_QI
    # eigenvalues in ascending order
    _, vectors_qq = torch.linalg.eigh(y_qI @ C_II @ y_qI.t())
    u_qr = vectors_qq[:, -min(rank, vectors_qq.shape[1]) :]
    return LowRank(u_qr.t() @ y_qI, (qb_Oq @ u_qr).t())
