"""`knot.optimizer: reproject`: AdamW's moments of the old pair, as far as they speak of the new one.

The moments belong to directions: with G the full gradient, g_B = s G A^T and g_A = s B^T G. What the old moments know
of G lies in the span of the old factors, so by least squares

    P = (A A^T)^+ A A'^T        m_B' = s'/s m_B P        v_B' = (s'/s)^2 v_B P^2
    Q = B'^T B (B^T B)^+        m_A' = s'/s Q m_A        v_A' = (s'/s)^2 Q^2 v_A          (squares entry by entry)

which is how LoFT moves its first moments from step to step (arXiv 2505.21289, section 3; in its code they are those of
g_B (A A^T)^-1 and (B^T B)^-1 g_A). LoFT keeps second moments with their cross terms, r times as large; here they are
AdamW's own, so cross terms between directions are left out.

Traps: a fresh pair has B' = 0, so nothing is known of g_A: its moments are zero, and its step count begins anew, or the
bias correction would be gone and its updates several times too large; so with B, where A' has nothing in common with A
(`init: orthogonal`). And where A' is drawn at random, little of it lies in the span of A: v_B' is small, and the first
steps after the knot may be up to 6.6 times those of a fresh AdamW (2.9 times after a link of 200 steps), unless they
are warmed up (`knot.warmup_steps`).
"""

import torch
from torch import Tensor

from cola.errors import IdeaError
from cola.link.ideas.door import HandedOn, State

NOTHING = torch.finfo(torch.float32).eps  # a share of the second moments that is rounding alone


def reproject(matrix: HandedOn) -> tuple[State, State]:
    """The moments of A and B, projected; IdeaError where the optimizer's state has none of AdamW's names."""
    if matrix.A.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise IdeaError(f"reproject moves AdamW's moments, and the optimizer has {', '.join(matrix.A) or 'none'}")
    before, after = matrix.before, matrix.after
    scale = after.scale / before.scale
    P_RK = torch.linalg.pinv(before.A_RI.double().T).mm(after.A_RI.double().T)
    Q_KR = torch.linalg.pinv(before.B_OR.double()).mm(after.B_OR.double()).T
    return (
        _moved(matrix.A, Q_KR @ matrix.A["exp_avg"].double(), Q_KR.square() @ matrix.A["exp_avg_sq"].double(), scale),
        _moved(matrix.B, matrix.B["exp_avg"].double() @ P_RK, matrix.B["exp_avg_sq"].double() @ P_RK.square(), scale),
    )


def _moved(state: State, first: Tensor, second: Tensor, scale: float) -> State:
    """A factor's state with these moments, times the new scale over the old; a fresh one where nothing is left."""
    if second.max() <= NOTHING * state["exp_avg_sq"].max():
        return {key: torch.zeros_like(value) for key, value in state.items()}
    return {"step": state["step"], "exp_avg": (scale * first).float(), "exp_avg_sq": (scale**2 * second).float()}
