"""Initial factors, and the frozen term that takes off what they add at the start.

    PiSSA       W = U S V^T   A = sqrt(S_r / s) V_r^T   B = U_r sqrt(S_r / s)
    OLoRA       W = Q R       A = R_r                   B = Q_r
    LoftQ       W - Q = U S V^T   A, B as in PiSSA, Q near W - s B A in 4 bits
    orthogonal  Q random      A = Q_odd^T N_1 / 10      B = N_2 Q_even / 10
    gaussian                  A from N(0, 1 / r^2)      B = 0

PiSSA and OLoRA subtract C = s B A of the start from the stored weight. Here C is a
frozen term of every expert,

    delta_e = s B_e A_e - C

so that the base is never changed. All experts have the same start, so that the update
is zero whatever the gates. Where these sum to one,

    W + sum_e g_e delta_e = (W - C) + sum_e g_e s B_e A_e

which for one expert is what the papers train; where they sum to less, what is missing
falls to the base. Dropout is not on C, just as it is not on the papers' base.

LoftQ trains on Q, which lacks C already. Nothing is taken off there, so that the update
is C at the start; with gates that sum to one the model then is near the unquantised
one, and where they sum to less, what is missing falls to Q. On a base in any other
form C is taken off as above. See molora/loftq.py.

References: Meng et al. 2024 (PiSSA), arXiv:2404.02948, equations 2 to 4; Büyükakyüz
2024 (OLoRA), arXiv:2406.01775, algorithm 1; Li et al. 2023 (LoftQ), arXiv:2310.08659,
algorithm 1; the others as PEFT 0.21.2 draws them, where
the rows of Q make B A zero.
Shape legend: see base.py; R rows of the start.
"""

import abc
import re

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import BilinearExperts, Part

_FAST = re.compile(r"pissa_niter_([1-9][0-9]*)")
_LOFTQ = re.compile(r"loftq(?:_iter_([1-9][0-9]*))?")
_PLAIN = (True, "kaiming", "gaussian")


def check_init(init: bool | str) -> bool | str:
    """Return the name of an initialiser.

    Raises:
        ValueError: There is none of that name.
    """
    known = (*_PLAIN, "orthogonal", "pissa", "olora")
    patterns = _FAST, _LOFTQ
    if init not in known and not any(p.fullmatch(str(init)) for p in patterns):
        why = {
            False: "A random B would change the model before it is trained. ",
            "goat": "GOAT is a family of its own, experts.kind goat. ",
        }.get(init, "")
        raise ValueError(
            f"{why}There are true (kaiming), gaussian, orthogonal, pissa, "
            "pissa_niter_<iterations>, olora, loftq and loftq_iter_<iterations>"
        )
    return init


def reads_weight(init: bool | str) -> bool:
    """Whether an initialiser starts from the frozen weight."""
    return init in ("pissa", "olora") or bool(_FAST.fullmatch(str(init)))


def loftq_steps(init: bool | str) -> int:
    """Iterations T of LoftQ, 1 where none are named; 0 for other initialisers."""
    found = _LOFTQ.fullmatch(str(init))
    return int(found[1] or 1) if found else 0


def sets_both(init: bool | str) -> bool:
    """Whether an initialiser sets A and B together."""
    return init not in _PLAIN


