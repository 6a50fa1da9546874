"""Balance of importance: how unevenly the gates are spread over the experts.

    cv2 = Var_e(q_e) / Mean_e(q_e)^2,   q_e = sum_t g_e(x_t)

Reference: Shazeer et al. 2017, arXiv:1701.06538, equations 6 and 7, with the variance
of a whole population (divided by E).
Shape legend: see base.py.
"""

from torch import Tensor

from molora.context import TokenRows
from molora.routers.balance import OBJECTIVES, Objective
from molora.routers.base import Routing


@OBJECTIVES.register("cv2", paper="arXiv:1701.06538")
class ImportanceBalance(Objective):
    """Squared coefficient of variation of the summed gates; 0 where all weigh alike.

    E - 1 where one expert has all the weight.

    Limitations: it sees gates, not how many tokens an expert gets, and trains only the
    logits of chosen experts; ``switch`` looks at both.
    """

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        gates_TE = routing.gates
        if weight_T is None:
            sum_E = gates_TE.sum(0)
        else:
            sum_E = weight_T.to(gates_TE.dtype) @ gates_TE
        mean = sum_E.mean()
        # without a real token, or any gate, everything is zero
        spread = (sum_E - mean).square().mean()
        return spread / mean.square().masked_fill(mean == 0, 1.0)
