"""PEFT's Riemannian preconditioning, through cola's groups. Run: pytest tests/link/ideas/test_riemannian.py"""

import torch
from test_methods import close
from torch import Tensor, nn

from cola.link.ideas.door import Trained, TrainedPair
from cola.link.ideas.riemannian import riemannian


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(A_RI: Tensor, B_OR: Tensor) -> TrainedPair:
    return TrainedPair("m", nn.Parameter(A_RI.clone()), nn.Parameter(B_OR.clone()), 2.0)


def trained(pair: TrainedPair, *more: nn.Parameter, ratio: float = 1.0) -> Trained:
    groups = [{"params": [pair.A_RI], "ratio": 1.0}, {"params": [pair.B_OR, *more], "ratio": ratio}]
    return Trained(groups, [pair], betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.1, n_steps=3)


def give_gradient(pair: TrainedPair, gradient_OI: Tensor) -> None:
    """That of a loss with this full gradient."""
    with torch.no_grad():
        pair.A_RI.grad = pair.scale * pair.B_OR.T @ gradient_OI.to(pair.B_OR)
        pair.B_OR.grad = pair.scale * gradient_OI.to(pair.A_RI) @ pair.A_RI.T


def test_its_steps_are_adamws_in_float64_on_the_papers_gradients() -> None:
    ours = pair_of(drawn(3, 7, seed=1), drawn(5, 3, seed=2))
    vector = nn.Parameter(torch.ones(4))
    optimizer = riemannian(trained(ours, vector, ratio=4.0), damping=0.02)
    A_RI, B_OR, plain = (nn.Parameter(p.detach().double()) for p in (ours.A_RI, ours.B_OR, vector))
    groups = [{"params": [A_RI], "lr": 0.01}, {"params": [B_OR, plain], "lr": 0.04}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    eye_RR = 0.02 * torch.eye(3, dtype=torch.float64)
    for step in range(3):
        gradient_OI = drawn(5, 7, seed=10 + step)
        give_gradient(ours, gradient_OI)
        G_OI = gradient_OI.double()
        with torch.no_grad():
            A_RI.grad = torch.linalg.solve(B_OR.T @ B_OR + eye_RR, 2 * B_OR.T @ G_OI)
            B_OR.grad = torch.linalg.solve(A_RI @ A_RI.T + eye_RR, (2 * G_OI @ A_RI.T).T).T
        vector.grad, plain.grad = torch.arange(4.0), torch.arange(4.0).double()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["ratio"]
        optimizer.step()
        reference.step()
    assert close(ours.A_RI.double(), A_RI)
    assert close(ours.B_OR.double(), B_OR)
    assert close(vector.double(), plain)


def test_the_gradient_that_adamw_is_given_moves_the_product_alike_however_it_is_split() -> None:
    A_RI, B_OR, T_RR = drawn(3, 7, seed=1), drawn(5, 3, seed=2), drawn(3, 3, seed=3) + 3 * torch.eye(3)
    moves = []
    for own in (pair_of(A_RI, B_OR), pair_of(torch.linalg.inv(T_RR) @ A_RI, B_OR @ T_RR)):
        give_gradient(own, drawn(5, 7, seed=4))
        optimizer = riemannian(trained(own), damping=1e-9)
        before = own.A_RI.detach().clone(), own.B_OR.detach().clone()
        optimizer.step()  # of learning rate 0: PEFT leaves its gradients where it found AdamW's
        assert torch.equal(own.A_RI, before[0])
        assert own.A_RI.grad is not None
        assert own.B_OR.grad is not None
        moves.append((own.B_OR @ own.A_RI.grad, own.B_OR.grad @ own.A_RI))
    for one, other in zip(*moves, strict=True):
        assert close(one, other, 1e-4)
