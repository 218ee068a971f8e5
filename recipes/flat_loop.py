"""The whole method without this package: Chain of LoRA in torch, transformers and peft, read from top to bottom.

    python recipes/flat_loop.py                    (a tiny random Qwen2 on random tokens, seconds)

cola/chain.py is the same loop in the words of the package: extend, tune, tie_knot, with every start, rule and method.
tests/test_chain.py holds that both give the same losses.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

Batch = tuple[torch.Tensor, torch.Tensor]  # input_ids and labels (-100 where there is no target), both (B, T)


def chain_of_loras(
    model: PreTrainedModel, links: list[list[Batch]], seeds: list[int], rank: int, alpha: int, learning_rate: float
) -> tuple[PreTrainedModel, list[float]]:
    """Train one pair per list of batches, each merged before the next begins; returns the model and all losses."""
    pristine = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learned: dict[str, torch.Tensor] = {}
    losses = []
    for batches, seed in zip(links, seeds, strict=True):
        # Extend: a fresh pair, A random and B zero, so the function is unchanged.
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config)
        pair = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        # Tune: that pair alone, with an optimizer of its own.
        optimizer = torch.optim.AdamW(pair, lr=learning_rate, weight_decay=0.0)
        for input_ids, labels in batches:
            loss = wrapped(input_ids=input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pair, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        # Tie the knot: W_k = W_0 + the sum of all s B A, from the untouched W_0.
        for name, layer in wrapped.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                delta = layer.get_delta_weight("default").detach()
                learned[name] = learned.get(name, 0) + delta
        model = wrapped.unload()
        with torch.no_grad():
            for name, delta in learned.items():
                model.get_submodule(name).weight.copy_(pristine[f"{name}.weight"] + delta)
    return model, losses


def main() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    tokens = torch.randint(0, 100, (8, 16))
    links = [[(tokens, tokens)] * 20] * 3
    _, losses = chain_of_loras(Qwen2ForCausalLM(config), links, seeds=[1, 2, 3], rank=2, alpha=4, learning_rate=3e-2)
    for number in range(3):
        print(f"link {number + 1}: loss {losses[20 * number]:.3f} -> {losses[20 * number + 19]:.3f}")


if __name__ == "__main__":
    main()
