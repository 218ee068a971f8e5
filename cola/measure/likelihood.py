"""What a model gives to a row's choices: by one pass for each, or by a shared beginning."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedModel

from cola.data.batches import by_tokens, collate
from cola.data.encode import Example
from cola.errors import ModelError
from cola.link.adapters import unwrapped
from cola.link.forward import logits_and_cache, logits_at


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
    """-log p of every choice, summed over its tokens, for examples with one number of choices.

    The prompt is read once; choices of more than one token continue from its cache, for which the prompts must be of
    one length.
    """
    n_choices = len(examples[0].answers)
    prompts = collate([(example.id, example.prompt, example.answers[0][:1]) for example in examples]).to(model.device)
    prompts_BT, last_BT = prompts.input_ids_BT[:, :-1], prompts.predicts_BT[:, :-1]
    longest = max(len(answer) for example in examples for answer in example.answers)
    long = longest > 1
    logits_BV, cache = logits_and_cache(model, prompts_BT, last_BT, use_cache=long)
    first_BC = torch.tensor([[answer[0] for answer in example.answers] for example in examples], device=model.device)
    nats_BC = -logits_BV.log_softmax(-1).gather(1, first_BC)
    if long:
        if cache is None:
            raise ModelError(f"{type(model).__name__} gives no cache of keys and values")
        cache.batch_repeat_interleave(n_choices)
        answers = [answer for example in examples for answer in example.answers]
        rest = collate([("", answer[:1], [*answer[1:], *[0] * (longest - len(answer))]) for answer in answers])
        real_QT = torch.tensor([[t < len(answer) - 1 for t in range(longest)] for answer in answers])
        rest_ids_QT, real_QT = rest.input_ids_BT.to(model.device), real_QT.to(model.device)
        # The cache has the virtual tokens, which PEFT's wrapper would put before the rest once more.
        going_on = {"use_cache": True, "past_key_values": cache}
        logits_NV, _ = logits_and_cache(unwrapped(model), rest_ids_QT, real_QT, **going_on)
        targets_N = torch.tensor([token for answer in answers for token in answer[1:]], device=model.device)
        rest_Q = torch.zeros(len(answers), device=model.device)
        rows_N = repeat(torch.arange(len(answers), device=model.device), "q -> q t", t=longest)[real_QT]
        rest_Q.index_add_(0, rows_N, nats_of(logits_NV, targets_N))
        nats_BC = nats_BC + rearrange(rest_Q, "(b c) -> b c", c=n_choices)
    return nats_BC.tolist()


def nats_of(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