class StartedExperts(BilinearExperts):
    """Low-rank experts that may begin elsewhere than at zero, less a frozen term.

    A family that makes the term has ``A_start`` and ``Bt_start`` among its ``frozen``.
    """

    correction: float = 0.0
    """What C is multiplied by: minus its scale, or 0 where there is none."""

    def taken_off(self) -> float:
        """What C is multiplied by on this base; 0 where the base lacks it already."""
        return self.correction

    def restored(self) -> Tensor | None:
        """See base class."""
        if self.taken_off() == self.correction:
            return None
        wide = torch.promote_types(self.A_start.dtype, torch.float32)
        a_RI, b_RO = self.A_start[0].to(wide), self.Bt_start[0].to(wide)
        return (-self.correction * b_RO.t() @ a_RI).detach()

    @abc.abstractmethod
    def own(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """Factors as of ``factors``, without the frozen term."""

    def add_correction(self, wide: tuple[int, int, int], correction: float) -> None:
        """Make the frozen term, which ``keep_start`` fills.

        Args:
            wide: R, I and O.
            correction: Minus the scale of the term.
        """
        rows, in_features, out_features = wide
        self.A_start = nn.Parameter(torch.zeros(1, rows, in_features))
        self.Bt_start = nn.Parameter(torch.zeros(1, rows, out_features))
        self.correction = correction

    def keep_start(self, a_RI: Tensor, b_RO: Tensor) -> None:
        """Fill the frozen term."""
        self.A_start.copy_(a_RI.unsqueeze(0))
        self.Bt_start.copy_(b_RO.unsqueeze(0))

    def parts(self) -> list[Part]:
        """See base class; the frozen term is taken off once, for the sum of gates."""
        own, taken_off = Part(*self.own(), self.lora_dropout), self.taken_off()
        if not taken_off:
            return [own]
        return [Part(self.A_start, self.Bt_start, taken_off), own]

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class; every expert carries the frozen term with it."""
        (A, Bt, scale), taken_off = self.own(), self.taken_off()
        if not taken_off:
            return A, Bt, scale
        assert isinstance(scale, float)
        a_start = self.A_start.expand(len(A), -1, -1)
        b_start = self.Bt_start.expand(len(Bt), -1, -1) * (taken_off / scale)
        return torch.cat([A, a_start], 1), torch.cat([Bt, b_start], 1), scale


@torch.no_grad()
def factors_of(
    weight: Tensor, init: bool | str, rank: int, scale: float, seed: int
) -> tuple[Tensor, Tensor]:
    """A [r, I] and B^T [r, O] of PiSSA or OLoRA, at least float32.

    Args:
        weight: W, [O, I].
        init: ``pissa``, ``pissa_niter_<iterations>`` or ``olora``.
        rank: r, at most the smaller of O and I.
        scale: s; OLoRA does not divide by it, as in PEFT.
        seed: Of the randomised decomposition; the global generator is left alone.
    """
    require_values(weight, f"experts.init_lora_weights {init}")
    wide_OI = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        q_OM, r_MI = torch.linalg.qr(wide_OI)
        return r_MI[:rank], q_OM[:, :rank].t()
    fast = _FAST.fullmatch(str(init))
    if fast:
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            u_Or, s_r, v_Ir = torch.svd_lowrank(wide_OI, rank, niter=int(fast[1]))
        vt_rI = v_Ir.t()
    else:
        u_Or, s_r, vt_rI = torch.linalg.svd(wide_OI, full_matrices=False)
    root_r1 = (s_r[:rank] / scale).sqrt().unsqueeze(1)
    return root_r1 * vt_rI[:rank], root_r1 * u_Or[:, :rank].t()


def orthogonal(A: Tensor, Bt: Tensor, generator: torch.Generator) -> None:
    """Fill A [E, r, I] and B^T [E, r, O] so that every B_e A_e is zero; r is even."""
    half = A.shape[1] // 2
    for a_rI, b_rO in zip(A, Bt, strict=True):
        q_rr = torch.linalg.qr(torch.randn(2 * half, 2 * half, generator=generator)).Q
        for factor, rows in ((a_rI, q_rr[0::2]), (b_rO, q_rr[1::2])):
            noise = torch.randn(half, factor.shape[1], generator=generator)
            factor.copy_(rows.t() @ noise / 10)


def require_values(weight: Tensor, what: str) -> None:
    """Refuse to start from a weight that holds no values yet."""
    if weight.is_meta:
        raise WrapError(
            f"{what} starts from the frozen weights, which are on the meta device; "
            "load the weights first"
        )
