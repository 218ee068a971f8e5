"""What a model gives to a row's choices: by one pass for each, or by a shared beginning."""

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor
from transformers import PreTrainedModel

from cola.data.batches import by_tokens, collate
from cola.data.encode import Example
from cola.link.forward import logits_and_cache, logits_at
from cola.measure.continued import Continued, going_on


def last_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits (1, V) of what follows a row, by a plain pass over it."""
    batch = collate([("", tokens, [0])]).to(model.device)
    return logits_at(model, batch.input_ids_BT[:, :-1], batch.predicts_BT[:, :-1])


def left_padded(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) for decoding, which goes on at their common end, and their attention mask."""
    width = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), width), fill)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, prompt in enumerate(prompts):
        input_ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[b, width - len(prompt) :] = 1
    return input_ids_BT, mask_BT


def plain_choice_nats(model: PreTrainedModel, example: Example, batch_tokens: int) -> list[float]:
    """-log p of every choice, summed over its tokens, each choice read after the prompt as a row of its own."""
    nats = [0.0] * len(example.answers)
    rows = [(str(c), example.prompt, answer) for c, answer in enumerate(example.answers)]
    for group in by_tokens(rows, lambda row: len(row[1]) + len(row[2]), batch_tokens):
        batch = collate(group).to(model.device)
        nats_N = nats_of(logits_at(model, batch.input_ids_BT, batch.predicts_BT), batch.targets_N)
        for (choice, _, _), own_N in zip(group, nats_N.split([len(row[2]) for row in group]), strict=True):
            nats[int(choice)] = own_N.sum().item()
    return nats


def choice_nats(model: PreTrainedModel, examples: Sequence[Example]) -> list[list[float]]:
    """-log p of every choice of each example, summed over its tokens.

    Prompts are read once, of any lengths together. Choices of more than one token go on from there, all of them
    together.
    """
    device, answers = model.device, [example.answers for example in examples]
    rows = [(q, answer) for q, choices in enumerate(answers) for answer in choices]
    prompts = collate([(example.id, example.prompt, [0]) for example in examples]).to(device)
    prompts_BT, last_BT = prompts.input_ids_BT[:, :-1], prompts.predicts_BT[:, :-1]
    longest = max(len(answer) for _, answer in rows)
    logits_BV, cache = logits_and_cache(model, prompts_BT, last_BT, **going_on(model, longest > 1))
    rows_Q = torch.tensor([row for row, _ in rows], device=device)
    first_Q = torch.tensor([answer[0] for _, answer in rows], device=device)
    nats_Q = -logits_BV.log_softmax(-1)[rows_Q, first_Q]
    if longest > 1:
        lengths = [len(examples[row].prompt) for row, _ in rows]
        continued = Continued(model, cache, prompts_BT.shape[1], rows_Q.tolist(), lengths)
        rest = collate([("", answer[:1], [*answer[1:], *[0] * (longest - len(answer))]) for _, answer in rows])
        real_QT = torch.tensor([[t < len(answer) - 1 for t in range(longest)] for _, answer in rows], device=device)
        logits_NV = continued.logits(rest.input_ids_BT.to(device), real_QT)
        targets_N = torch.tensor([token for _, answer in rows for token in answer[1:]], device=device)
        of_N = repeat(torch.arange(len(rows), device=device), "q -> q t", t=longest)[real_QT]
        nats_Q = nats_Q.index_add(0, of_N, nats_of(logits_NV, targets_N))
    return [part.tolist() for part in nats_Q.split([len(choices) for choices in answers])]


def nats_of(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
